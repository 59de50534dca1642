"""`fly-generate`: streams one completion to the terminal and says in one line what speculation did for it."""

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import click

from fly_trt.acceptance import AcceptanceParams
from fly_trt.cli import options
from fly_trt.cli.command import command
from fly_trt.errors import RequestError
from fly_trt.inspection.records import round_records, token_records
from fly_trt.outputs import RequestOutput
from fly_trt.params import DEFAULT_MAX_TOKENS
from fly_trt.text.token_text import TokenReader
from fly_trt.verification import POLICIES

ENCODING = "utf-8-sig"  # whatever the terminal's; some editors put a byte-order mark first
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "max_tokens", "ignore_eos")
EXAMPLES = """
\b
Examples:
  fly-generate engines/demo "### Instruction:\\nSpell out: 21.\\n### Response:\\n" --escape
  fly-generate engines/demo --file prompt.txt --max-tokens 400
  echo "Once upon a time" | fly-generate engines/llama-70b -
  fly-generate engines/demo --file prompt.txt --acceptance exact        # lossless
  fly-generate engines/demo --file prompt.txt --method none --json      # plain decoding, for machines
  fly-generate engines/demo --file prompt.txt --json --trace --compare exact > trace.json && fly-inspect trace.json
  fly-generate engines/demo "Spell out: 21." --chat --temperature 0.8 --top-p 0.95 --seed 7
"""


@command("fly-generate", epilog=EXAMPLES, streams=True)
@options.ENGINE_DIR
@click.argument("prompt", required=False)
@click.option("--file", "prompt_file", type=click.File(encoding=ENCODING), help="Read the prompt from a file.")
@options.chat("PROMPT")
@click.option("--escape", is_flag=True, help="Read \\n, \\t and \\\\ in PROMPT as escapes.")
@options.max_tokens(DEFAULT_MAX_TOKENS, "Output tokens at most.")
@options.TEMPERATURE
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Sample from this share of the mass.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Sample from this many tokens; 0 is all.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Least probability, relative to the best.")
@click.option("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1 repeats less.")
@click.option("--seed", type=int, help="The same seed gives the same text.  [random]")
@click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times.")
@click.option("--json-schema", metavar="FILE|TEXT", help="The output is JSON of this schema.")
@click.option("--regex", help="The whole output matches this regular expression.")
@options.ignore_eos("Go on after the model's end-of-sequence token.")
@options.speculative_options
@options.num_threads()
@options.devices()
@click.option("--verify", "verify_hashes", is_flag=True, help="Check every engine file against its sha256 first.")
@click.option("--trace", is_flag=True, help="With --json: say of each token how it came to be.")
@click.option("--compare", type=click.Choice([*POLICIES]), help="With --trace: complete it by this rule as well.")
@options.as_json("Print one JSON object instead of streaming.")
def main(engine_dir: Path, prompt: str | None, prompt_file: Any, escape: bool, as_json: bool, **flags: Any) -> None:
    """Completes PROMPT (or standard input, with -) with the engines in ENGINE_DIR."""
    _run(engine_dir, _read_prompt(prompt, prompt_file, escape), as_json, flags)


def _read_prompt(prompt: str | None, file: Any, escape: bool) -> str:
    if (prompt is None) == (file is None):
        raise RequestError("give either PROMPT or --file")
    if prompt == "-":
        file = click.open_file("-", encoding=ENCODING)
    if file is not None:
        try:
            return str(file.read())
        except UnicodeError as error:
            name = "standard input" if file.name in ("-", "<stdin>") else file.name
            raise RequestError(f"{name}: not UTF-8 text ({error}): convert it") from None
    assert prompt is not None
    if escape:
        return re.sub(r"\\([nt\\])", lambda found: ESCAPES[found[1]], prompt)
    return prompt


def _run(engine_dir: Path, prompt: str, as_json: bool, flags: dict[str, Any]) -> None:
    from fly_trt import LLM, RequestOutputKind, SamplingParams

    if flags["trace"] and not as_json:
        raise RequestError("--trace: goes into the JSON object: add --json")
    if flags["compare"] and not flags["trace"]:
        raise RequestError("--compare: goes into the JSON object beside the trace: add --json --trace")
    params = SamplingParams(
        **{name: flags[name] for name in SAMPLING_FLAGS},
        stop=list(flags["stop"]),
        speculation_trace=flags["trace"],
        structured_outputs=_output_form(flags["json_schema"], flags["regex"]),
        output_kind=RequestOutputKind.DELTA if not as_json else RequestOutputKind.FINAL_ONLY,
    )
    with LLM(
        engine_dir,
        speculative_config=options.speculative_overrides(flags),
        max_batch_size=1,
        num_threads=flags["num_threads"],
        devices=flags["devices"],
        verify_hashes=flags["verify_hashes"],
    ) as llm:
        started = time.perf_counter()
        given = llm.render_chat([{"role": "user", "content": prompt}]) if flags["chat"] else prompt
        for output in llm.stream(given, params):
            if not as_json:
                click.echo(output.outputs[0].text, nl=False)
        seconds = time.perf_counter() - started
        record = _as_record(output, TokenReader(llm.tokenizer))
        if flags["compare"]:
            rule = AcceptanceParams(acceptance=flags["compare"])
            (other,) = llm.generate([given], dataclasses.replace(params, acceptance=rule))
            record["compared"] = _as_record(other, TokenReader(llm.tokenizer))
    if as_json:
        click.echo(json.dumps(record | {"setting": llm.setting.as_dict()}))
    else:
        click.echo()
        shown = filter(None, (_summary(output, seconds), llm.threads, str(llm.setting)))
        click.echo("; ".join(shown), err=True)


def _output_form(schema: str | None, regex: str | None) -> dict[str, str] | None:
    """Whichever is given; both are refused where they are read."""
    if schema is not None and not schema.lstrip().startswith("{"):
        try:
            schema = Path(schema).read_text(encoding=ENCODING)
        except (OSError, UnicodeError) as error:
            raise RequestError(f"--json-schema {schema}: not readable ({error}): give a file or a schema") from None
    given = {name: value for name, value in (("json", schema), ("regex", regex)) if value is not None}
    return given or None


def _as_record(output: RequestOutput, reader: TokenReader) -> dict[str, Any]:
    completion = output.outputs[0]
    record = {"prompt": output.prompt, **dataclasses.asdict(completion)}
    if completion.trace is not None:
        record["trace"] = token_records(reader, completion.token_ids, completion.trace)
        record["rounds"] = round_records(reader, completion.rounds or ())
    metrics = {**dataclasses.asdict(output.metrics), "mean_acceptance_length": output.metrics.mean_acceptance_length}
    return {**record, "prompt_token_ids": output.prompt_token_ids, "metrics": metrics}


def _summary(output: RequestOutput, seconds: float) -> str:
    completion, metrics = output.outputs[0], output.metrics
    rate = metrics.num_output_tokens / seconds
    text = f"{metrics.num_output_tokens} tokens, {rate:.1f} tokens/s, finish reason {completion.finish_reason}"
    if metrics.num_spec_steps:
        text += (
            f", mean acceptance length {metrics.mean_acceptance_length:.2f} over {metrics.num_spec_steps} steps, "
            f"{metrics.num_loosened_tokens} loosened tokens"
        )
        if metrics.num_loosened_tokens:
            text += f" ({metrics.num_saved_tokens} tokens saved)"
        for guard, count in metrics.num_refused_loosenings_by_guard.items():
            text += f", {guard} refused {count}"
    return text


if __name__ == "__main__":
    main()
