"""A new acceptance policy and a new drafter: a module each (toy_policy.py, toy_drafter.py) and a line in a table.

Backends have tests of the same kind in tests/engines/test_backends.py and tests/build/test_backends.py.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, ConfigError, RequestOutput, SamplingParams, SpeculativeConfig
from fly_trt.benchmark.modes import choose_modes
from fly_trt.drafting import DRAFTERS, Draft, DrafterKind, DraftRow
from fly_trt.manifest import read_manifest
from fly_trt.serving.triton.request import read_request
from fly_trt.verification import POLICIES
from loop_stack import PROMPT, make_drafter, make_request, make_stack
from table_engine import STOP_TOKEN, Logits, NextToken, most_probable, spread_logits
from toy_drafter import PeriodDrafter, period
from toy_policy import RATIO, LikelyPolicy

PROMPTS = [prompt["prompt"] for prompt in load_eval_prompts()[:12]]
# What a release with the two has in the tables; for programs of their own.
ADDED = (
    "from fly_trt.drafting import DRAFTERS, DrafterKind; from fly_trt.verification import POLICIES\n"
    "from toy_drafter import period; from toy_policy import LikelyPolicy\n"
    "POLICIES['likely'] = LikelyPolicy\n"
    "DRAFTERS['period'] = DrafterKind(period, needs_draft_model=False, acceptance='exact')\n"
)


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICIES, LikelyPolicy.name, LikelyPolicy)
    monkeypatch.setitem(DRAFTERS, "period", DrafterKind(period, needs_draft_model=False, acceptance="exact"))


def likely() -> AcceptanceParams:
    return AcceptanceParams(acceptance="likely")


def oracle(logits: Logits, draft: NextToken, num_draft: int, num_tokens: int) -> list[int]:
    """What rounds of `num_draft` tokens emit, written down from what the policy's docstring says."""
    tokens = list(PROMPT)
    while len(tokens) < len(PROMPT) + num_tokens:
        for _ in range(num_draft):
            row = logits(tuple(tokens))
            proposed, wanted = draft(tuple(tokens)), int(row.argmax())
            is_likely = np.exp(row[proposed] - row.max()) >= RATIO and STOP_TOKEN not in (proposed, wanted)
            tokens.append(proposed if is_likely else wanted)
            if tokens[-1] != proposed:
                break
        else:
            tokens.append(int(logits(tuple(tokens)).argmax()))
    return tokens[len(PROMPT) :][:num_tokens]


@pytest.mark.parametrize("lengths", [[5], [0], [1], [5, 0, 2], [3, 1]])
@pytest.mark.parametrize("salt", range(6))
def test_a_policy_decides_as_it_says_however_its_rounds_are_cut(salt: int, lengths: list[int]) -> None:
    logits, other = spread_logits(salt), spread_logits(salt + 100)

    def draft(tokens: tuple[int, ...]) -> int:  # one of the target's two most probable tokens
        first, second = np.argsort(-logits(tokens))[:2].tolist()
        return second if other(tokens)[2] > 0 else first

    stack = make_stack(
        most_probable(logits),
        make_drafter("draft_model", draft, num_slots=3),
        logits=logits,
        num_slots=3,
        num_draft_tokens=5,
        draft_lengths=lengths,
    )
    neighbours = [make_request([9, 8, 7 + number], request_id=f"n{number}") for number in range(2)]
    request = make_request(policy=LikelyPolicy(), ignore_eos=True)
    stack.run(request, *neighbours)
    want = oracle(logits, draft, 5, 40)
    assert request.output_token_ids == want[: len(request.output_token_ids)]
    assert len(request.output_token_ids) == 40
    assert request.metrics.num_loosened_tokens > 0


@pytest.mark.parametrize("salt", range(8))
def test_a_draft_token_that_leads_to_no_number_changes_nothing_for_those_before_it(salt: int) -> None:
    """However the round is cut: it is not loosened, and what stands before it is decided as ever."""
    logits, spoils = spread_logits(salt), np.random.default_rng(salt).integers(2, 10)

    def draft(tokens: tuple[int, ...]) -> int:
        first, second = np.argsort(-logits(tokens))[:2].tolist()
        return second if (len(tokens) + salt) % 3 == 0 else first

    def sometimes_none(tokens: tuple[int, ...]) -> np.ndarray:
        """After a token that only the draft says here."""
        is_drafts = len(tokens) > len(PROMPT) and tokens[-1] != int(logits(tokens[:-1]).argmax())
        return np.full(len(logits(tokens)), np.nan) if is_drafts and tokens[-1] == spoils else logits(tokens)

    outputs = []
    for lengths in ([5], [0], [1], [2, 0], [4, 1]):
        drafter = make_drafter("draft_model", draft)
        stack = make_stack(
            most_probable(logits), drafter, logits=sometimes_none, num_draft_tokens=5, draft_lengths=lengths
        )
        request = make_request(policy=LikelyPolicy(), ignore_eos=True)
        stack.run(request)
        outputs.append((request.output_token_ids, request.metrics.num_loosened_tokens))
    assert outputs == [outputs[0]] * len(outputs)
    assert len(outputs[0][0]) == 40


