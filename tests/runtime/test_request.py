"""How one sequence ends: the reason fits the text, also where the text is known only at the end."""

import pytest
from tokenizers import Tokenizer, decoders, models

from fly_trt.runtime.request import Request
from fly_trt.text.tokenizer import Detokenizer
from loop_stack import make_request
from table_engine import STOP_TOKEN

A, HIGH, LOW, WORD, OWN_STOP = 5, 6, 7, 8, 9
BYTES = {"<0x61>": A, "<0xC3>": HIGH, "<0xA9>": LOW}
"""A run of these is no text before it has ended: "é" is HIGH, LOW."""


def byte_fallback_tokenizer() -> Tokenizer:
    names = [f"<{token}>" for token in range(10)]
    for name, token in BYTES.items():
        names[token] = name
    names[WORD] = " word"
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<0>"))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def serve(tokens: list[int], **settings: object) -> Request:
    request = make_request([2], **settings)
    request.detokenizer = Detokenizer(
        byte_fallback_tokenizer(),
        [2],
        stop_strings=request.params.stop_strings,
        include_stop_string=request.params.include_stop_str_in_output,
    )
    request.commit(tokens)
    return request


def end_of(request: Request) -> tuple[str, str | None, str | int | None]:
    return request.detokenizer.text, request.finish_reason, request.stop_reason


def test_a_stop_string_that_the_last_tokens_complete_is_the_reason() -> None:
    tokens = [A, HIGH, LOW]
    assert end_of(serve(tokens, max_tokens=3, stop="é")) == ("a", "stop", "é")
    assert end_of(serve(tokens, max_tokens=3, stop="é", include_stop_str_in_output=True)) == ("aé", "stop", "é")
    assert end_of(serve(tokens, max_tokens=3, stop="b")) == ("aé", "length", None)
    assert end_of(serve([WORD, HIGH], max_tokens=2, stop="é")) == (" word�", "length", None)


@pytest.mark.parametrize(("end", "settings"), [(STOP_TOKEN, {}), (OWN_STOP, {"stop_token_ids": [OWN_STOP]})])
@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_before_an_end_token_is_the_reason(end: int, settings: dict, include: bool) -> None:
    tokens, settings = [A, HIGH, LOW, end], settings | {"include_stop_str_in_output": include}
    assert end_of(serve(tokens, stop="é", **settings)) == ("aé" if include else "a", "stop", "é")
    text, reason, stop_reason = end_of(serve(tokens, stop="b", **settings))
    assert text == ("aé" + (f"<{end}>" if include else ""))
    assert (reason, stop_reason) == ("stop", end if end == OWN_STOP else None)


def test_a_stop_string_within_min_tokens_is_no_reason_however_late_its_text_is_known() -> None:
    tokens = [A, HIGH, LOW]
    assert end_of(serve(tokens, max_tokens=3, min_tokens=3, stop="é")) == ("aé", "length", None)
    assert end_of(serve(tokens, max_tokens=3, min_tokens=2, stop="é")) == ("a", "stop", "é")


def test_what_was_aborted_stays_aborted_and_keeps_its_text() -> None:
    request = serve([A, HIGH, LOW], stop="é")
    assert not request.is_finished
    request.finish("abort")
    assert end_of(request) == ("aé", "abort", None)
