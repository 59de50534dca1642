"""What llguidance forces, as drafts of the demo pair: the same answers in fewer steps, alone and beside others."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from fly_trt import LLM, AcceptanceParams, RequestOutput, SamplingParams
from fly_trt.grammar import GrammarCompiler, GrammarMatcher, StructuredOutputs
from fly_trt.tokens import NO_TOKENS, IntArray

SCHEMA = {
    "type": "object",
    "properties": {
        "customer_identifier": {"type": "string", "maxLength": 6},
        "preferred_language": {"enum": ["german", "greek", "portuguese"]},
        "number_of_previous_orders": {"type": "integer", "minimum": 0, "maximum": 99},
        "is_registered_customer": {"type": "boolean"},
    },
    "required": ["customer_identifier", "preferred_language", "number_of_previous_orders", "is_registered_customer"],
    "additionalProperties": False,
}
WANTED = StructuredOutputs(json=SCHEMA, disable_any_whitespace=True)
PROMPTS = ["### Instruction:\nSpell out: 21.\n### Response:\n", "JSON:", "A customer of ours"]
METHODS = (None, "ngram", "multi_level")
SETTINGS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": {"temperature": 0.9, "seed": 4, "n": 2}}


@pytest.fixture(scope="module", params=METHODS)
def llm(request: pytest.FixtureRequest, demo_engine: Path) -> Iterator[LLM]:
    with LLM(demo_engine, max_batch_size=6, speculative_config={"method": request.param}) as llm:
        yield llm


@pytest.fixture(scope="module")
def plain(demo_engine: Path) -> dict[str, list[list[int]]]:
    """By settings the tokens of plain decoding."""
    with LLM(demo_engine, max_batch_size=1, speculative_config={"method": None}) as llm:
        return {name: tokens_of(answers(llm, **settings)) for name, settings in SETTINGS.items()}


def answers(llm: LLM, acceptance: str = "exact", **settings: Any) -> list[RequestOutput]:
    rule = AcceptanceParams(acceptance=acceptance)
    params = SamplingParams(max_tokens=150, acceptance=rule, structured_outputs=WANTED, **settings)
    return llm.generate(PROMPTS, params, use_tqdm=False)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


def num_steps(outputs: list[RequestOutput]) -> int:
    """Each brings one token that was not drafted."""
    return sum(output.metrics.num_output_tokens - output.metrics.num_accepted_tokens for output in outputs)


@pytest.fixture
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grammars say only what is allowed."""
    follow = GrammarMatcher.follow

    def silent_follow(grammar: GrammarMatcher, *tokens: IntArray) -> tuple[int, IntArray]:
        return follow(grammar, *tokens)[0], NO_TOKENS

    monkeypatch.setattr(GrammarMatcher, "forced", lambda grammar, output: NO_TOKENS)
    monkeypatch.setattr(GrammarMatcher, "follow", silent_follow)


@pytest.mark.parametrize("name", SETTINGS)
def test_forced_tokens_change_no_exact_answer_and_save_steps(
    llm: LLM, plain: dict[str, list[list[int]]], name: str
) -> None:
    outputs = answers(llm, **SETTINGS[name])
    assert tokens_of(outputs) == plain[name]
    forced = sum(output.metrics.num_accepted_tokens_by_source.get("grammar", 0) for output in outputs)
    total = sum(map(len, plain[name]))
    if llm.speculative_config.method is None:
        assert not forced
        assert num_steps(outputs) == total
    else:
        assert forced > 0.5 * total
        assert num_steps(outputs) < 0.4 * total


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("nothing_forced")
def test_without_what_is_forced_answers_are_the_same(llm: LLM, plain: dict[str, list[list[int]]], name: str) -> None:
    outputs = answers(llm, **SETTINGS[name])
    assert tokens_of(outputs) == plain[name]
    assert num_steps(outputs) > 0.7 * sum(map(len, plain[name]))


def test_requests_without_a_grammar_beside_them_change_no_token(llm: LLM) -> None:
    free = SamplingParams(max_tokens=40)
    guided = SamplingParams(max_tokens=60, structured_outputs=WANTED)
    alone = tokens_of(llm.generate(PROMPTS, free, use_tqdm=False)), tokens_of(answers(llm, "fly"))
    mixed = llm.generate([*PROMPTS, *PROMPTS], [free] * 3 + [guided] * 3, use_tqdm=False)
    assert tokens_of(mixed[:3]) == alone[0]
    loose = answers(llm, "fly"), [llm.generate(prompt, guided, use_tqdm=False)[0] for prompt in PROMPTS]
    assert tokens_of(loose[0]) == alone[1]
    assert tokens_of(mixed[3:]) == tokens_of(loose[1])


def test_a_proposal_is_followed_up_to_what_is_forced_or_forbidden(demo_engine: Path) -> None:
    tokenizer = Tokenizer.from_file(str(demo_engine / "tokenizer" / "tokenizer.json"))

    def ids(text: str) -> IntArray:
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int64)

    def text(tokens: IntArray) -> str:
        return tokenizer.decode(tokens.tolist())

    grammar = GrammarCompiler(tokenizer, tokenizer.get_vocab_size()).compile(WANTED).new_matcher([1])
    begun = grammar.forced(NO_TOKENS)
    assert text(begun).startswith('{"customer_identifier')
    output = ids('{"customer_identifier":"a')
    count, forced = grammar.follow(output, ids("b"), ids('cd",'))
    assert count == len(ids('cd",'))
    assert text(forced).startswith('"preferred_language":"')
    count, forced = grammar.follow(output, ids("b"), np.concatenate([ids('c",'), ids(" x")]))
    assert count == len(ids('c",'))
    assert text(forced).startswith('"preferred_language":"')
    count, forced = grammar.follow(output, NO_TOKENS, ids("\n\n"))
    assert (count, len(forced)) == (0, 0)
    assert grammar.forced(output).tolist() == [], "what was ahead is forgotten"
