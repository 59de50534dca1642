"""`tensorrt_llm.bindings.executor` without TensorRT-LLM, as far as fly_trt calls it: ONNX Runtime computes its engines.

Names, keywords and their order are those of cpp/tensorrt_llm/nanobind/executor/{request,executorConfig,executor,
bindings}.cpp, what they do that of cpp/tensorrt_llm/executor/executorImpl.cpp and cpp/tensorrt_llm/batch_manager/
{trtGptModelInflightBatching.cpp,trtGptModel.h} of 1.2.0rc2 (commit b35ac1b6), and of include/tensorrt_llm/
batch_manager/llmRequest.h: one thread runs all active requests, a step each at a time; a request with draft tokens ends
after one step, with those that equal the sampled token and one more; whole blocks of what other requests left are
reused; what is wrong with a request is an error response; a cancelled one answers once more.

It promises no more than those: responses come late and in any order, of a cancelled one with tokens that nobody needs,
results have garbage where nothing was asked for, and unknown or missing keywords are TypeErrors. An engine file is a
text that says which ONNX engine computes it, and by which rule its logits are rewritten, as the plugin does.
"""

import json
import math
import random
import sys
import threading
import time
import types
from collections import deque
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from fly_trt.engines import load_engine
from fly_trt.manifest import read_manifest
from simulated_executor_records import (
    CommunicationMode,
    CommunicationType,
    ExecutorConfig,
    ExternalDraftTokensConfig,
    FinishReason,
    KvCacheConfig,
    ModelType,
    OrchestratorConfig,
    OutputConfig,
    ParallelConfig,
    Request,
    Response,
    Result,
    SamplingConfig,
    check_all,
)

TOKENS_PER_BLOCK = 32
GARBAGE = -12345
LATE_SECONDS = 0.002  # that a response is late, at most


class _Active:
    """A request that runs. `tokens` are its prompt and what was generated."""

    def __init__(self, request_id: int, request: Request) -> None:
        self.id, self.request = request_id, request
        self.tokens = list(request.input_token_ids)
        drafts = request.external_draft_tokens_config
        self.draft = list(drafts.tokens) if drafts else []
        self.max_new = request.max_tokens
        self.num_new = self.num_said = self.num_reused = 0
        self.slot = -1
        seed = request.sampling_config.seed
        self.random = np.random.default_rng(seed or 0)

    @property
    def num_prompt(self) -> int:
        return len(self.request.input_token_ids)


