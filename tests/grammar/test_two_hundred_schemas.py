"""Two hundred schemas, greedy and sampled, exact and loose, eight in flight: what is finished parses and is valid.

The demo pair knows no JSON: it writes whatever the schemas let it.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from structured_schemas import KINDS, NUM_OF_KIND, Case, draw_cases

from fly_trt import LLM, AcceptanceParams, RequestOutput, SamplingParams
from fly_trt.errors import RequestError
from fly_trt.grammar import StructuredOutputs

CASES = draw_cases()
FORMATS = FormatChecker(["ipv4", "ipv6", "uuid"])  # the library looks at others in its own way, or not at all
MODES: dict[str, tuple[str, str]] = {
    "exact": ("multi_level", "exact"),
    "fly": ("multi_level", "fly"),
    "ngram": ("ngram", "exact"),
}
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.9, "seed": 17}}
# Some numbers have no end of digits and some lists no end of lists: a model that knows no JSON may go on and on.
LEAST_FINISHED = 0.8
REFUSED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "nothing fits": {"type": "integer", "minimum": 5, "maximum": 4},
    "lookahead": {"type": "string", "pattern": "^(?=a)b"},
    "unknown reference": {"$ref": "#/$defs/missing"},
    "unknown type": {"type": "text"},
}


def params_of(case: Case, acceptance: str, settings: dict[str, Any], max_tokens: int = 400) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        acceptance=AcceptanceParams(acceptance=acceptance),
        structured_outputs=StructuredOutputs(json=case.schema, disable_any_whitespace=case.is_compact),
        **settings,
    )


def serve(llm: LLM, cases: list[Case], acceptance: str, settings: dict[str, Any]) -> list[RequestOutput]:
    """All at once: as many as there are slots are in flight."""
    prompts = [f"### Instruction:\nFill in {case.name}.\n### Response:\n" for case in cases]
    return llm.generate(prompts, [params_of(case, acceptance, settings) for case in cases], use_tqdm=False)


def problems(cases: list[Case], outputs: list[RequestOutput]) -> list[str]:
    """What is wrong with the answers that are finished."""
    found = []
    for case, output in zip(cases, outputs, strict=True):
        answer = output.outputs[0]
        if answer.finish_reason != "stop":
            continue
        try:
            value = json.loads(answer.text)
        except ValueError as error:
            found.append(f"{case.name}: {answer.text!r} is no JSON: {error}")
            continue
        errors = Draft202012Validator(case.schema, format_checker=FORMATS).iter_errors(value)
        found += [f"{case.name}: {answer.text!r}: {error.message}" for error in errors]
    return found


def share_finished(outputs: list[RequestOutput]) -> float:
    return sum(output.outputs[0].finish_reason == "stop" for output in outputs) / len(outputs)


def test_the_schemas_are_two_hundred_different_ones() -> None:
    assert len(CASES) == len(KINDS) * NUM_OF_KIND == 200
    assert len({json.dumps(case.schema) for case in CASES}) == 200
    assert Counter(case.is_compact for case in CASES) == {True: 100, False: 100}
    for case in CASES:
        Draft202012Validator.check_schema(case.schema)


def check(
    directory: Path,
    asked: dict[str, list[Case]],
    mode: str,
    *,
    least_finished: float = LEAST_FINISHED,
    compares: bool = False,
) -> None:
    """asked: by the names of SAMPLING. compares: exact answers are those of plain decoding."""
    method, acceptance = MODES[mode]
    tokens: dict[str, list[list[int]]] = {}
    with LLM(directory, max_batch_size=8, speculative_config={"method": method}) as llm:
        for name, cases in asked.items():
            outputs = serve(llm, cases, acceptance, SAMPLING[name])
            assert problems(cases, outputs) == []
            print(f"{mode}, {name}: {share_finished(outputs):.1%} of {len(cases)} finished")
            assert share_finished(outputs) >= least_finished
            forced = [output.metrics.num_accepted_tokens_by_source.get("grammar", 0) for output in outputs]
            assert sum(forced) > len(cases)
            tokens[name] = [output.outputs[0].token_ids for output in outputs]
    if not compares:
        return
    with LLM(directory, max_batch_size=8, speculative_config={"method": None}) as llm:
        for name, cases in asked.items():
            plain = [output.outputs[0].token_ids for output in serve(llm, cases, acceptance, SAMPLING[name])]
            different = [case.name for case, a, b in zip(cases, tokens[name], plain, strict=True) if a != b]
            assert different == []


@pytest.mark.parametrize("mode", MODES)
def test_finished_answers_to_a_schema_of_each_kind_are_valid(demo_engine: Path, mode: str) -> None:
    """Each mode has a third of the kinds, of which each is greedy or sampled."""
    first = list(MODES).index(mode)
    cases = CASES[first * NUM_OF_KIND + first :: len(MODES) * NUM_OF_KIND]
    check(demo_engine, {"greedy": cases[::2], "sampled": cases[1::2]}, mode, least_finished=0.6)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_finished_answers_to_all_schemas_are_valid(demo_engine: Path, mode: str) -> None:
    check(demo_engine, dict.fromkeys(SAMPLING, CASES), mode, compares=MODES[mode][1] == "exact")


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_cannot_be_followed_is_refused_in_one_line(demo_llm: LLM, name: str) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs.json: .*") as caught:
        demo_llm.generate("x", SamplingParams(structured_outputs=StructuredOutputs(json=REFUSED[name])), use_tqdm=False)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def demo_llm(demo_engine: Path) -> LLM:
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        yield llm
