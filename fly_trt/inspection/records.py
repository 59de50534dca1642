"""From outputs to the document: what each token and each round was, with the texts that a reader needs.

It knows outputs and a tokenizer; the form itself is `document.py`'s.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from fly_trt.errors import RequestError
from fly_trt.files import new_file
from fly_trt.inspection.document import COUNTS, new_document
from fly_trt.outputs import CompletionOutput, RequestMetrics, RequestOutput, RoundTrace, TokenTrace
from fly_trt.text.token_text import TokenReader

TraceRecord = dict[str, Any]


def save_trace(
    outputs: RequestOutput | Iterable[RequestOutput], path: str | Path, tokenizer: Tokenizer, *, name: str = "request"
) -> None:
    """Writes what `speculation_trace` said of finished outputs, whole ones and not deltas, as one file for fly-inspect.

    tokenizer: the LLM's. name: what the requests are called in the page's list, before their ids. Raises RequestError
    for an output without a trace."""
    reader = TokenReader(tokenizer)
    listed = [outputs] if isinstance(outputs, RequestOutput) else list(outputs)
    prompts = [tuple(output.prompt_token_ids) for output in listed]
    counts = Counter(prompts)
    numbers = {prompt: number for number, prompt in enumerate(counts)}
    requests = [
        request_record(
            reader,
            output,
            completion,
            source="LLM",
            name=f"{name} {output.request_id}",
            group=f"prompt {numbers[prompt]}" if counts[prompt] > 1 else None,
        )
        for output, prompt in zip(listed, prompts, strict=True)
        for completion in output.outputs
    ]
    with new_file(Path(path)) as file:
        file.write_text(json.dumps(new_document(requests)) + "\n", encoding="ascii")


def request_record(
    reader: TokenReader,
    output: RequestOutput,
    completion: CompletionOutput,
    *,
    source: str,
    name: str,
    group: str | None = None,
) -> TraceRecord:
    """One completion as the document has it. group: what requests with the same prompt have in common. Raises
    RequestError where it has no trace."""
    if completion.trace is None:
        raise RequestError(f"request {output.request_id} has no trace: ask for one with speculation_trace=True")
    if completion.trace and completion.trace[0].round:
        raise RequestError(f"request {output.request_id}: a part of its output, expected the whole: not DELTA")
    is_alone = len(output.outputs) == 1
    return {
        "name": name if is_alone else f"{name} #{completion.index}",
        "group": group,
        "source": source,
        "acceptance": None,
        "prompt": output.prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "metrics": metrics_record(output.metrics) if is_alone else None,
        "tokens": token_records(reader, completion.token_ids, completion.trace),
        "rounds": round_records(reader, completion.rounds or ()),
    }


def token_records(reader: TokenReader, token_ids: Sequence[int], trace: Sequence[TokenTrace]) -> list[TraceRecord]:
    """How each of the tokens came to be. bytes: as in logprobs, since a token may be a part of a character."""
    return [
        {
            **_named(reader, token),
            "bytes": list(reader.as_bytes(token, reader.text(token))),
            "kind": how.kind,
            "source": how.source,
            "round": how.round,
            "entropy": how.entropy,
            "choice": how.choice,
            "choice_token": reader.text(how.choice),
            "rejected": None if how.rejected is None else _named(reader, how.rejected),
            "reason": how.reason,
            "gate": how.gate,
            "num_agreed": how.num_agreed,
            "guard": how.guard,
            "top": None
            if how.top is None
            else [_named(reader, other) | {"logprob": value} for other, value in how.top],
        }
        for token, how in zip(token_ids, trace, strict=True)
    ]


def round_records(reader: TokenReader, rounds: Sequence[RoundTrace]) -> list[TraceRecord]:
    """What each round drafted, what stood and what it cost."""
    return [round_._asdict() | {"rejected": [_named(reader, token) for token in round_.rejected]} for round_ in rounds]


def metrics_record(metrics: RequestMetrics) -> TraceRecord:
    """The counts and times that a page shows."""
    return {name: getattr(metrics, name) for name in COUNTS}


def _named(reader: TokenReader, token: int) -> TraceRecord:
    return {"token": reader.text(token), "token_id": token}
