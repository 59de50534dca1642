"""PackedLooseAccept's kernels, run on the CPU: which logits they raise, and what a runtime then accepts."""

import ctypes
import itertools
import mmap
from collections import Counter
from typing import Any

import numpy as np
import pytest

import kernel_library as library
import packed_rows as packed
from fly_trt.verification import FlyPolicy, accept
from kernel_library import PackedPolicy, PackedStep
from logit_rows import decode, encode
from packed_rows import PackedCase

TYPES = ["float32", "float16", "bfloat16"]
INVALID_VALUE = 1
EAGER = PackedPolicy(0.1, window=2, lookahead=1)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> library.Kernels:
    try:
        return library.load_cpu_kernels(tmp_path_factory.mktemp("kernels"))
    except library.NoCompilerError as error:
        pytest.skip(str(error))


def int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def step_of(values: Any, drafts: list[int], chunk: int = 2, dtype: str = "float32") -> PackedStep:
    """One context request with a chunk of tokens 0 and these drafts; values [len(drafts) + 1, V]."""
    n = len(drafts)
    ids = np.array([0] * chunk + drafts, np.int32)
    return PackedStep(encode(np.asarray(values, float), dtype), np.arange(chunk, chunk + n + 1), ids, int32(len(ids)))


def loosened_rows(kernels: library.Kernels, step: PackedStep, policy: PackedPolicy) -> list[int]:
    """The rows of a step that are not as they were."""
    found = kernels.packed_loose_accept(step, policy)
    return [
        row for row, (new, old) in enumerate(zip(found, step.logits, strict=True)) if new.tobytes() != old.tobytes()
    ]


def uncertain_rows(choices: list[int], vocab_size: int = 50) -> np.ndarray:
    """Rows whose choice is a little more probable than the other tokens."""
    values = np.zeros((len(choices), vocab_size))
    values[np.arange(len(choices)), choices] = 0.5
    return values


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.long) for part in range(1, 20))])
def test_random_mixes_of_context_and_generation_rows(kernels: library.Kernels, part: int, is_long: bool) -> None:
    """Every logit is as the oracle has it, and comparison with the largest logit accepts what the rule accepts. A long
    run tries 10,000."""
    rng = np.random.default_rng(17 + part)
    seen: Counter[str] = Counter()
    for _ in range(500 if is_long else 100):
        case = PackedCase.random(rng)
        assert case.mismatches(kernels) == []
        seen[case.step.logits.dtype.name] += 1
        seen["padded"] += case.vocab_size < case.step.logits.shape[1]
        seen["contexts and generations"] += 0 < case.num_contexts < len(case.step.context_lengths)
        for item in case.judged():
            n, accepted = len(item.sequence.drafts), item.num_accepted
            loosened = int((item.sequence.drafts[:accepted] != item.choices[:accepted]).sum())
            seen["empty"] += n == 0
            seen["full"] += 0 < n == accepted
            seen["rejected"] += accepted < n
            seen["loosened"] += loosened > 0
            seen["loosened more than once"] += loosened > 1
    assert all(count > 3 for count in seen.values()), seen


def test_more_requests_than_a_warp_has_lanes(kernels: library.Kernels) -> None:
    rng = np.random.default_rng(2)
    seen = 0
    for _ in range(3):
        case = PackedCase.of_vocabulary(rng, 30, max_contexts=120, max_drafts=8)
        assert case.mismatches(kernels) == []
        seen = max(seen, case.num_contexts)
    assert seen > 64


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_of_a_large_vocabulary(kernels: library.Kernels, dtype: str, padding: int) -> None:
    rng = np.random.default_rng(padding)
    vocab_size, drafts = 128_256, [5, 128_255, 9, 77_777, 3]
    values = rng.normal(size=(6, vocab_size + padding))
    values[:, vocab_size:] = 1e4
    values[np.arange(5), drafts] = 14
    values[[1, 3], [4000, 100_000]] = 14.5
    step = step_of(values, drafts, dtype=dtype)
    policy = PackedPolicy(0.3, window=1, lookahead=1, vocab_size=vocab_size)
    case = PackedCase(dtype, step, 1, policy, padding, False)
    assert case.mismatches(kernels) == []
    assert loosened_rows(kernels, step, policy) == [1, 3]


