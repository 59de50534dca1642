"""Structured output on the demo pair: what LLM, AsyncLLM and fly-generate return has the form that was asked for."""

import asyncio
import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, AsyncLLM, ConfigError, RequestError, SamplingParams, StructuredOutputs
from fly_trt.cli.generate import main
from fly_trt.grammar import GrammarCompiler, compiler

PROMPTS = [record["prompt"] for record in load_eval_prompts()[::80]]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 120}, "maxItems": 4},
        "kind": {"enum": ["cat", "dog", None]},
        "next": {"anyOf": [{"type": "null"}, {"type": "boolean"}]},
    },
    "required": ["name", "numbers", "kind"],
    "additionalProperties": False,
}
CHOICES = ["twenty-one", "Twenty one", "21", "é\n😀"]
FORMS: dict[str, dict[str, Any]] = {
    "json": {"json": SCHEMA},
    "compact": {"json": SCHEMA, "disable_any_whitespace": True},
    "own white space": {"json": SCHEMA, "whitespace_pattern": " {1,2}"},
    "object": {"json_object": True},
    "regex": {"regex": "[a-z]{2,8}( [0-9]{1,3}){2}"},
    "choice": {"choice": CHOICES},
    "lark": {"grammar": 'start: "(" start ")" | /[0-9]{1,3}/'},
    "gbnf": {"grammar": 'root ::= item ("," item)*\nitem ::= [a-z]+'},
}
POLICIES = ["exact", "fly", "cactus", "relaxed"]  # all of them are held against forms in the loop


@pytest.fixture(scope="module")
def llm(demo_engine: Path) -> Any:
    with LLM(demo_engine) as serving:
        yield serving


def params(form: str, acceptance: str = "exact", **settings: Any) -> SamplingParams:
    return SamplingParams(
        structured_outputs=FORMS[form],
        acceptance=AcceptanceParams(acceptance=acceptance),
        **{"max_tokens": 64, "seed": 3} | settings,
    )


def has_form(form: str, text: str) -> bool:
    if form in ("json", "compact", "own white space"):
        jsonschema.validate(json.loads(text), SCHEMA)
        return form != "compact" or not re.search(r"\s", re.sub(r'"[^"]*"', "", text))
    if form == "object":
        return isinstance(json.loads(text), dict)
    if form == "choice":
        return text in CHOICES
    pattern = {"regex": FORMS["regex"].get("regex"), "lark": r"\(*[0-9]{1,3}\)*", "gbnf": "[a-z]+(,[a-z]+)*"}[form]
    return re.fullmatch(pattern, text) is not None and text.count("(") == text.count(")")


@pytest.mark.parametrize("acceptance", POLICIES)
def test_every_finished_answer_has_its_form(llm: LLM, acceptance: str) -> None:
    asked = [params(form, acceptance, temperature=i % 2) for i, form in enumerate([*FORMS, *reversed(FORMS)])]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(asked))]
    outputs = llm.generate(prompts, asked, use_tqdm=False)
    answers = [(form, o.outputs[0]) for form, o in zip([*FORMS, *reversed(FORMS)], outputs, strict=True)]
    finished = [(form, answer.text) for form, answer in answers if answer.finish_reason == "stop"]
    assert len(finished) > len(FORMS)
    for form, text in finished:
        assert has_form(form, text), (form, text)


def test_exact_answers_are_those_of_plain_decoding(llm: LLM, demo_engine: Path) -> None:
    asked = [params(form, temperature=0.9 * (i % 2)) for i, form in enumerate(FORMS)]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(asked))]
    with LLM(demo_engine, speculative_config={"method": None}) as plain:
        want = plain.generate(prompts, asked, use_tqdm=False)
    got = llm.generate(prompts, asked, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in got] == [o.outputs[0].token_ids for o in want]
    alone = [llm.generate(prompt, each, use_tqdm=False)[0] for prompt, each in zip(prompts[:2], asked[:2], strict=True)]
    assert [o.outputs[0].token_ids for o in alone] == [o.outputs[0].token_ids for o in want[:2]]


def test_several_sequences_of_a_prompt_have_a_form_each(llm: LLM) -> None:
    (output,) = llm.generate(PROMPTS[0], params("regex", temperature=1.2, n=4), use_tqdm=False)
    texts = [completion.text for completion in output.outputs]
    assert len(set(texts)) > 1
    assert all(has_form("regex", text) for text in texts)


def test_an_output_that_may_have_no_end_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs: no token may end the output.*leave ignore_eos out"):
        llm.generate(PROMPTS[0], params("regex", ignore_eos=True), use_tqdm=False)


