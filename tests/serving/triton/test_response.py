"""The runtime's outputs become the tensors that TensorRT-LLM's clients read."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fly_trt import RequestOutputKind, SamplingParams
from fly_trt.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput
from fly_trt.serving.triton.request import ClientRequest, ResponseWriter
from fly_trt.serving.triton.tensors import OUTPUTS

TOKENIZER = Tokenizer.from_file(str(Path(__file__).parents[2] / "assets" / "pair" / "target" / "tokenizer.json"))
PROMPT = "Tell me"
PROMPT_IDS = list(TOKENIZER.encode(PROMPT).ids)
DTYPES = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_FP32": np.float32}
WITHOUT_BATCH_DIMENSION = ("text_output", "finish_reason", "exact_because")
COUNTS = {
    "num_input_tokens",
    "num_output_tokens",
    "acceptance_rate",
    "total_draft_tokens",
    "total_accepted_draft_tokens",
    "total_loosened_tokens",
    "total_saved_tokens",
    "total_refused_loosenings",
    "guards",
}
METRICS = RequestMetrics(
    num_draft_tokens=40,
    num_accepted_tokens=30,
    num_loosened_tokens=5,
    num_saved_tokens=11,
    num_refused_loosenings_by_guard={"exact_first": 2, "max_loosened_per_100": 1},
    guards={"exact_first": 4, "max_loosened_per_100": 5},
    num_output_tokens=36,
)


def writer(n: int = 1, *, stream: bool = False, log_probs: bool = False, **settings: Any) -> ResponseWriter:
    params = SamplingParams(
        n=n,
        temperature=1.0,
        logprobs=0 if log_probs else None,
        output_kind=RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY,
    )
    return ResponseWriter(ClientRequest(prompt=PROMPT, params=params, **settings), TOKENIZER)


def completion(
    index: int,
    text: str,
    ids: list[int],
    finish_reason: FinishReason | None = None,
    logprobs: list[float] | None = None,
) -> CompletionOutput:
    """logprobs: of the tokens themselves; another, more probable one is reported with each."""
    entries = None
    if logprobs is not None:
        entries = [{999: Logprob(-0.01, 1, "x"), i: Logprob(p, 2, "y")} for i, p in zip(ids, logprobs, strict=True)]
    return CompletionOutput(index, text, ids, logprobs=entries, finish_reason=finish_reason)


def output(
    *completions: CompletionOutput,
    finished: bool = True,
    prompt: str | None = PROMPT,
    metrics: RequestMetrics = METRICS,
) -> RequestOutput:
    return RequestOutput("7", prompt, PROMPT_IDS, list(completions), metrics, finished)


def texts(tensors: dict[str, Any]) -> list[str]:
    return [text.decode() for text in tensors["text_output"]]


def reasons(tensors: dict[str, Any]) -> list[str]:
    return [reason.decode() for reason in tensors["finish_reason"]]


def test_one_sequence_is_text_ids_and_length_with_the_counts() -> None:
    tensors = writer().tensors(output(completion(0, "naïve ✓", [5, 6, 7], "stop")))
    assert texts(tensors) == ["naïve ✓"]
    assert tensors["output_ids"].tolist() == [[[5, 6, 7]]]
    assert tensors["sequence_length"].tolist() == [[3]]
    assert reasons(tensors) == ["stop"]
    assert tensors["exact_because"].tolist() == [b""]
    assert {name: tensors[name].tolist() for name in COUNTS} == {
        "num_input_tokens": [[len(PROMPT_IDS)]],
        "num_output_tokens": [[36]],
        "acceptance_rate": [[0.75]],
        "total_draft_tokens": [[40]],
        "total_accepted_draft_tokens": [[30]],
        "total_loosened_tokens": [[5]],
        "total_saved_tokens": [[11]],
        "total_refused_loosenings": [[3]],
        "guards": [[b'{"exact_first": 4, "max_loosened_per_100": 5}']],
    }


def test_an_answer_that_the_breaker_made_exact_says_so() -> None:
    metrics = RequestMetrics(exact_because="breaker")
    tensors = writer().tensors(output(completion(0, "abc", [5, 6, 7], "stop"), metrics=metrics))
    assert tensors["exact_because"].tolist() == [b"breaker"]


def test_without_drafts_the_acceptance_rate_is_0() -> None:
    metrics = RequestMetrics(num_output_tokens=3)
    tensors = writer().tensors(output(completion(0, "abc", [5, 6, 7], "length"), metrics=metrics))
    assert tensors["acceptance_rate"].tolist() == [[0.0]]
    assert tensors["num_output_tokens"].tolist() == [[3]]


def test_shorter_ones_of_several_sequences_are_filled_with_the_pad_id() -> None:
    tensors = writer(3, pad_id=9).tensors(
        output(
            completion(0, "a", [5], "stop"), completion(1, "abc", [5, 6, 7], "length"), completion(2, "", [], "stop")
        )
    )
    assert texts(tensors) == ["a", "abc", ""]
    assert tensors["output_ids"].tolist() == [[[5, 9, 9], [5, 6, 7], [9, 9, 9]]]
    assert tensors["sequence_length"].tolist() == [[1, 3, 0]]
    assert reasons(tensors) == ["stop", "length", "stop"]


def test_sequences_stand_by_their_index_whatever_their_order() -> None:
    tensors = writer(2).tensors(output(completion(1, "b", [6], "stop"), completion(0, "aa", [5, 5], "length")))
    assert texts(tensors) == ["aa", "b"]
    assert tensors["output_ids"].tolist() == [[[5, 5], [6, 0]]]
    assert reasons(tensors) == ["length", "stop"]


def test_the_prompt_precedes_every_sequence_where_it_is_asked_for() -> None:
    sequences = completion(0, " a", [5], "stop"), completion(1, " bb", [6, 7], "stop")
    tensors = writer(2, includes_input=True, pad_id=9).tensors(output(*sequences))
    assert texts(tensors) == ["Tell me a", "Tell me bb"]
    assert tensors["output_ids"].tolist() == [[[*PROMPT_IDS, 5, 9], [*PROMPT_IDS, 6, 7]]]
    assert tensors["sequence_length"].tolist() == [[len(PROMPT_IDS) + 1, len(PROMPT_IDS) + 2]]
    assert tensors["num_input_tokens"].tolist() == [[len(PROMPT_IDS)]]


def test_a_prompt_of_token_ids_precedes_as_the_text_that_they_are() -> None:
    tensors = writer(includes_input=True).tensors(output(completion(0, " a", [5], "stop"), prompt=None))
    assert texts(tensors) == ["Tell me a"]
    assert tensors["output_ids"].tolist() == [[[*PROMPT_IDS, 5]]]


def test_log_probs_are_of_the_output_tokens_alone_also_with_the_prompt() -> None:
    sequences = completion(0, " a", [5], "stop", [-0.5]), completion(1, " bb", [6, 7], "stop", [-1.0, -0.25])
    for includes_input in (False, True):
        asked = writer(2, log_probs=True, includes_input=includes_input, pad_id=9)
        tensors = asked.tensors(output(*sequences))
        assert tensors["output_log_probs"].tolist() == [[[-0.5, 0.0], [-1.0, -0.25]]]
        assert tensors["cum_log_probs"].tolist() == [[-0.5, -1.25]]


def test_log_probs_come_only_where_they_are_asked_for() -> None:
    tensors = writer().tensors(output(completion(0, "a", [5], "stop")))
    assert not {"output_log_probs", "cum_log_probs"} & tensors.keys()


def test_a_stream_holds_what_is_new_and_the_counts_come_with_the_last_output() -> None:
    stream = writer(stream=True)
    first = stream.tensors(output(completion(0, "ab", [5, 6]), finished=False))
    second = stream.tensors(output(completion(0, "", [7]), finished=False))
    last = stream.tensors(output(completion(0, "c", [8], "stop")))
    assert [texts(tensors) for tensors in (first, second, last)] == [["ab"], [""], ["c"]]
    assert [tensors["output_ids"].tolist() for tensors in (first, second, last)] == [[[[5, 6]]], [[[7]]], [[[8]]]]
    assert [tensors["sequence_length"].tolist() for tensors in (first, second, last)] == [[[2]], [[1]], [[1]]]
    only_last = COUNTS | {"finish_reason"}
    assert not only_last & (first.keys() | second.keys())
    assert only_last <= last.keys()


def test_a_sequence_of_a_stream_that_did_not_change_is_empty() -> None:
    tensors = writer(3, stream=True, pad_id=9).tensors(output(completion(1, "ab", [5, 6]), finished=False))
    assert texts(tensors) == ["", "ab", ""]
    assert tensors["output_ids"].tolist() == [[[9, 9], [5, 6], [9, 9]]]
    assert tensors["sequence_length"].tolist() == [[0, 2, 0]]


def test_cumulative_log_probs_of_a_stream_count_from_its_start() -> None:
    stream = writer(2, stream=True, log_probs=True)
    first = stream.tensors(
        output(completion(0, "ab", [5, 6], None, [-0.5, -0.25]), completion(1, "a", [5], None, [-1.0]), finished=False)
    )
    second = stream.tensors(output(completion(1, "b", [6], "stop", [-2.0]), finished=False))
    last = stream.tensors(output(completion(0, "c", [7], "stop", [-0.125])))
    found = [tensors["output_log_probs"].tolist() for tensors in (first, second, last)]
    assert found == [[[[-0.5, -0.25], [-1.0, 0.0]]], [[[0.0], [-2.0]]], [[[-0.125], [0.0]]]]
    cumulative = [tensors["cum_log_probs"].tolist() for tensors in (first, second, last)]
    assert cumulative == [[[-0.75, -1.0]], [[-0.75, -3.0]], [[-0.875, -3.0]]]


def test_the_last_output_tells_how_every_sequence_ended() -> None:
    stream = writer(3, stream=True)
    stream.tensors(output(completion(2, "x", [5], "length"), completion(0, "y", [6]), finished=False))
    stream.tensors(output(completion(1, "z", [7], "stop"), completion(0, "y", [6]), finished=False))
    assert reasons(stream.tensors(output(completion(0, "", [], "stop")))) == ["stop", "stop", "length"]


def _check_declared(tensors: dict[str, np.ndarray], n: int) -> None:
    specs = {spec.name: spec for spec in OUTPUTS}
    for name, array in tensors.items():
        dims = specs[name].dims if name in WITHOUT_BATCH_DIMENSION else (1, *specs[name].dims)
        assert array.dtype == DTYPES[specs[name].data_type], name
        assert array.ndim == len(dims), name
        assert all(size == dim for size, dim in zip(array.shape, dims, strict=True) if dim != -1), name
    for name in ("text_output", "finish_reason"):
        if name in tensors:
            assert tensors[name].shape == (n,)
            assert all(type(text) is bytes for text in tensors[name])
    assert tensors["sequence_length"].shape == (1, n)
    assert tensors["output_ids"].shape == (1, n, tensors["sequence_length"].max())
    if "cum_log_probs" in tensors:
        assert tensors["cum_log_probs"].shape == (1, n)
        assert tensors["output_log_probs"].shape[:2] == (1, n)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("includes_input", [False, True])
def test_a_final_output_has_every_declared_tensor_in_its_type_and_shape(n: int, includes_input: bool) -> None:
    sequences = [completion(i, "a" * i, [5] * i, "stop", [-0.5] * i) for i in range(n)]
    tensors = writer(n, log_probs=True, includes_input=includes_input).tensors(output(*sequences))
    assert tensors.keys() == {spec.name for spec in OUTPUTS}
    _check_declared(tensors, n)


@given(st.data())
def test_the_pieces_of_any_stream_put_together_are_the_final_output(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 4))
    lengths = st.lists(st.integers(0, 3), min_size=1, max_size=5)
    pieces = [data.draw(lengths) for _ in range(n)]
    stream, last = writer(n, stream=True, log_probs=True, pad_id=9), {}
    got: list[list[int]] = [[] for _ in range(n)]
    got_texts = [""] * n
    num_steps = max(map(len, pieces))
    for step in range(num_steps):
        changed = []
        for index, sizes in enumerate(pieces):
            if step < len(sizes):
                ids, size = [10 * step + 1] * sizes[step], sizes[step]
                reason: FinishReason | None = "stop" if step == len(sizes) - 1 else None
                changed.append(completion(index, "x" * size, ids, reason, [-0.5] * size))
        last = stream.tensors(output(*changed, finished=step == num_steps - 1))
        _check_declared(last, n)
        for index in range(n):
            length = last["sequence_length"][0, index]
            got[index] += last["output_ids"][0, index, :length].tolist()
            assert (last["output_ids"][0, index, length:] == 9).all()
            got_texts[index] += texts(last)[index]
    want = [[10 * step + 1 for step, size in enumerate(sizes) for _ in range(size)] for sizes in pieces]
    assert got == want
    assert got_texts == ["x" * len(ids) for ids in want]
    assert last["cum_log_probs"].tolist() == [[-0.5 * len(ids) for ids in want]]
    assert reasons(last) == ["stop"] * n