@pytest.mark.parametrize(("num_requests", "prompt"), [(1, 16), (6, 4)])
def test_a_step_has_no_more_tokens_than_it_may(num_requests: int, prompt: int) -> None:
    """But for rows of one token, which need a second one to get on."""
    logits = spread_logits(3)
    draft = make_drafter("draft_model", lambda tokens: int(np.argsort(-logits(tokens))[1]), num_slots=num_requests)
    stack = make_stack(
        most_probable(logits), draft, logits=logits, num_slots=num_requests, num_draft_tokens=5, max_num_tokens=16
    )
    requests = [
        make_request([3 + number] * prompt, policy=LikelyPolicy(), ignore_eos=True, request_id=str(number))
        for number in range(num_requests)
    ]
    assert max(stack.positions_of(lambda: stack.run(*requests))) <= 16
    assert all(len(request.output_token_ids) == 40 for request in requests)


def test_a_policy_is_served_beside_others_and_gives_the_same_in_any_batch(demo_engine: Path) -> None:
    greedy = SamplingParams(max_tokens=60, acceptance=likely())
    sampled = SamplingParams(max_tokens=60, acceptance=likely(), temperature=0.8, seed=3)
    with LLM(demo_engine) as llm:
        alone = [llm.generate(PROMPTS[0], params)[0] for params in (greedy, sampled)]
        exact = llm.generate(PROMPTS[0], SamplingParams(max_tokens=60, acceptance=AcceptanceParams(acceptance="exact")))
        mixed = llm.generate(
            [PROMPTS[0], PROMPTS[0], *PROMPTS[1:]], [greedy, sampled, *[SamplingParams()] * len(PROMPTS[1:])]
        )
    for one, among_others in zip(alone, mixed[:2], strict=True):
        assert one.outputs[0].token_ids == among_others.outputs[0].token_ids
    assert alone[0].metrics.num_loosened_tokens > 0
    assert alone[0].outputs[0].token_ids != exact[0].outputs[0].token_ids


def test_what_other_policies_read_is_refused_with_it() -> None:
    with pytest.raises(ConfigError, match="fly_window_size 4: has no effect with acceptance 'likely': add"):
        AcceptanceParams(acceptance="likely", fly_window_size=4).over(AcceptanceParams())


def test_a_drafter_drafts_and_a_pair_without_a_draft_model_has_it_too(target_only_engine: Path) -> None:
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with LLM(target_only_engine, speculative_config={"method": None}) as llm:
        plain = llm.generate(PROMPTS, params)
    with LLM(target_only_engine, speculative_config={"method": "period"}) as llm:
        assert llm.speculative_config.acceptance == "exact"
        drafted = llm.generate(PROMPTS, params)
    assert [output.outputs[0].token_ids for output in drafted] == [output.outputs[0].token_ids for output in plain]
    assert sum(output.metrics.num_accepted_tokens for output in drafted) > 0


def test_servers_and_benchmarks_know_both(demo_engine: Path) -> None:
    tensors = {"text_input": np.array([[b"Tell me"]], np.object_), "acceptance": np.array([[b"likely"]], np.object_)}
    asked = read_request(tensors, "", exclude_input_in_output=True)
    assert asked.params.acceptance == likely()
    modes = choose_modes(["likely", "period"], read_manifest(demo_engine))
    assert {name: (mode.method, mode.acceptance) for name, mode in modes.items()} == {
        "likely": ("multi_level", "likely"),
        "period": ("period", "exact"),
    }


