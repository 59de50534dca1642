"""`fly-generate`: streams one completion to the terminal and says in one line what speculation did for it."""

import dataclasses
import json
import re
import sys
import time
from typing import Any

import click

from fly_trt.errors import FlyError, RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.params import ACCEPTANCES, DEFAULT_MAX_TOKENS, METHODS
from fly_trt.verification import PRESETS

ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
SPECULATIVE_FLAGS = (
    "method",
    "num_speculative_tokens",
    "acceptance",
    "preset",
    "fly_entropy_threshold",
    "fly_window_size",
)
EXAMPLES = """
\b
Examples:
  fly-generate engines/demo "### Instruction:\\nSpell out: 21.\\n### Response:\\n" --escape
  fly-generate engines/demo --file prompt.txt --max-tokens 400
  echo "Once upon a time" | fly-generate engines/llama-70b -
  fly-generate engines/demo --file prompt.txt --acceptance exact        # lossless
  fly-generate engines/demo --file prompt.txt --method none --json      # plain decoding, for machines
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("engine_dir")
@click.argument("prompt", required=False)
@click.option("--file", "prompt_file", type=click.File(encoding="utf-8"), help="Read the prompt from a file.")
@click.option("--escape", is_flag=True, help="Read \\n, \\t and \\\\ in PROMPT as escapes.")
@click.option("--max-tokens", type=int, default=DEFAULT_MAX_TOKENS, show_default=True, help="Output tokens at most.")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 decodes greedily.")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--ignore-eos", is_flag=True, help="Go on after the model's end-of-sequence token.")
@click.option("--method", type=click.Choice([*METHODS, "none"]), help="How drafts are made.")
@click.option("--num-speculative-tokens", type=int, metavar="K", help="Draft tokens per step.")
@click.option("--acceptance", type=click.Choice(ACCEPTANCES), help="Loose, or exact (lossless).")
@click.option("--preset", type=click.Choice(list(PRESETS)), help="Which FLy.")
@click.option(
    "--fly-entropy-threshold", type=float, metavar="X", help="Gate, in nats; under preset paper a fraction of ln V."
)
@click.option("--fly-window-size", type=int, metavar="W", help="Deferred window, in tokens.")
@click.option("--num-threads", type=int, metavar="N", help="CPU threads. [all cores]")
@click.option("--verify", "verify_hashes", is_flag=True, help="Check every engine file against its sha256 first.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of streaming.")
def main(engine_dir: str, prompt: str | None, prompt_file: Any, escape: bool, as_json: bool, **flags: Any) -> None:
    """Completes PROMPT (or standard input, with -) with the engines in ENGINE_DIR."""
    try:
        text = _read_prompt(prompt, prompt_file, escape)
        _run(engine_dir, text, as_json, flags)
    except FlyError as error:
        click.echo(f"fly-generate: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        click.echo("\nfly-generate: interrupted", err=True)
        sys.exit(130)


def _read_prompt(prompt: str | None, file: Any, escape: bool) -> str:
    if (prompt is None) == (file is None):
        raise RequestError("give either PROMPT or --file")
    if file is not None:
        try:
            return str(file.read())
        except UnicodeError as error:
            raise RequestError(f"{file.name}: not UTF-8 text ({error}): convert the file") from None
    assert prompt is not None
    if prompt == "-":
        return sys.stdin.read()
    if escape:
        return re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], prompt)
    return prompt


def _run(engine_dir: str, prompt: str, as_json: bool, flags: dict[str, Any]) -> None:
    from fly_trt import LLM, SamplingParams

    params = SamplingParams(
        temperature=flags["temperature"],
        max_tokens=flags["max_tokens"],
        stop=list(flags["stop"]),
        ignore_eos=flags["ignore_eos"],
    )
    speculative = {name: flags[name] for name in SPECULATIVE_FLAGS if flags[name] is not None}
    if speculative.get("method") == "none":
        speculative["method"] = None
    with LLM(
        engine_dir,
        speculative_config=speculative,
        num_threads=flags["num_threads"],
        verify_hashes=flags["verify_hashes"],
    ) as llm:
        started = time.perf_counter()
        num_shown = 0
        for output in llm.stream(prompt, params):
            if not as_json:
                text = output.outputs[0].text
                click.echo(text[num_shown:], nl=False)
                num_shown = len(text)
        seconds = time.perf_counter() - started
    if as_json:
        click.echo(json.dumps(_as_record(output)))
    else:
        click.echo()
        click.echo(_summary(output, seconds), err=True)


def _as_record(output: RequestOutput) -> dict[str, Any]:
    record = dataclasses.asdict(output.outputs[0])
    metrics = {**dataclasses.asdict(output.metrics), "mean_acceptance_length": output.metrics.mean_acceptance_length}
    return {**record, "prompt_token_ids": output.prompt_token_ids, "metrics": metrics}


def _summary(output: RequestOutput, seconds: float) -> str:
    completion, metrics = output.outputs[0], output.metrics
    rate = len(completion.token_ids) / seconds
    text = f"{len(completion.token_ids)} tokens, {rate:.1f} tokens/s, finish reason {completion.finish_reason}"
    if metrics.num_spec_steps:
        text += (
            f", mean acceptance length {metrics.mean_acceptance_length:.2f} over {metrics.num_spec_steps} steps, "
            f"{metrics.num_loosened_tokens} loosened tokens"
        )
    return text


if __name__ == "__main__":
    main()
