"""FLy as torch operations: what it accepts is what fly_trt.verification.fly accepts, and a graph can hold it."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fly_trt.integrations.tensorrt_llm.acceptance import FlyAcceptance
from fly_trt.integrations.tensorrt_llm.environment import Acceptance
from fly_trt.verification.fly import PRESETS, FlyPolicy, accept
from fly_trt.verification.sampling import distribution, gate_entropy
from tensorrt_llm_stand_in import load_interface, make_worker, sampled

TOLERANCE = 2e-5  # nats, between float32 sums in different orders


def entropies(logits: np.ndarray, policy: FlyPolicy) -> np.ndarray:
    """The gate of each row of [m, V], as the host computes it; NaN where there is no softmax."""
    result = np.full(len(logits), np.nan, np.float32)
    is_finite = ~np.isnan(logits).any(1) & np.isfinite(logits.max(1))
    for i in np.flatnonzero(is_finite):
        full, top = gate_entropy(distribution(logits[i : i + 1]), 3)
        result[i] = full[0] if policy.use_full_entropy else top[0]
    return result


class RandomBatch:
    """A batch of requests, contexts first, and what the worker makes of it without the rule."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.release = str(rng.choice(["1.2", "main"]))
        self.interface = load_interface(self.release)
        self.num_draft = int(rng.integers(1, 33))
        self.batch_size = int(rng.integers(1, 17))
        self.num_contexts = int(rng.integers(0, self.batch_size)) * int(rng.random() < 0.5)
        self.num_gens = self.batch_size - self.num_contexts
        self.vocab_size = int(rng.choice([5, 40, 300, 1100], p=[0.1, 0.6, 0.2, 0.1]))
        num_rows = self.num_contexts + self.num_gens * (self.num_draft + 1)
        scores = rng.standard_normal((num_rows, self.vocab_size)) * rng.choice([0.3, 1, 4], (num_rows, 1))
        if rng.random() < 0.3:
            scores = scores.round()  # ties
        if rng.random() < 0.3:  # what guided decoding forbids, and padding
            scores[rng.random(scores.shape) < 0.4] = -math.inf
            scores[:, -1] = -math.inf
            scores[:, 0] = 0
        if rng.random() < 0.2:
            broken = rng.random(num_rows) < 0.1
            scores[broken, rng.integers(self.vocab_size)] = rng.choice([math.nan, math.inf])
        dtype = [torch.float32, torch.bfloat16, torch.float16][int(rng.choice(3, p=[0.6, 0.2, 0.2]))]
        wide = torch.zeros(num_rows, self.vocab_size + 3, dtype=dtype)
        wide[:, : self.vocab_size] = torch.from_numpy(scores)
        self.logits = wide[:, : self.vocab_size] if rng.random() < 0.5 else wide[:, : self.vocab_size].contiguous()
        self.metadata = self.interface.SpecMetadata()
        if rng.random() < 0.3:
            self.metadata = sampled(self.interface, torch.from_numpy(rng.choice([0.5, 1.0], num_rows)).to(dtype))
        self.worker = make_worker(self.interface, self.num_draft)
        # A draft that agrees with what the target chooses, but for here and there.
        nothing = torch.zeros(self.num_gens, self.num_draft, dtype=torch.int32)
        self.exact, _ = self.accept(nothing)
        self.choices = self.exact[self.num_contexts :, : self.num_draft + 1].numpy()
        differs = rng.random((self.num_gens, self.num_draft)) < rng.choice([0.02, 0.08, 0.3])
        others = rng.integers(0, self.vocab_size, differs.shape)
        draft = np.where(differs, others, self.choices[:, : self.num_draft])
        self.draft = torch.from_numpy(draft.astype(np.int32 if rng.random() < 0.7 else np.int64))

    def accept(self, draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of logits that nobody else uses, with numbers drawn from the start."""
        self.worker.seed = 0
        method = self.worker._sample_and_accept_draft_tokens_base
        arguments = self.num_contexts, self.batch_size, self.metadata
        return method(self.logits.clone(), draft, *arguments)

    def accept_by(self, rule: Acceptance) -> tuple[torch.Tensor, torch.Tensor]:
        base = type(self.worker)._sample_and_accept_draft_tokens_base
        fly = FlyAcceptance(rule, lambda text: None)
        self.worker.seed = 0
        wide = torch.zeros(self.logits.shape[0], self.logits.stride(0), dtype=self.logits.dtype)
        logits = wide[:, : self.vocab_size].copy_(self.logits)  # the same strides
        arguments = self.num_contexts, self.batch_size, self.metadata
        accepted, num = fly(base, self.worker, logits, self.draft, *arguments)
        self.counts = fly.counts()
        return accepted, num


def random_rule(rng: np.random.Generator, vocab_size: int) -> Acceptance:
    preset = str(rng.choice(list(PRESETS)))
    own = rng.random() < 0.6
    most = 1.0 if preset == "paper" else 1.5
    threshold = float(rng.choice([0.0, math.inf, rng.uniform(0, most)], p=[0.1, 0.05, 0.85])) if own else None
    window = int(rng.integers(0, 9)) if own else None
    stops = rng.choice(vocab_size, int(rng.integers(0, 4)), replace=False).tolist()
    return Acceptance(preset, threshold, window, tuple(stops))


def verdicts(batch: RandomBatch, rule: Acceptance, row: int, gate: np.ndarray) -> set[tuple[int, ...]]:
    """The tokens that the host's rule emits for a generation request: more than one answer where float32 does not tell
    entropy and threshold apart."""
    policy = rule.policy(batch.vocab_size)
    draft, choices = batch.draft[row].numpy().astype(np.int64), batch.choices[row].astype(np.int64)
    answers = set()
    for shift in (0.0, TOLERANCE, -TOLERANCE) if policy.is_loose else (0.0,):
        shifted = replace(policy, entropy_threshold=policy.entropy_threshold + shift)
        verdict = accept(draft, choices, gate, shifted, frozenset(rule.stop_token_ids))
        assert verdict.next_token is not None
        answers.add((*draft[: verdict.num_accepted].tolist(), verdict.next_token))
    return answers


def compare(num_rows: int, seed: int) -> Counter[str]:
    """Rows of random batches under random rules: how many differ, and how many are of use to see that."""
    rng = np.random.default_rng(seed)
    seen: Counter[str] = Counter()
    while seen["rows"] < num_rows:
        batch = RandomBatch(rng)
        rule = random_rule(rng, batch.vocab_size)
        accepted, num = batch.accept_by(rule)
        first = batch.num_contexts
        assert torch.equal(accepted[:first, 0], batch.exact[:first, 0])
        assert num[:first].tolist() == [1] * first
        assert (accepted.dtype, num.dtype) == (torch.int32, torch.int32)
        scores = batch.logits[first:].float().numpy()
        gates = entropies(scores, rule.policy(batch.vocab_size))
        gates = gates.reshape(batch.num_gens, batch.num_draft + 1)
        scores = scores.reshape(batch.num_gens, batch.num_draft + 1, batch.vocab_size)
        num_accepted = num_loosened = 0
        for row in range(batch.num_gens):
            draft = batch.draft[row].long()
            gate = gates[row].copy()
            # A draft token that is forbidden is not loosened, however uncertain the target.
            gate[:-1][np.isneginf(scores[row, np.arange(batch.num_draft), draft])] = np.nan
            answers = verdicts(batch, rule, row, gate)
            length = int(num[first + row])
            seen["different"] += tuple(accepted[first + row, :length].tolist()) not in answers
            seen["ambiguous"] += len(answers) > 1
            loosened = int((batch.draft[row, : length - 1].numpy() != batch.choices[row, : length - 1]).sum())
            seen[f"loosened by {rule.preset}"] += loosened
            seen["sampled"] += loosened and batch.metadata.temperatures is not None
            seen["beside contexts"] += loosened and first > 0
            seen["not numbers"] += int(np.isnan(gates[row]).any())
            num_accepted, num_loosened = num_accepted + length - 1, num_loosened + loosened
        if batch.counts != (0, 0):  # nothing is counted where nothing can be loosened
            assert batch.counts == (num_accepted, num_loosened)
        seen["rows"] += batch.num_gens
    return seen


@pytest.mark.parametrize(
    "num_rows", [3_000, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(3600)])]
)
def test_it_accepts_what_the_rule_on_the_host_accepts(num_rows: int) -> None:
    seen = compare(num_rows, seed=num_rows)
    assert seen["different"] == 0
    assert seen["ambiguous"] <= num_rows / 1000
    for case in (*(f"loosened by {preset}" for preset in PRESETS), "sampled", "beside contexts", "not numbers"):
        assert seen[case] >= num_rows / 200, seen


NUM_DRAFT = 8
# What must wait for the device, or has a shape that only the data say.
HOST_OPERATIONS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "index", "lift_fresh_copy"}


class AsAModule(torch.nn.Module):
    """One context and three generation requests, as a graph would have them."""

    def __init__(self, release: str, preset: str) -> None:
        super().__init__()
        self.interface = load_interface(release)
        self.worker = make_worker(self.interface, NUM_DRAFT)
        self.metadata = self.interface.SpecMetadata()
        self.fly = FlyAcceptance(Acceptance(preset, threshold=0.1, stop_token_ids=(1, 2)), pytest.fail)

    def forward(self, logits: torch.Tensor, draft_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        base = type(self.worker)._sample_and_accept_draft_tokens_base
        return self.fly(base, self.worker, logits, draft_tokens, 1, 4, self.metadata)


def loosened_batch(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every request's first draft token is loosened, and the others are what the target chooses."""
    logits = torch.randn(1 + 3 * (NUM_DRAFT + 1), vocab_size, generator=torch.Generator().manual_seed(7))
    logits[:, 1:3] = -9.0
    choices = logits[1:].argmax(-1).reshape(3, NUM_DRAFT + 1)
    draft = choices[:, :NUM_DRAFT].clone()
    draft[:, 0] = torch.where(draft[:, 0] == 4, 5, 4)
    return logits, draft.int()


@pytest.mark.parametrize("release", ["1.2", "main"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("vocab_size", [40, 1100])
def test_it_is_one_graph_without_the_host(release: str, preset: str, vocab_size: int) -> None:
    module = AsAModule(release, preset)
    logits, draft = loosened_batch(vocab_size)
    accepted, num = module(logits.clone(), draft)
    assert num.tolist() == [1] + [NUM_DRAFT + 1] * 3
    assert torch.equal(accepted[1:, 0], draft[:, 0])

    exported = torch.export.export(module, (logits, draft))
    assert not exported.constants  # a tensor of the host would be copied to the device at each step
    operations = {str(node.target).split(".")[1] for node in exported.graph.nodes if "aten." in str(node.target)}
    assert "cumprod" in operations
    assert not operations & HOST_OPERATIONS
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for graph in (exported.module(), compiled):
        for got, expected in zip(graph(logits.clone(), draft), (accepted, num), strict=True):
            assert torch.equal(got, expected)
    torch.compiler.reset()


@pytest.mark.parametrize("preset", PRESETS)
def test_no_value_is_looked_at(preset: str) -> None:
    """Where tensors have shapes alone, whatever needs a value raises: a wait for the device, a shape made of data."""
    module = AsAModule("main", preset)
    logits, draft = loosened_batch(1100)
    accepted, num = module(logits.to("meta"), draft.to("meta"))
    assert accepted.is_meta
    assert (accepted.shape, num.shape) == ((4, NUM_DRAFT + 1), (4,))


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS)
def test_the_compiler_of_torch_takes_it_whole(preset: str) -> None:
    module = AsAModule("1.2", preset)
    logits, draft = loosened_batch(1100)
    expected = module(logits.clone(), draft)
    got = torch.compile(module, fullgraph=True)(logits.clone(), draft)
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    torch.compiler.reset()


def test_it_counts_in_and_out_of_inference_mode() -> None:
    module = AsAModule("main", "reference")
    logits, draft = loosened_batch(40)
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            module(logits.clone(), draft)
    assert module.fly.counts() == (3 * 3 * NUM_DRAFT, 3 * 3)


def change_worker(module: AsAModule) -> None:
    module.worker.force_num_accepted_tokens = 2


def change_metadata(name: str) -> Any:
    return lambda module: setattr(module.metadata, name, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (change_worker, "the number of accepted tokens is forced"),
        (change_metadata("is_spec_dec_tree"), "drafts are trees"),
        (change_metadata("is_ragged_verify"), "drafts are of different lengths"),
    ],
)
def test_what_it_does_not_know_stays_as_it_was_and_is_said_once(change: Any, said: str) -> None:
    module, lines = AsAModule("main", "reference"), []
    module.fly = FlyAcceptance(Acceptance(), lines.append)
    change(module)
    logits, draft = loosened_batch(40)
    for _ in range(2):
        accepted, num = module(logits.clone(), draft)
        base = type(module.worker)._sample_and_accept_draft_tokens_base
        exact, exact_num = base(module.worker, logits.clone(), draft, 1, 4, module.metadata)
        assert torch.equal(num, exact_num)
        assert torch.equal(accepted[1:], exact[1:])
    assert len(lines) == 1
    assert said in lines[0]


def test_packed_rows_are_left_to_the_worker() -> None:
    lines: list[str] = []
    fly = FlyAcceptance(Acceptance(), lines.append)
    logits, draft = loosened_batch(40)
    packed = torch.zeros(2, 1)

    def base(worker: Any, *arguments: Any) -> Any:
        assert arguments[0].shape[0] == len(logits) - 3
        return packed, packed

    module = AsAModule("main", "reference")
    assert fly(base, module.worker, logits[3:], draft, 1, 4, module.metadata)[0] is packed
    assert "rows are not" in lines[0]


def test_drafts_that_are_too_short_for_a_window_are_said_once_and_cost_nothing() -> None:
    lines: list[str] = []
    fly = FlyAcceptance(Acceptance(window=NUM_DRAFT), lines.append)
    module = AsAModule("1.2", "reference")
    module.fly = fly
    logits, draft = loosened_batch(40)
    assert [module(logits.clone(), draft)[1].tolist() for _ in range(2)] == [[1, 1, 1, 1]] * 2
    assert lines == ["nothing is loosened where drafts have 8 tokens: a window needs 9"]
    assert fly.counts() == (0, 0)


def test_rejection_sampling_is_said() -> None:
    module, lines = AsAModule("main", "reference"), []
    module.fly = FlyAcceptance(Acceptance(), lines.append)
    module.metadata.use_rejection_sampling = True
    logits, draft = loosened_batch(40)
    assert module(logits, draft)[1].tolist() == [1] + [NUM_DRAFT + 1] * 3
    assert "use_rejection_sampling" in lines[0]


@pytest.mark.parametrize("stops", [(4,), (5,)])
def test_stop_tokens_are_not_loosened(stops: tuple[int, ...]) -> None:
    module = AsAModule("1.2", "reference")
    logits, draft = loosened_batch(40)
    logits[[1, 10, 19], 5] = 3.5  # what the target wants first
    draft[:, 0] = 4
    module.fly = FlyAcceptance(Acceptance(threshold=0.0), pytest.fail)
    assert module(logits.clone(), draft)[1].tolist() == [1] + [NUM_DRAFT + 1] * 3
    module.fly = FlyAcceptance(Acceptance(threshold=0.0, stop_token_ids=stops), pytest.fail)
    assert module(logits.clone(), draft)[1].tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_threshold_of_nothing_is_no_gate(preset: str) -> None:
    """Where the target is as certain as float32 can be, its entropy is 0."""
    module = AsAModule("main", preset)
    module.fly = FlyAcceptance(Acceptance(preset, threshold=0.0), pytest.fail)
    logits, draft = loosened_batch(40)
    logits[[1, 10, 19], 9] = 1000.0
    draft[:, 0] = 4
    assert module(logits, draft)[1].tolist() == [1] + [NUM_DRAFT + 1] * 3


@pytest.mark.parametrize("token", [-1, 40])
def test_a_draft_token_that_is_none_is_not_loosened(token: int) -> None:
    module = AsAModule("main", "vllm")
    logits, draft = loosened_batch(40)
    draft[:, 0] = token
    assert module(logits, draft)[1].tolist() == [1, 1, 1, 1]


def test_contexts_alone() -> None:
    interface = load_interface("1.2")
    fly = FlyAcceptance(Acceptance(), pytest.fail)
    logits = torch.arange(40.0)
    base = interface.SpecWorkerBase._sample_and_accept_draft_tokens_base
    nothing = torch.zeros(0, 8, dtype=torch.int32)
    accepted, num = fly(base, make_worker(interface, 8), logits, nothing, 1, 1, interface.SpecMetadata())
    assert (accepted[0, 0].item(), num.tolist()) == (39, [1])