def rows_of_level(level: float) -> np.ndarray:
    """Four tokens of the first row and one of each other have this logit, the others have far less."""
    values = np.full((4, 50), level - 2000)
    values[0, [1, 7, 8, 9]] = level
    values[[1, 2, 3], [2, 3, 4]] = level
    return values


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("level", [0.0, 3.0, -40.0, 5000.0, -60_000.0])
def test_a_raised_logit_stays_the_largest_when_the_runtime_scales_it(
    kernels: library.Kernels, dtype: str, level: float
) -> None:
    """After division by any temperature, and after the softmax, in float32 and float16."""
    step = step_of(rows_of_level(level), [7, 2, 3], dtype=dtype)
    found = decode(kernels.packed_loose_accept(step, EAGER))[0]
    assert np.isfinite(found).all()
    assert found.argmax() == 7
    for temperature in (0.01, 0.7, 1.0, 3.0, 100.0):
        for runtime_type in (np.float32, np.float16):
            with np.errstate(over="ignore"):
                scaled = (found - found.max()).astype(runtime_type) / runtime_type(temperature)
            assert (scaled < scaled[7]).sum() == len(scaled) - 1
            chances = np.exp(scaled.astype(np.float32)).astype(runtime_type)
            assert (chances < chances[7]).sum() == len(chances) - 1


def test_a_row_without_room_above_its_maximum_is_not_loosened(kernels: library.Kernels) -> None:
    """In float16 nothing is above 65504, and an infinity would not stay a number in a softmax."""
    for level, rows in ((64_000, [0]), (64_900, []), (65_504, [])):
        step = step_of(rows_of_level(level), [7, 2, 3], dtype="float16")
        assert loosened_rows(kernels, step, EAGER) == rows


def test_nothing_after_the_first_rejected_draft_is_rewritten(kernels: library.Kernels) -> None:
    """The second mismatch would be loosened, had the first one stood."""
    values = uncertain_rows([1, 2, 3, 4, 5, 6, 7])
    values[0, 1] = 50
    assert loosened_rows(kernels, step_of(values, [9, 2, 9, 4, 5, 6]), EAGER) == []
    values[0, 1] = 0.5
    assert loosened_rows(kernels, step_of(values, [9, 2, 9, 4, 5, 6]), EAGER) == [0, 2]


def test_an_entropy_at_the_threshold_loosens(kernels: library.Kernels) -> None:
    """Of a row whose choice is certain it is 0, exactly."""
    values = uncertain_rows([1, 2, 3, 4])
    values[0] = np.where(np.arange(50) == 1, 0, -np.inf)
    step = step_of(values, [7, 2, 3])
    assert loosened_rows(kernels, step, PackedPolicy(0.0, window=2, lookahead=1)) == [0]
    assert loosened_rows(kernels, step, PackedPolicy(1e-30, window=2, lookahead=1)) == []


def test_stop_tokens_and_what_is_no_token_are_not_loosened(kernels: library.Kernels) -> None:
    values = uncertain_rows([1, 2, 3, 4])
    assert loosened_rows(kernels, step_of(values, [7, 2, 3]), EAGER) == [0]
    for stops in ((7,), (30, 1), tuple(range(7, 40))):
        assert (
            loosened_rows(
                kernels, step_of(values, [7, 2, 3]), PackedPolicy(0.1, window=2, lookahead=1, stop_token_ids=stops)
            )
            == []
        )
    for draft in (-1, 50, 2**31 - 1, -(2**31)):
        assert loosened_rows(kernels, step_of(values, [draft, 2, 3]), EAGER) == []
    few = PackedPolicy(0.1, window=2, lookahead=1, vocab_size=40)
    assert loosened_rows(kernels, step_of(values, [45, 2, 3]), few) == []


def test_a_row_with_a_nan_is_not_loosened_and_agrees_with_no_draft(kernels: library.Kernels) -> None:
    for row in (0, 1):
        values = uncertain_rows([1, 2, 3, 4])
        values[row, 2] = np.nan
        for second in (2, -1, -2, -(2**31)):
            assert loosened_rows(kernels, step_of(values, [7, second, 3]), EAGER) == []


