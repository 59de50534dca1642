"""The document: traces of requests in one versioned form of JSON, as the README of this room has it.

Whatever a trace is read from becomes this, checked field by field, so that a page need not doubt it. Unknown fields are
left out. It knows no tokenizer and no engine.
"""

from collections.abc import Sequence
from typing import Any, get_args

from fly_trt.errors import ConfigError
from fly_trt.inspection.fields import Fields, shown
from fly_trt.outputs import TokenKind

FORMAT, VERSION = "fly-trt trace", 1
MAX_TOKENS = 200_000  # of all requests: more is no page that anybody reads
KINDS = get_args(TokenKind)
SOURCES = ("LLM", "fly-generate", "fly-serve", "fly-bench")
NUMBERS = ("num_draft_tokens", "num_accepted_tokens", "num_loosened_tokens", "num_spec_steps")
SIZES = ("num_saved_tokens", "num_prompt_tokens", "num_output_tokens")  # not known of every source
TIMES = ("time_to_first_token", "latency")
BY_NAME = ("num_draft_tokens_by_source", "num_accepted_tokens_by_source", "num_refused_loosenings_by_guard")
COUNTS = (*NUMBERS, "mean_acceptance_length", "acceptance_histogram", *BY_NAME, *SIZES, *TIMES, "exact_because")

Record = dict[str, Any]


def new_document(requests: Sequence[Record]) -> Record:
    return {"format": FORMAT, "version": VERSION, "requests": list(requests)}


def read_document(document: Fields) -> list[Record]:
    """The requests of a document of this form. Raises ConfigError for another version and for what does not fit."""
    if (version := document.raw("version")) != VERSION:
        raise ConfigError(
            f"{document.where}: version {shown(version)} of the form, this fly-trt reads {VERSION}: read it with "
            "the fly-trt that wrote it"
        )
    return [read_request(request) for request in document.objects("requests")]


def read_request(fields: Fields) -> Record:
    rounds = read_rounds(fields, "rounds")
    return {
        "name": fields.text("name"),
        "group": fields.text("group") if fields.has("group") else None,
        "source": fields.one_of("source", SOURCES),
        "acceptance": fields.text("acceptance") if fields.has("acceptance") else acceptance_of(rounds),
        "prompt": fields.text("prompt") if fields.has("prompt") else None,
        "text": fields.text("text"),
        "finish_reason": read_finish_reason(fields),
        "metrics": read_metrics(fields.object("metrics")) if fields.has("metrics") else None,
        "tokens": read_tokens(fields, "tokens"),
        "rounds": rounds,
    }


def acceptance_of(rounds: Sequence[Record]) -> str | None:
    """The rule that a request asked for, where its file says it with its rounds alone; None where nothing was
    drafted."""
    return next((round_["asked"] for round_ in rounds if round_["num_draft"]), None)


def read_finish_reason(fields: Fields) -> str | None:
    return fields.text("finish_reason") if fields.has("finish_reason") else None


def read_metrics(fields: Fields) -> Record:
    found: Record = {name: fields.count(name) for name in NUMBERS}
    found["mean_acceptance_length"] = fields.number("mean_acceptance_length")
    found["acceptance_histogram"] = fields.counts("acceptance_histogram")
    found |= {name: fields.counts_by_name(name) if fields.has(name) else {} for name in BY_NAME}
    found |= {name: fields.count(name) if fields.has(name) else None for name in SIZES}
    found |= {name: fields.number(name) if fields.has(name) else None for name in TIMES}
    return found | {"exact_because": fields.text("exact_because") if fields.has("exact_because") else None}


def read_tokens(fields: Fields, name: str) -> list[Record]:
    """The tokens of a list, whose rounds go on one by one."""
    if (num_tokens := len(fields.items(name))) > MAX_TOKENS:
        raise ConfigError(f"{fields.where}.{name}: {num_tokens} tokens, a page shows {MAX_TOKENS} at most")
    tokens = [read_token(token) for token in fields.objects(name)]
    last = -1
    for at, token in enumerate(tokens):
        if token["round"] not in (last, last + 1) or token["round"] < 0:
            raise ConfigError(
                f"{fields.where}.{name}[{at}].round: got {token['round']} after {last}, expected the same or one more"
            )
        last = token["round"]
    return tokens


def read_token(fields: Fields) -> Record:
    return {
        "token": fields.text("token"),
        "token_id": fields.count("token_id"),
        "bytes": fields.counts("bytes", most=255) if fields.has("bytes") else None,
        "kind": fields.one_of("kind", KINDS),
        "source": fields.text("source") if fields.has("source") else None,
        "round": fields.count("round"),
        "entropy": fields.number("entropy") if fields.has("entropy") else None,
        "choice": fields.count("choice"),
        "choice_token": fields.text("choice_token"),
        "rejected": _read_named(fields.object("rejected")) if fields.has("rejected") else None,
        "reason": fields.text("reason") if fields.has("reason") else "",
        "gate": fields.number("gate") if fields.has("gate") else None,
        "num_agreed": fields.count("num_agreed") if fields.has("num_agreed") else None,
        "guard": fields.text("guard") if fields.has("guard") else None,
        "top": [_read_top(top) for top in fields.objects("top")] if fields.has("top") else [],
    }


def read_rounds(fields: Fields, name: str) -> list[Record]:
    """What is known of rounds as such; nothing where the list is missing, as older traces have it."""
    if not fields.has(name):
        return []
    rounds = [_read_round(round_) for round_ in fields.objects(name)]
    if [round_["number"] for round_ in rounds] != list(range(len(rounds))):
        raise ConfigError(f"{fields.where}.{name}: numbers with gaps, expected 0, 1 and so on")
    return rounds


def _read_round(fields: Fields) -> Record:
    return {
        **{name: fields.count(name) for name in ("number", "num_draft", "num_accepted", "num_loosened")},
        **{name: fields.text(name) for name in ("asked", "policy")},
        "rejected": [_read_named(token) for token in fields.objects("rejected")],
        **{name: fields.count(name) for name in ("num_steps", "num_rows")},
        **{name: fields.number(name) for name in ("draft_seconds", "verification_seconds")},
    }


def _read_named(fields: Fields) -> Record:
    return {"token": fields.text("token"), "token_id": fields.count("token_id")}


def _read_top(fields: Fields) -> Record:
    return _read_named(fields) | {"logprob": fields.number("logprob")}


def check_size(requests: Sequence[Record], where: str) -> None:
    """Raises ConfigError where there is nothing to show, or too much."""
    num_tokens = sum(len(request["tokens"]) for request in requests)
    if not num_tokens:
        raise ConfigError(f"{where}: no tokens: expected the trace of at least one request")
    if num_tokens > MAX_TOKENS:
        raise ConfigError(f"{where}: {num_tokens} tokens, a page shows {MAX_TOKENS} at most: give fewer requests")


def merged(documents: Sequence[Record]) -> Record:
    """All requests as one document. Groups stay those of their own documents."""
    found = []
    for number, document in enumerate(documents):
        for request in document["requests"]:
            is_grouped = len(documents) > 1 and request["group"] is not None
            found.append(request | {"group": f"{number}: {request['group']}"} if is_grouped else request)
    check_size(found, "all together")
    return new_document(found)