def test_command_lines_know_both(demo_engine: Path) -> None:
    run = f"{ADDED}from fly_trt.cli.generate import main; main()"
    for flags in (["--acceptance", "likely"], ["--method", "period"]):
        command = [sys.executable, "-c", run, str(demo_engine), "Tell me", "--max-tokens", "5", *flags]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
        assert "5 tokens" in done.stderr
    for module, names in (("generate", ("likely", "period")), ("bench", ("likely", "period")), ("triton", ("likely",))):
        run = f"{ADDED}from fly_trt.cli.{module} import main; main(['--help'])"
        done = subprocess.run([sys.executable, "-c", run], cwd=Path(__file__).parent, capture_output=True, text=True)
        assert all(name in done.stdout for name in names), module


class AtMost(PeriodDrafter):
    """A drafter with a state of its own, made by its user."""

    def __init__(self, period: int) -> None:
        super().__init__(period)
        self.num_asked = 0

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        self.num_asked += len(rows)
        return super().propose(rows)


def test_an_object_of_the_users_own_stands_for_a_name(demo_engine: Path) -> None:
    """Of a rule in a request and in an engine's configuration, of a drafter for an LLM; no table is touched."""
    POLICIES.pop("likely")
    params = SamplingParams(max_tokens=60, acceptance=LikelyPolicy())
    guarded = SamplingParams(max_tokens=60, acceptance=AcceptanceParams(acceptance=LikelyPolicy(), exact_first=1000))
    exact = SamplingParams(max_tokens=60, acceptance=AcceptanceParams(acceptance="exact"))
    with LLM(demo_engine) as llm:
        asked, held_back, plain = (llm.generate(PROMPTS, settings) for settings in (params, guarded, exact))
        assert 'acceptance="likely"' in str(llm.metrics())
    with LLM(demo_engine, speculative_config={"acceptance": LikelyPolicy()}) as llm:
        configured = llm.generate(PROMPTS, SamplingParams(max_tokens=60))
    assert _tokens(configured) == _tokens(asked) != _tokens(plain)
    assert _tokens(held_back) == _tokens(plain)
    assert sum(output.metrics.num_loosened_tokens for output in asked) > 0
    drafter = AtMost(3)
    with LLM(demo_engine, drafter=drafter, speculative_config={"acceptance": "exact"}) as llm:
        drafted = llm.generate(PROMPTS, SamplingParams(max_tokens=60))
    assert _tokens(drafted) == _tokens(plain)
    assert drafter.num_asked > 0
    with LLM(
        demo_engine, drafter=period, speculative_config={"acceptance": "exact"}
    ) as llm:  # a function that makes it
        assert _tokens(llm.generate(PROMPTS, SamplingParams(max_tokens=60))) == _tokens(plain)


class Overheard(PeriodDrafter):
    """One that can be called, as a network can, and hears what is emitted."""

    def __init__(self) -> None:
        super().__init__(3)
        self.heard: list[list[int]] = []

    def __call__(self) -> None:
        raise AssertionError("it is a drafter")

    def read_output(self, slot: int, tokens: npt.NDArray[np.int64]) -> None:
        self.heard.append(tokens.tolist())


def test_a_drafter_hears_what_was_emitted_and_nothing_else(target_only_engine: Path) -> None:
    """Not the rest of a round in which a request ended; and where no draft model was built it needs none."""
    drafter = Overheard()
    method = SpeculativeConfig(method="draft_model", acceptance="exact")
    with LLM(target_only_engine, drafter=drafter, speculative_config=method) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=23))
    assert sorted(drafter.heard) == sorted(_tokens(outputs))


def test_a_drafter_where_none_is_used_is_refused(demo_engine: Path) -> None:
    with pytest.raises(ConfigError, match="drafter: has no effect with method None"):
        LLM(demo_engine, drafter=PeriodDrafter(3), speculative_config={"method": None})


def test_a_rule_that_learns_starts_anew_with_each_sequence(demo_engine: Path) -> None:
    """One object in the configuration, and no request knows what another one showed it."""
    with LLM(demo_engine, speculative_config={"acceptance": "adaptive"}) as llm:
        first = llm.generate(PROMPTS[0], SamplingParams(max_tokens=60))
        llm.generate(PROMPTS, SamplingParams(max_tokens=60))
        again = llm.generate(PROMPTS[0], SamplingParams(max_tokens=60))
    assert _tokens(first) == _tokens(again)


def _tokens(outputs: Sequence[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_the_worked_example_of_the_architecture_page_runs(
    demo_engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parents[1] / "fly_trt" / "README.md").read_text(encoding="utf-8")
    (example,) = (block for block in page.split("```python\n")[1:] if "HalfAsLikely" in block)
    code = example.split("```")[0].replace("engines/demo", str(demo_engine))
    exec(compile(code, "fly_trt/README.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.endswith(": twenty-one.\n")