def test_padding_decides_nothing(kernels: library.Kernels) -> None:
    for content in (0.0, 1e9, np.inf, np.nan, -np.inf):
        values = uncertain_rows([1, 2, 3, 4])
        values[:, 40:] = content
        policy = PackedPolicy(0.1, window=2, lookahead=1, vocab_size=40)
        assert loosened_rows(kernels, step_of(values, [7, 2, 3]), policy) == [0]


def test_drafts_of_one_request_do_not_reach_into_the_next(kernels: library.Kernels) -> None:
    """Two requests with one token of context each, so that all rows of the step are of neighbouring tokens."""
    values = uncertain_rows([1, 2, 3, 4, 5, 6, 7, 8])
    ids = int32(0, 9, 2, 3, 0, 9, 6, 7)
    step = PackedStep(encode(values, "float32"), np.arange(1, 9), ids, int32(4, 4))
    assert loosened_rows(kernels, step, EAGER) == [0, 4]
    assert loosened_rows(kernels, step, PackedPolicy(0.1, window=3, lookahead=1)) == []
    wide = PackedStep(encode(values, "float32"), np.arange(1, 9), ids, int32(8))
    assert packed.sequences_of(wide, 1)[0].drafts.tolist() == ids[1:].tolist()
    assert loosened_rows(kernels, wide, EAGER) == [0]  # the second's first token is a draft that is rejected


def test_a_step_of_generation_requests_alone_is_copied(kernels: library.Kernels) -> None:
    values = np.random.default_rng(3).normal(size=(5, 33))
    step = PackedStep(encode(values, "bfloat16"), np.arange(1, 6), int32(1, 2, 3, 4, 5), int32(9, 2, 1, 300, 7))
    assert loosened_rows(kernels, step, PackedPolicy(0.0, window=0, lookahead=0)) == []


def test_whatever_the_tensors_say_no_read_or_write_leaves_them(kernels: library.Kernels) -> None:
    """As while a builder times the plugin: any content, and shapes that no step has. The CPU build ends the process
    when a load leaves the logits."""
    rng = np.random.default_rng(5)
    extreme = [-(2**31), -1, 0, 1, 2, 3, 5, 2**31 - 1]
    for _ in range(200):
        rows, tokens, sequences = rng.integers(1, 12, 3)
        logits = encode(rng.normal(size=(rows, 9)), "float32")
        ids = np.sort(rng.choice(extreme, rows)) if rng.random() < 0.5 else rng.choice(extreme, rows)
        step = PackedStep(logits, ids, rng.choice(extreme, tokens), rng.choice(extreme, sequences))
        found = kernels.packed_loose_accept(step, PackedPolicy(0.0, window=0, lookahead=0))
        assert ((found == logits) | (found > logits)).all()
        assert np.isfinite(found).all()


