"""Whatever has written a trace, it becomes the same document; what is none is refused in one line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from fly_trt import LLM, RequestOutputKind, SamplingParams
from fly_trt.errors import ConfigError, RequestError
from fly_trt.inspection import read_traces, save_trace
from fly_trt.inspection.document import COUNTS, FORMAT, VERSION, merged
from fly_trt.inspection.fields import read_json
from fly_trt.inspection.sources import MAX_BYTES, parse_traces
from fly_trt.outputs import RequestMetrics, RequestOutput
from trace_documents import as_bytes, document_of, request_of, token_of

CHOICE = {"index": 0, "finish_reason": "stop", "speculation_trace": [token_of(token="one"), token_of(token="two")]}
SPECULATION = {
    "mean_acceptance_length": 1.5,
    "num_draft_tokens": 4,
    "num_accepted_draft_tokens": 1,
    "num_spec_steps": 2,
    "acceptance_histogram": [1, 1],
}
METRICS = {
    "speculative_decoding": SPECULATION,
    "acceptance": "fly",
    "num_loosened_tokens": 1,
    "num_saved_tokens": 1,
    "num_draft_tokens_by_source": {"model": 4},
    "num_accepted_tokens_by_source": {"model": 1},
}
ANSWER = {"id": "cmpl-1", "model": "demo", "metrics": METRICS, "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
GENERATED = {
    "prompt": "p",
    "text": "ab",
    "token_ids": [5, 5],
    "finish_reason": "stop",
    "trace": [token_of(), token_of()],
}


def parsed(value: Any) -> dict[str, Any]:
    return parse_traces(value if isinstance(value, bytes) else as_bytes(value), "file")


def one(value: Any) -> dict[str, Any]:
    (request,) = parsed(value)["requests"]
    return request


def texts(request: dict[str, Any]) -> list[str]:
    return [token["token"] for token in request["tokens"]]


def refused(value: Any) -> str:
    with pytest.raises(ConfigError) as found:
        parsed(value)
    message = str(found.value)
    assert "\n" not in message
    assert message.startswith("file")
    assert len(message) < 500
    return message


def test_what_llm_saves_is_all_that_the_outputs_say(llm: LLM, loose: RequestOutput, tmp_path: Path) -> None:
    save_trace(loose, tmp_path / "trace.json", llm.tokenizer, name="asked")
    document = read_traces(tmp_path / "trace.json")
    assert (document["format"], document["version"]) == (FORMAT, VERSION)
    (request,) = document["requests"]
    completion = loose.outputs[0]
    assert completion.trace is not None
    assert completion.rounds is not None
    assert request["name"] == f"asked {loose.request_id}"
    assert (request["prompt"], request["text"]) == (loose.prompt, completion.text)
    assert (request["source"], request["acceptance"]) == ("LLM", "fly")
    assert request["metrics"] == {name: getattr(loose.metrics, name) for name in COUNTS}
    for token, token_id, how in zip(request["tokens"], completion.token_ids, completion.trace, strict=True):
        assert token["token_id"] == token_id
        assert token["token"] == llm.tokenizer.decode([token_id], skip_special_tokens=False)
        for name in ("kind", "source", "round", "entropy", "choice", "reason", "gate", "num_agreed", "guard"):
            assert token[name] == getattr(how, name)
        assert [(top["token_id"], top["logprob"]) for top in token["top"]] == how.top
        assert (token["rejected"] or {}).get("token_id") == how.rejected
    for record, round_ in zip(request["rounds"], completion.rounds, strict=True):
        assert [token["token_id"] for token in record.pop("rejected")] == round_.rejected
        assert record == {name: value for name, value in round_._asdict().items() if name != "rejected"}


def test_requests_with_the_same_prompt_are_a_group(saved: dict[str, Any]) -> None:
    groups = [request["group"] for request in saved["requests"]]
    assert groups[0] == groups[1] is not None


def test_an_output_without_a_trace_is_refused(llm: LLM, tmp_path: Path) -> None:
    (output,) = llm.generate("x")
    with pytest.raises(RequestError, match="speculation_trace=True"):
        save_trace(output, tmp_path / "trace.json", llm.tokenizer)
    params = SamplingParams(max_tokens=30, speculation_trace=True, output_kind=RequestOutputKind.DELTA)
    *_, last = llm.stream("x", params)
    with pytest.raises(RequestError, match="not DELTA"):
        save_trace(last, tmp_path / "trace.json", llm.tokenizer)
    assert not list(tmp_path.iterdir())


def test_a_document_read_twice_is_the_same(saved: dict[str, Any]) -> None:
    assert parsed(saved) == saved


def test_what_fly_generate_prints() -> None:
    counts = {name: getattr(RequestMetrics(), name) for name in COUNTS}
    request = one(GENERATED | {"metrics": counts})
    assert (texts(request), request["prompt"], request["text"]) == (["x", "x"], "p", "ab")
    compared = {"text": "other", "token_ids": [5], "trace": [token_of(token="y")], "metrics": counts}
    first, second = parsed(GENERATED | {"metrics": counts, "compared": compared})["requests"]
    assert first["group"] == second["group"] is not None
    assert (texts(second), second["prompt"]) == (["y"], "p")


def test_what_fly_serve_answers() -> None:
    request = one(ANSWER | {"choices": [CHOICE | {"text": "onetwo"}]})
    assert (texts(request), request["text"], request["name"]) == (["one", "two"], "onetwo", "demo cmpl-1")
    assert (request["source"], request["acceptance"], request["finish_reason"]) == ("fly-serve", "fly", "stop")
    assert request["metrics"]["num_accepted_tokens"] == 1
    assert request["metrics"]["num_output_tokens"] == 2
    assert request["metrics"]["num_saved_tokens"] == 1
    assert request["metrics"]["latency"] is None
    chat = one(ANSWER | {"choices": [CHOICE | {"message": {"role": "assistant", "content": "onetwo"}}]})
    assert chat == request
    called = one(ANSWER | {"choices": [CHOICE | {"message": {"role": "assistant", "content": None}}]})
    assert called["text"] == ""
    many = parsed(ANSWER | {"choices": [CHOICE | {"text": "a"}, CHOICE | {"text": "b", "index": 1}]})["requests"]
    assert [each["name"] for each in many] == ["demo cmpl-1 #0", "demo cmpl-1 #1"]
    assert [each["metrics"] for each in many] == [None, None]  # they are of both together
    without = one({"choices": [CHOICE | {"text": "onetwo"}]})
    assert (without["metrics"], without["acceptance"], without["name"]) == (None, None, "fly-serve")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_saved_stream_is_the_same_as_the_whole_answer(end: str, is_chat: bool) -> None:
    trace = CHOICE["speculation_trace"]
    assert isinstance(trace, list)
    pieces = [("one", trace[:1], None), ("two", trace[1:], "stop")]
    chunks = [
        {
            "id": "cmpl-1",
            "model": "demo",
            "choices": [
                {"index": 0, "finish_reason": reason, "speculation_trace": part}
                | ({"delta": {"content": text}} if is_chat else {"text": text})
            ],
        }
        for text, part, reason in pieces
    ]
    chunks.append(ANSWER | {"choices": []})
    lines = [": comment", *(f"data: {json.dumps(chunk)}{end}" for chunk in chunks), f"data: [DONE]{end}", ""]
    stream = end.join(lines).encode()
    assert one(stream) == one(ANSWER | {"choices": [CHOICE | {"text": "onetwo"}]})
    broken = stream[: stream.index(b"data", stream.index(b"data") + 4)]
    assert texts(one(broken)) == ["one"]


def test_lines_and_lists_and_several_files_are_one_document() -> None:
    documents = [document_of({"token": str(number)}, group="g") for number in range(3)]
    lines = b"\n".join(as_bytes(document) for document in documents) + b"\n"
    for value in (lines, documents, b"\xef\xbb\xbf" + lines):
        assert [texts(request) for request in parsed(value)["requests"]] == [["0"], ["1"], ["2"]]
    together = merged([parsed(documents[0]), parsed(documents[1]), parsed(document_of({}))])
    assert [request["group"] for request in together["requests"]] == ["0: g", "1: g", None]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "not a trace"),
        (b'{"a": ' * 100_000, "not a trace"),
        (b"[" + b"1" * 10_000 + b"]", "not JSON"),
        (b'{"format": NaN}', "NaN"),
        (b"[1]", "[0]: got 1, expected an object"),
        (b"{}\n{}", "line 1"),
        (b"[]", "no tokens"),
        (b"null", "expected an object"),
        (b"data: {\n\n", "line 1: not JSON"),
        (b'data: {"error": {"message": "x"}}\n\n', "error that a server answered"),
        (b"data: [DONE]\n\n", "no tokens"),
        ({"error": {"message": "x"}}, "error that a server answered"),
        ({}, "without format, choices or token_ids"),
        ({"format": "other"}, "format: got"),
        (document_of({}) | {"version": 2}, "version 2"),
        (document_of({}) | {"requests": {}}, "requests: got an object, expected a list"),
        ({"choices": [{"index": 0, "text": ""}]}, "speculation_trace"),
        ({"token_ids": [1], "trace": None}, "--trace"),
        (document_of({"kind": "magic"}), 'tokens[0].kind: got "magic", expected one of matched'),
        (document_of({"token": 3}), "token: got 3, expected a text"),
        (document_of({"round": 1}), "round: got 1 after -1"),
        (document_of({"round": 0}, {"round": 2}), "round: got 2 after 0"),
        (document_of({"entropy": "1"}), "entropy"),
        (document_of({"entropy": True}), "entropy"),
        (document_of({"token_id": -1}), "token_id"),
        (document_of({"token_id": 1.5}), "token_id"),
        (document_of({"bytes": [256]}), "bytes"),
        (document_of({"top": {}}), "top"),
        (document_of({}, rounds=[{"number": 3}]), "rounds[0].num_draft"),
        (document_of({}, metrics={}), "metrics.num_draft_tokens: got nothing"),
        (document_of({}, prompt="x" * 10, name="y" * 1000, source="z" * 1000), "source: got"),
        (document_of({}) | {"requests": [{**request_of(), "tokens": [0] * 210_000}]}, "210000 tokens"),
    ],
)
def test_what_is_no_trace_is_refused_in_one_line(value: Any, said: str) -> None:
    assert said in refused(value)


def test_requests_that_are_too_many_together_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fly_trt.inspection.document.MAX_TOKENS", 3)
    assert "4 tokens" in refused([document_of({}, {}), document_of({}, {})])
    with pytest.raises(ConfigError, match="4 tokens"):
        merged([parsed(document_of({}, {})), parsed(document_of({}, {}))])


def test_numbers_that_json_has_and_a_page_could_not_show_are_refused() -> None:
    for number in ("1e999", "1e300", "9" * 40):
        document = json.dumps(document_of({"entropy": 1})).replace('"entropy": 1', f'"entropy": {number}')
        assert "entropy" in refused(document.encode())
    with pytest.raises(ConfigError, match="more than 256 MiB"):
        parse_traces(bytes(MAX_BYTES + 1), "file")


def test_whatever_is_changed_in_a_document_it_is_read_or_refused() -> None:
    """Any JSON in the place of any value."""
    anything = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    document = json.dumps(document_of({"top": [{"token": "a", "token_id": 1, "logprob": -1.0}]}, acceptance="fly"))

    @examples(60)
    @given(value=anything, at=st.integers(0, 40))
    def check(value: Any, at: int) -> None:
        copy = json.loads(document)
        places = list(_places(copy))
        holder, key = places[at % len(places)]
        holder[key] = value
        message = ""
        try:
            parse_traces(json.dumps(copy).encode(), "file")
        except ConfigError as error:
            message = str(error)
        assert "\n" not in message

    check()


def _places(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from _places(inner)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match=str(path)):
            read_traces(path)


def test_json_is_what_the_standard_says() -> None:
    assert read_json('{"a": [1, -2.5, "\\ud800", null]}', "x") == {"a": [1, -2.5, "\ud800", None]}
