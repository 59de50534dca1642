"""The stand-in's worker process: fly-trt's own loop over ONNX Runtime, by the rule that its environment names.

It reads requests as lines of JSON, and writes the responses of an iteration as one line. A request's responses have the
tokens of one round each; those of several requests come in any order and late. Prompts of three given tokens ask for
trouble.
"""

import asyncio
import json
import os
import random
import sys
import threading

HOOK = "fly_trt.integrations.tensorrt_llm.import_hook"
ERROR, TIMEOUT, DEATH, LAST_WORDS = [1, 1, 1], [1, 1, 2], [1, 1, 3], [1, 1, 4]


async def serve(arguments: dict) -> None:
    from fly_trt import AsyncLLM
    from fly_trt.integrations.tensorrt_llm.environment import Acceptance

    acceptance = Acceptance.from_environment()
    if acceptance is not None and HOOK not in sys.modules:
        acceptance = None  # as where nothing puts the rule into the process
    settings = {"method": None}
    if arguments["num_draft_tokens"]:
        settings = {
            "method": "draft_model",
            "num_speculative_tokens": arguments["num_draft_tokens"],
            "adaptive_draft_length": False,
            "adaptive_acceptance": False,
            "acceptance": "exact" if acceptance is None else "fly",
        }
    if acceptance is not None and settings["method"]:
        given = {"fly_entropy_threshold": acceptance.threshold, "fly_window_size": acceptance.window}
        settings |= {"preset": acceptance.preset} | {k: v for k, v in given.items() if v is not None}
    async with AsyncLLM(
        os.environ["STAND_IN_ENGINES"],
        speculative_config=settings,
        max_batch_size=min(8, arguments["max_batch_size"]),
        enable_prefix_caching=arguments["enable_block_reuse"],
        num_threads=1,
    ) as llm:
        stops = llm.manifest.head.stop_token_ids
        if acceptance is not None and set(acceptance.stop_token_ids) != set(stops):
            say([{"stop tokens": acceptance.stop_token_ids, "expected": stops}])
            return
        print(json.dumps({"ready": True}), flush=True)
        await read(llm, arguments)


async def read(llm: object, arguments: dict) -> None:
    loop, lines = asyncio.get_running_loop(), asyncio.Queue()

    def pump() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, json.loads(line))
        loop.call_soon_threadsafe(lines.put_nowait, {"quit": True})

    threading.Thread(target=pump, daemon=True).start()
    running: dict[int, asyncio.Task] = {}
    while "quit" not in (message := await lines.get()):
        if "cancel" in message:
            if (task := running.get(message["cancel"])) is not None:
                task.cancel()
            continue
        task = asyncio.create_task(run(llm, message, arguments["samples"]))
        running[message["id"]] = task
        task.add_done_callback(lambda _, name=message["id"]: running.pop(name))
    for task in running.values():
        task.cancel()
    await asyncio.gather(*running.values(), return_exceptions=True)


async def run(llm: object, request: dict, samples: bool) -> None:
    from fly_trt import RequestOutputKind, SamplingParams

    name, prompt = request["id"], request["prompt"]
    if prompt == ERROR:
        return say([{"id": name, "error": "the engine has something against this one"}])
    if prompt == TIMEOUT:
        return respond(name, [], "TIMED_OUT")
    if prompt == LAST_WORDS:
        return respond(name, [], "it ran out of blocks")
    if prompt == DEATH:
        os._exit(3)
    ends = [] if request["ignore_eos"] else [request["end_id"], *(request["stop_token_ids"] or ())]
    params = SamplingParams(
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        stop_token_ids=ends,
        include_stop_str_in_output=True,
        output_kind=RequestOutputKind.DELTA,
        temperature=(request["temperature"] or 0.0) if samples else 0.0,
        top_k=request["top_k"] or 0,
        top_p=1.0 if request["top_p"] is None else request["top_p"],
    )
    rng, is_first = random.Random(name), True
    try:
        async for output in llm.generate({"prompt_token_ids": prompt}, params, request_id=str(name)):
            tokens, reason = output.outputs[0].token_ids, output.outputs[0].finish_reason
            cached = output.metrics.num_cached_tokens
            if is_first and len(tokens) > 1:  # the prompt's iteration makes one token
                respond(name, tokens[:1], None, cached)
                tokens = tokens[1:]
            is_first = False
            if reason == "stop":
                is_end = tokens[-1] == request["end_id"]
                if is_end and os.environ.get("STAND_IN_EMITS_END") == "no":
                    tokens = tokens[:-1]
                respond(name, tokens, "END_ID" if is_end else "STOP_WORDS", cached)
            elif reason == "length":
                respond(name, tokens, "LENGTH", cached)
            elif tokens:
                respond(name, tokens, None, cached)
                await asyncio.sleep(rng.choice((0, 0, 0.002)))
    except asyncio.CancelledError:
        respond(name, [], "CANCELLED")
        raise


def respond(name: int, tokens: list[int], reason: str | None, cached: int = 0) -> None:
    say(
        [
            {
                "id": name,
                "token_ids": tokens,
                "finish_reason": reason,
                "is_final": reason is not None,
                "cached_tokens": cached,
            }
        ]
    )


def say(batch: list[dict]) -> None:
    print(json.dumps(batch), flush=True)


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