class GuardedMemory(library.CpuMemory):
    """Pages that nothing may touch end what is uploaded, or begin it: such a read or write ends the process. Logits and
    the workspace are aligned, so that up to 255 bytes behind them are not guarded."""

    def __init__(self) -> None:
        self.protect = ctypes.CDLL(None).mprotect
        self.protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self.is_at_end = True

    def upload(self, array: library.Array, offset: int = 0) -> library.Array:
        page, alignment = mmap.PAGESIZE, 4 if array.dtype == np.int32 else 256
        pages = -(-array.nbytes // page)
        whole = np.frombuffer(mmap.mmap(-1, (pages + 2) * page), np.uint8)
        begin = page + ((pages * page - array.nbytes) // alignment * alignment if self.is_at_end else 0)
        for guard in (0, (pages + 1) * page):
            assert self.protect(whole.ctypes.data + guard, page, 0) == 0
        buffer = whole[begin : begin + array.nbytes]
        buffer[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        return buffer


def test_steps_that_contradict_themselves_stay_inside_their_tensors(
    kernels: library.Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real steps with a few numbers changed, or tensors cut: far into the kernels they look like steps."""
    memory, rng, has_loosened = GuardedMemory(), np.random.default_rng(11), 0
    monkeypatch.setattr(kernels, "memory", memory)
    for turn in range(600):
        memory.is_at_end = turn % 2 == 0
        step, _ = packed.random_step(rng, 9, 9, "float32", max_contexts=4, max_drafts=6)
        ids, lengths = step.last_token_ids.copy(), step.context_lengths.copy()
        for _ in range(rng.integers(0, 4)):
            changed = (ids, lengths)[rng.integers(2)]
            changed[rng.integers(len(changed))] += rng.integers(-3, 4)
        tokens = step.input_ids[: max(1, len(step.input_ids) - rng.choice([0, 0, 1, 3]))]
        lengths = lengths[: max(1, len(lengths) - rng.choice([0, 0, 0, 1]))]
        changed_step = PackedStep(step.logits, ids, tokens, lengths)
        found = kernels.packed_loose_accept(changed_step, PackedPolicy(0.0, window=0, lookahead=0))
        has_loosened += found.tobytes() != step.logits.tobytes()
    assert has_loosened > 50


def test_the_workspace_for_many_rows_suffices_for_fewer(kernels: library.Kernels) -> None:
    for vocab_size in (8, 4097, 128_256):
        sizes = [kernels.packed_workspace_bytes(rows, vocab_size, 3) for rows in (1, 2, 100)]
        assert 0 < sizes[0] <= sizes[1] <= sizes[2]
    assert kernels.packed_workspace_bytes(0, 10, 3) == kernels.packed_workspace_bytes(1, 0, 3) == 0


def test_invalid_arguments_are_refused_before_anything_runs(kernels: library.Kernels) -> None:
    step = step_of(uncertain_rows([1, 2, 3, 4]), [7, 2, 3])
    buffer = np.zeros(65_536, np.uint8)
    place = buffer.ctypes.data + -buffer.ctypes.data % 256

    def launch(workspace: int | None = place, workspace_bytes: int = 8192, **changed: Any) -> int:
        args = library.packed_args(step, EAGER)
        for name in ("logits", "rewritten", "last_token_ids", "input_ids", "context_lengths"):
            setattr(args, name, place)
        for name, value in changed.items():
            setattr(args, name, value)
        return kernels.launch_packed_loose_accept(args, workspace, workspace_bytes)

    for changed in (
        {"logits_type": 3},
        {"num_rows": -1},
        {"num_rows": 2**31},
        {"num_sequences": -1},
        {"num_tokens": -1},
        {"vocab_size": 0},
        {"vocab_size": 51},
        {"top_k": 0},
        {"top_k": 9},
        {"window": -1},
        {"lookahead": -1},
        {"num_stop_tokens": 65},
        {"logits": None},
        {"logits": place + 2},
        {"rewritten": None},
        {"last_token_ids": None},
        {"input_ids": None},
        {"context_lengths": None},
        {"workspace": None},
        {"workspace": place + 16},
        {"workspace_bytes": 200},
    ):
        assert launch(**changed) == INVALID_VALUE, changed
    assert not buffer.any()
    assert launch(num_rows=0, logits=None) == 0


class TableTarget:
    """A target whose logits are a table by position and last token: of some rows sure, of others of four tokens not.
    Its draft model knows what it is sure of, and guesses the rest."""

    PERIOD = 31

    def __init__(self, rng: np.random.Generator, vocab_size: int, padding: int) -> None:
        self.vocab_size = vocab_size
        self.logits = rng.normal(size=(self.PERIOD, vocab_size, vocab_size + padding)) - 8
        self.logits[..., vocab_size:] = 0
        self.guess = np.zeros((self.PERIOD, vocab_size), np.int64)
        for place in np.ndindex(self.PERIOD, vocab_size):
            likely = rng.choice(vocab_size, 4 if rng.random() < 0.25 else 1, replace=False)
            self.logits[place][likely] = rng.uniform(2, 3, len(likely))
            self.guess[place] = rng.choice(likely)

    def rows(self, tokens: list[int], start: int) -> np.ndarray:
        """The logits after each of the tokens, of which the first has this position."""
        return np.stack([self.logits[(start + i) % self.PERIOD, token] for i, token in enumerate(tokens)])

    def draft(self, tokens: list[int], length: int) -> list[int]:
        drafts: list[int] = []
        for position in range(len(tokens) - 1, len(tokens) - 1 + length):
            token = drafts[-1] if drafts else tokens[-1]
            drafts.append(int(self.guess[position % self.PERIOD, token]))
        return drafts


def fly_continuation(
    target: TableTarget, start: int, lengths: list[int], policy: PackedPolicy, dtype: str
) -> list[int]:
    """What FLy makes of rounds with drafts of these lengths, of one request, from logits that nobody rewrote."""
    rule = FlyPolicy(policy.entropy_threshold, policy.use_full_entropy, policy.window, policy.lookahead)
    tokens = [start]
    for length in lengths:
        drafts = target.draft(tokens, length)
        rows = target.rows([tokens[-1], *drafts], len(tokens) - 1)
        values = decode(encode(rows[:, : target.vocab_size], dtype))
        chances = np.exp(values - values.max(axis=1, keepdims=True))
        chances /= chances.sum(axis=1, keepdims=True)
        top = -np.sort(-chances, axis=1)[:, : policy.entropy_top_k]
        gate = -(top * np.log(top)).sum(axis=1)
        verdict = accept(np.array(drafts, np.int64), values.argmax(axis=1), gate, rule, frozenset())
        assert verdict.next_token is not None
        tokens += [*drafts[: verdict.num_accepted], verdict.next_token]
    return tokens


@pytest.mark.parametrize("dtype", TYPES)
def test_a_runtime_that_knows_nothing_of_the_rule_decodes_what_it_decodes(kernels: library.Kernels, dtype: str) -> None:
    """Requests of many rounds in one batch: drafts in the context phase with any part of the prompt reused, others
    without drafts, some of them in the generation phase."""
    rng = np.random.default_rng(11)
    loosened = 0
    for padding in (0, 24):
        target = TableTarget(rng, 40, padding)
        policy = PackedPolicy(0.3, window=2, lookahead=1, vocab_size=40)
        rounds, requests = 25, 6
        lengths = rng.choice([0, 2, 5, 12], (requests, rounds)).tolist()
        starts = rng.integers(0, 40, requests).tolist()
        sequences = [[start] for start in starts]
        for index in range(rounds):
            drafts = [target.draft(tokens, lengths[r][index]) for r, tokens in enumerate(sequences)]
            generating = [r for r in range(requests) if not drafts[r] and rng.random() < 0.5]
            contexts = [r for r in range(requests) if r not in generating]
            order = contexts + generating
            pieces, rows, last_token_ids, context_lengths = [], [], [], []
            for r in order:
                chunk = 1 if r in generating else int(rng.integers(1, len(sequences[r]) + 1))
                begin = sum(map(len, pieces))
                pieces.append(sequences[r][-chunk:] + drafts[r])
                rows.append(target.rows([sequences[r][-1], *drafts[r]], len(sequences[r]) - 1))
                last_token_ids += range(begin + chunk, begin + len(pieces[-1]) + 1)
                context_lengths.append(len(sequences[r]) if r in generating else len(pieces[-1]))
            step = PackedStep(
                encode(np.concatenate(rows), dtype),
                int32(*last_token_ids),
                int32(*itertools.chain(*pieces)),
                int32(*context_lengths),
            )
            found = kernels.packed_loose_accept(step, policy)
            for r, sequence in zip(order, packed.sequences_of(step, len(contexts)), strict=True):
                accepted = packed.stock_accepted(found, target.vocab_size, sequence)
                chosen = decode(found[sequence.rows, : target.vocab_size]).argmax(axis=1)
                loosened += int((decode(step.logits[sequence.rows, :40]).argmax(axis=1) != chosen).sum())
                sequences[r] += [*drafts[r][:accepted], int(chosen[accepted])]
        for r in range(requests):
            assert sequences[r] == fly_continuation(target, starts[r], lengths[r], policy, dtype)
    assert loosened > 20