class Executor:
    """Of a folder with config.json and rank0.engine. For tests: `alive` are all that were not shut down; requests that
    begin with one of the `failing` sequences of tokens fail; `num_active`, `num_requests`, `num_steps` of one request,
    tokens that were `num_computed` and `num_reused` are counted."""

    ends_each_step: ClassVar[bool] = False  # also without draft tokens, as releases before 1.0 did
    alive: ClassVar[list["Executor"]] = []

    def __init__(self, model_path: Path, model_type: ModelType, executor_config: ExecutorConfig) -> None:
        assert model_type is ModelType.DECODER_ONLY
        config = json.loads((Path(model_path) / "config.json").read_text())
        self.built = config["build_config"]
        plan = json.loads((Path(model_path) / "rank0.engine").read_text())
        self.role, self.rule = plan["role"], plan["rule"]
        self.places = executor_config.parallel_config
        _check_places(self.places, config["pretrained_config"]["mapping"]["tp_size"])
        manifest = read_manifest(Path(plan["onnx"]))
        self.max_batch_size = min(executor_config.max_batch_size or math.inf, self.built["max_batch_size"])
        model = manifest.target if self.role == "target" else manifest.draft
        assert model is not None
        self.cache = executor_config.kv_cache_config
        self.num_slots = manifest.limits.max_batch_size
        self._engine = load_engine(Path(plan["onnx"]), manifest, model, num_slots=self.num_slots)
        self._stats_limit = executor_config.iter_stats_max_iterations
        self._held: list[list[int]] = [[] for _ in range(self.num_slots)]  # tokens in each slot's cache
        self._lock = threading.Condition()
        self._queue: deque[_Active] = deque()
        self._active: list[_Active] = []
        self._cancelled: set[int] = set()
        self._terminated: set[int] = set()
        self._ready: list[Response] = []
        self._late: list[tuple[float, Response]] = []
        self._stats: deque[Any] = deque()
        self._next_id = 1
        self._is_over = self._was_shut_down = False
        self._random = random.Random(0)
        self.failing: set[tuple[int, ...]] = set()
        self.num_computed = self.num_reused = self.num_requests = self.num_steps = 0
        self.fault: str | None = None
        self.is_dumb = False  # it takes requests and answers none
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        Executor.alive.append(self)

    @property
    def num_active(self) -> int:
        with self._lock:
            return len(self._active) + len(self._queue)

    def enqueue_request(self, request: Request) -> int:
        return self.enqueue_requests([request])[0]

    def enqueue_requests(self, requests: list[Request]) -> list[int]:
        assert isinstance(requests, list)
        with self._lock:
            self._check_open()
            ids = list(range(self._next_id, self._next_id + len(requests)))
            self._next_id += len(requests)
            self.num_requests += len(requests)
            for request_id, request in zip(ids, requests, strict=True):
                assert isinstance(request, Request)
                self._queue.append(_Active(request_id, request))
            self._lock.notify_all()
        return ids

    def await_responses(self, timeout: timedelta | None = None) -> list[Response]:
        assert isinstance(timeout, timedelta), "a wait has an end"
        with self._lock:
            self._check_open()
            self._lock.wait_for(
                lambda: self._ready or self._is_over or self._was_shut_down or self.fault, timeout.total_seconds()
            )
            if self.fault:
                raise RuntimeError(self.fault)
            ready, self._ready = self._ready, []
            self._random.shuffle(ready)  # it keeps them by id; those of one id are in order
            order: dict[int, int] = {}
            for response in ready:
                order.setdefault(response.request_id, len(order))
        return sorted(ready, key=lambda response: (order[response.request_id], response.at))

    def cancel_request(self, id: int | None = None) -> None:
        assert isinstance(id, int)
        with self._lock:
            self._check_open()
            if id not in self._terminated:
                self._cancelled.add(id)

    def get_latest_iteration_stats(self) -> deque[Any]:
        with self._lock:
            self._check_open()
            stats, self._stats = self._stats, deque()
        return stats

    def can_enqueue_requests(self) -> bool:
        return not self._was_shut_down

    def shutdown(self) -> None:
        with self._lock:
            self._was_shut_down = True
            self._lock.notify_all()
        self._thread.join()
        self._engine.close()
        if self in Executor.alive:
            Executor.alive.remove(self)

    def die(self) -> None:
        """As its loop does when it is over: nothing is waited for any more (executorImpl.cpp, awaitResponses)."""
        with self._lock:
            self._is_over = True
            self._lock.notify_all()

    def break_down(self, reason: str) -> None:
        """Whoever waits is told."""
        with self._lock:
            self.fault = reason
            self._lock.notify_all()

    @property
    def _has_ended(self) -> bool:
        return self._is_over or self._was_shut_down

    def _check_open(self) -> None:
        check_all(not self._was_shut_down, "Shutdown called")

    def _loop(self) -> None:
        while True:
            with self._lock:
                if not (self._queue or self._active or self._late or self._has_ended):
                    self._lock.wait()
                if self._is_over or (self._was_shut_down and (self.is_dumb or not self._active)):
                    return  # after shutdown() what runs runs to its end
                self._deliver()
                if self.is_dumb:
                    self._lock.wait(0.01)
                    continue
                while self._queue and len(self._active) < self.max_batch_size:
                    self._admit(self._queue.popleft())
                for active in [active for active in self._active if active.id in self._cancelled]:
                    self._cancelled.discard(active.id)
                    self._end(active, FinishReason.CANCELLED, tokens=[GARBAGE])
                batch = list(self._active)
            if batch:
                with self._lock:
                    self._count()  # after forwardAsync, when those that end in this step still run
            for active in batch:
                self._advance(active)
            time.sleep(self._random.random() * 0.0005)

    def _admit(self, active: _Active) -> None:
        """llmRequest.h, validate; what it throws becomes an error response (executorImpl.cpp, fetchNewRequests)."""
        built, num_prompt = self.built, active.num_prompt
        max_input = min(built["max_seq_len"] - 1, built["max_num_tokens"])
        if num_prompt > max_input:
            return self._fail(active, f"Prompt length ({num_prompt}) exceeds maximum input length ({max_input})")
        if len(active.draft) > built["max_draft_len"]:
            limit = built["max_draft_len"]
            return self._fail(active, f"Draft tokens length ({len(active.draft)}) exceeds maximum ({limit})")
        del active.draft[max(0, max_input - num_prompt) :]
        ahead = len(active.draft) or built["max_draft_len"]
        active.max_new = min(active.max_new, built["max_seq_len"] - num_prompt - ahead)
        if any(tuple(active.tokens[: len(tokens)]) == tokens for tokens in self.failing):
            return self._fail(active, "Encountered an error in forwardAsync function:\nsomething is broken")
        taken = {other.slot for other in self._active}
        free = [slot for slot in range(self.num_slots) if slot not in taken]
        reusable = {slot: _common(self._held[slot], active.tokens[:-1]) for slot in free}
        active.slot = max(free, key=lambda slot: (reusable[slot], -len(self._held[slot])))
        if self.cache.enable_block_reuse:
            active.num_reused = reusable[active.slot] // TOKENS_PER_BLOCK
        del self._held[active.slot][active.num_reused * TOKENS_PER_BLOCK :]
        self.num_reused += active.num_reused * TOKENS_PER_BLOCK
        self._active.append(active)
        return None

    def _advance(self, active: _Active) -> None:
        logits = self._compute(active.slot, active.tokens, active.draft)
        rewrite(logits, active.draft, self.rule)
        sampling = active.request.sampling_config
        said = [sampling.sample(row, active.random) for row in logits]
        num_accepted = next((at for at, token in enumerate(active.draft) if token != said[at]), len(active.draft))
        new = said[: num_accepted + 1][: active.max_new - active.num_new]
        if active.request.end_id in new:
            new = new[: new.index(active.request.end_id) + 1]
        with self._lock:
            active.tokens += new
            active.num_new += len(new)
            del self._held[active.slot][len(active.tokens) - 1 :]  # rejected tokens are no cache of the sequence
            if new and new[-1] == active.request.end_id:
                self._end(active, FinishReason.END_ID)
            elif active.num_new >= active.max_new:
                self._end(active, FinishReason.LENGTH)
            elif active.draft or self.ends_each_step:
                self._end(active, FinishReason.NOT_FINISHED)
            elif active.request.streaming:
                self._say(active, self._new_tokens(active), FinishReason.NOT_FINISHED, is_final=False)

    def _compute(self, slot: int, tokens: list[int], draft: list[int]) -> np.ndarray:
        """Logits float32 [k + 1, V] after the tokens and after each of k draft tokens."""
        held, engine = self._held[slot], self._engine
        assert held == tokens[: len(held)], "the cache holds the sequence"
        assert len(held) < len(tokens), "the last token is computed anew"
        limit = engine.info.max_num_tokens
        context, first = tokens[len(held) : -1], tokens[-1]
        for at in range(0, len(context), limit):
            part = context[at : at + limit]
            step = engine.step(slot, 1, len(part))
            step.set_row(0, len(held), np.array(part))
            engine.run(step)
            held += part
        row = [first, *draft]
        step = engine.step(slot, 1, len(row), with_logits=True)
        step.set_row(0, len(held), np.array(row))
        engine.run(step)
        assert step.logits is not None
        held += row
        self.num_computed += len(context) + len(row)
        self.num_steps += 1
        return step.logits[0, : len(row)].copy()

    def _new_tokens(self, active: _Active) -> list[int]:
        start, active.num_said = active.num_said, active.num_new
        before = active.num_prompt if active.request.output_config.exclude_input_from_output else 0
        return active.tokens[before + start :]

    def _fail(self, active: _Active, reason: str) -> None:
        self._terminated.add(active.id)
        self._respond(Response(active.id, error_msg=reason))

    def _end(self, active: _Active, reason: FinishReason, tokens: list[int] | None = None) -> None:
        self._active.remove(active)
        self._terminated.add(active.id)
        self._say(active, self._new_tokens(active) if tokens is None else tokens, reason, is_final=True)

    def _say(self, active: _Active, tokens: list[int], reason: FinishReason, *, is_final: bool) -> None:
        blocks = types.SimpleNamespace(num_reused_blocks=active.num_reused)
        wants_metrics = active.request.output_config.return_perf_metrics and is_final
        result = Result(
            is_final=is_final,
            output_token_ids=[tokens],
            finish_reasons=[reason],
            request_perf_metrics=types.SimpleNamespace(kv_cache_metrics=blocks) if wants_metrics else None,
            sequence_index=0,
            is_sequence_final=is_final,
            additional_outputs=[],
            log_probs=None,
            cum_log_probs=None,
            generation_logits=None,
            context_logits=None,
        )
        self._respond(Response(active.id, result=result))

    def _respond(self, response: Response) -> None:
        due = time.monotonic() + self._random.random() * LATE_SECONDS
        before = [at for at, late in self._late if late.request_id == response.request_id]
        self._late.append((max([due, *before]), response))

    def _deliver(self) -> None:
        now = time.monotonic()
        for due, response in sorted(self._late, key=lambda late: late[0]):
            if due <= now:
                response.at = due
                self._ready.append(response)
        self._late = [late for late in self._late if late[0] > now]
        if self._ready:
            self._lock.notify_all()

    def _count(self) -> None:
        total = self.num_slots * self.built["max_seq_len"] // TOKENS_PER_BLOCK
        used = sum(-(-len(active.tokens) // TOKENS_PER_BLOCK) for active in self._active)
        cache = types.SimpleNamespace(
            max_num_blocks=total, used_num_blocks=used, free_num_blocks=total - used, tokens_per_block=TOKENS_PER_BLOCK
        )
        self._stats.append(types.SimpleNamespace(kv_cache_stats=cache))
        while len(self._stats) > self._stats_limit:
            self._stats.popleft()


def rewrite(logits: np.ndarray, draft: list[int], rule: dict[str, Any] | None) -> None:
    """What the plugin does to a target's logits float32 [k + 1, V]: where a draft token of k is let pass, its logit
    becomes the largest. rule: FLy's numbers, and the tokens that are never loosened."""
    if rule is None or not draft:
        return
    choices, length = logits.argmax(1), len(draft)
    agrees = [token == choice for token, choice in zip(draft, choices[:length], strict=True)]
    scaled = logits[:length].astype(np.float64)
    probabilities = np.exp(scaled - scaled.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    if not rule["full"]:
        probabilities = -np.sort(-probabilities, 1)[:, : rule["top_k"]]
    entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-300))).sum(1)
    ahead = rule["lookahead"]
    for at, (token, choice) in enumerate(zip(draft, choices[:length], strict=True)):
        fits = at + max(rule["window"], ahead) < length
        is_open = not agrees[at] and entropy[at] >= rule["threshold"] and not {token, int(choice)} & set(rule["stops"])
        if is_open and fits and all(agrees[at + 1 : at + 1 + ahead]):
            logits[at, token] = np.nextafter(logits[at].max(), np.float32(np.inf), dtype=np.float32)