def test_a_form_that_cannot_be_compiled_is_refused_and_the_next_request_served(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"structured_outputs\.json: .*uniqueItems"):
        llm.generate(PROMPTS[0], SamplingParams(structured_outputs={"json": {"uniqueItems": True}}), use_tqdm=False)
    assert llm.generate(PROMPTS[0], params("choice"), use_tqdm=False)[0].outputs[0].text in CHOICES


def test_a_request_without_a_form_makes_nothing(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a vocabulary was made")

    monkeypatch.setattr(compiler, "make_vocabulary", fail)
    monkeypatch.setattr(GrammarCompiler, "compile", fail)
    with LLM(demo_engine) as serving:
        assert serving.generate(PROMPTS[0], SamplingParams(max_tokens=4), use_tqdm=False)


def test_a_server_can_have_the_tokenizer_read_before_the_first_request(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = compiler.make_vocabulary
    monkeypatch.setattr(compiler, "make_vocabulary", lambda *given: (made.append(1), make(*given))[1])
    with LLM(demo_engine) as serving:
        assert made == []
        serving.warm_up_grammars()
        assert made == [1]
        assert serving.generate(PROMPTS[0], params("choice"), use_tqdm=False)[0].outputs[0].text in CHOICES
        assert made == [1]


def test_without_the_library_of_grammars_others_are_served(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with LLM(demo_engine) as serving:
        serving.warm_up_grammars()
        assert serving.generate(PROMPTS[0], SamplingParams(max_tokens=4), use_tqdm=False)
        with pytest.raises(ConfigError, match="needs llguidance"):
            serving.generate(PROMPTS[0], params("choice"), use_tqdm=False)


def test_the_event_loop_goes_on_while_a_form_is_compiled(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compilation waits until others had the loop."""
    source, others_ran = compiler._source, threading.Event()
    compiled: list[str] = []

    def slow(wanted: StructuredOutputs) -> str:
        assert others_ran.wait(60), "the event loop stands still"
        compiled.append(wanted.kind)
        return source(wanted)

    monkeypatch.setattr(compiler, "_source", slow)

    async def run() -> list[str]:
        async with AsyncLLM(demo_engine) as serving:

            async def ask(asked: SamplingParams) -> str:
                text = ""
                async for output in serving.generate(PROMPTS[0], asked):
                    text = output.outputs[0].text
                return text

            async def other() -> str:
                text = await ask(SamplingParams(max_tokens=8))
                others_ran.set()
                return text

            return await asyncio.gather(ask(params("choice")), ask(params("choice")), other())

    first, second, other = asyncio.run(run())
    assert first in CHOICES
    assert first == second
    assert other
    assert compiled == ["choice"]


def test_two_clients_with_forms_of_their_own_do_not_meet(demo_engine: Path) -> None:
    async def run() -> list[str]:
        async with AsyncLLM(demo_engine) as serving:

            async def ask(form: str) -> str:
                async for output in serving.generate(PROMPTS[0], params(form, temperature=0.8)):
                    text = output.outputs[0].text
                return text

            async def refused() -> str:
                with pytest.raises(RequestError, match="regex"):
                    async for _ in serving.generate(PROMPTS[0], SamplingParams(structured_outputs={"regex": "("})):
                        pass
                return ""

            return await asyncio.gather(*(ask(form) for form in ("regex", "choice") * 4), refused())

    *texts, _ = asyncio.run(run())
    for form, text in zip(("regex", "choice") * 4, texts, strict=True):
        assert has_form(form, text)


def test_fly_generate_takes_a_schema_or_an_expression(demo_engine: Path, tmp_path: Path) -> None:
    def run(*flags: str) -> str:
        result = CliRunner().invoke(main, [str(demo_engine), PROMPTS[0], *flags])
        assert result.exit_code == 0, result.stderr
        return result.stdout.removesuffix("\n")

    assert has_form("regex", run("--regex", FORMS["regex"]["regex"]))
    small = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    (tmp_path / "schema.json").write_text(json.dumps(small))
    for schema in (json.dumps(small), str(tmp_path / "schema.json")):
        jsonschema.validate(json.loads(run("--json-schema", schema)), small)
    for flags in (
        ["--json-schema", str(tmp_path / "none.json")],
        ["--json-schema", "{", "--regex", "a"],
        ["--regex", ""],
    ):
        result = CliRunner().invoke(main, [str(demo_engine), PROMPTS[0], *flags])
        assert result.exit_code == 2
        assert len(result.stderr.strip().splitlines()) == 1
