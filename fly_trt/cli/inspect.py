"""`fly-inspect`: a saved trace as one page that says of each token how it came to be."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fly_trt.cli import options
from fly_trt.cli.command import command
from fly_trt.errors import ConfigError
from fly_trt.inspection.document import merged
from fly_trt.inspection.page import write_page
from fly_trt.inspection.sources import MAX_BYTES, parse_traces, read_traces

EXAMPLES = """
\b
A trace is what one of these wrote:
  fly-generate engines/demo --file prompt.txt --json --trace > trace.json
  curl -s $URL/v1/completions -d '{"model": "demo", "prompt": "Hi", "speculation_trace": true}' > trace.json
  fly_trt.inspection.save_trace(llm.generate(prompts, params), "trace.json", llm.tokenizer)

\b
Examples:
  fly-inspect trace.json                                # writes trace.html
  fly-inspect loose.json exact.json -o page.html        # all of them in one page, to be put side by side
  fly-generate engines/demo "Hi" --json --trace | fly-inspect - -o page.html
  fly-inspect answer.sse --json > trace.json            # as the one form that all traces have
"""


@command("fly-inspect", epilog=EXAMPLES, streams=True)
@click.argument("traces", nargs=-1, required=True, metavar="TRACE...")
@options.output("The page.  [TRACE with .html]", metavar="FILE")
@options.as_json("Print the traces as one JSON document instead.")
def main(traces: Sequence[str], output: Path | None, as_json: bool) -> None:
    """Makes one self-contained HTML page of the traces in TRACE (or standard input, with -)."""
    document = merged([_read(trace) for trace in traces])
    if as_json:
        click.echo(json.dumps(document))
        return
    page = output or _beside(traces[0])
    write_page(document, page)
    click.echo(f"{page}: {_count(document)}", err=True)


def _read(trace: str) -> dict[str, Any]:
    if trace == "-":
        return parse_traces(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input")
    return read_traces(trace)


def _beside(trace: str) -> Path:
    if trace == "-":
        raise ConfigError("--output: needed where the first trace is standard input")
    page = Path(trace).with_suffix(".html")
    if page == Path(trace):
        raise ConfigError(f"{trace}: named as the page that is made of it: give another name with -o")
    return page


def _count(document: dict[str, Any]) -> str:
    requests = document["requests"]
    num_tokens = sum(len(request["tokens"]) for request in requests)
    return f"{len(requests)} request{'s' * (len(requests) > 1)}, {num_tokens} token{'s' * (num_tokens > 1)}"


if __name__ == "__main__":
    main()