def _check_places(places: ParallelConfig | None, tp_size: int) -> None:
    """executorImpl.cpp, initializeOrchestrator and initializeWorkers, in a process that MPI did not start."""
    if places is None or places.communication_mode is CommunicationMode.LEADER:
        check_all(tp_size == 1, "With communicationMode kLEADER, MPI worldSize is expected to be equal to tp*pp*cp")
        return
    orchestrator = places.orchestrator_config
    check_all(orchestrator is not None and orchestrator.is_orchestrator, "OrchestratorConfig must be set")
    check_all(places.participant_ids is None, "Participant ids should not be set when spawning processes")
    check_all(places.device_ids is None or len(places.device_ids) == tp_size, "deviceIds")
    assert orchestrator is not None
    check_all(orchestrator.spawn_processes and Path(orchestrator.worker_executable_path).is_file(), "a worker")


def _common(first: list[int], second: list[int]) -> int:
    return next(
        (at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


BOUND = (
    *(CommunicationMode, CommunicationType, Executor, ExecutorConfig, ExternalDraftTokensConfig, FinishReason),
    *(KvCacheConfig, ModelType, OrchestratorConfig, OutputConfig, ParallelConfig, Request, Response, Result),
    SamplingConfig,
)
NAMES = [bound.__name__ for bound in BOUND]


def install(patch: pytest.MonkeyPatch, package: Path) -> types.ModuleType:
    """Makes `tensorrt_llm`, in the folder `package`, importable; its executor module is returned."""
    modules = {name: types.ModuleType(name) for name in ("tensorrt_llm", "tensorrt_llm.bindings")}
    bindings = types.ModuleType("tensorrt_llm.bindings.executor")
    modules["tensorrt_llm"].__file__ = str(package / "__init__.py")
    for bound in BOUND:
        setattr(bindings, bound.__name__, bound)
    for name, module in (modules | {bindings.__name__: bindings}).items():
        patch.setitem(sys.modules, name, module)
    return bindings
