"""`--self-draft`: drafts made of the target's own blocks, one for each context, chosen on text and measured.

It brings together texts, the times of a step, the knapsack and the backend that writes a graph whose weights are the
target's. Source: KnapSpec (arXiv 2602.20217), at build time: no set changes while a request runs.
"""

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from fly_build import knapsack
from fly_build.backends import Backend
from fly_build.blocks import BlockDecoder, check_blocks, kept_attentions, num_blocks
from fly_build.calibration import calibration_text
from fly_build.checkpoint import Checkpoint
from fly_build.knapsack import BlockTimes, Prospect
from fly_build.linear_form import Kernels
from fly_build.linear_forms import bits_per_weight
from fly_build.measure import measure_target_steps
from fly_build.model_build import ModelBuild
from fly_build.plan import ModelPlan
from fly_build.progress import Report
from fly_build.schema import SelfDraftSettings
from fly_build.tensors import Tensors, plain_tensors
from fly_trt.errors import ConfigError
from fly_trt.manifest import Limits, Manifest, ModelEngine, SelfDraft, hash_file

DEFAULT_CONTEXT = 512
# Tokens that agreement is measured on: in 8 texts of 32 at a context of 512, in one of 128 at 4,096.
MAX_TEXTS, MAX_READ_TOKENS = 8, 4096
MAX_REFERENCE_TOKENS, MIN_TEXT_TOKENS, MAX_TEXT_TOKENS = 256, 32, 128
MAX_MEASURED = 4  # sets by context that are run as they will be: with keys and values of their own

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Choice:
    """The blocks to skip at a context, how often the rest says what the target says, and what that promises."""

    context: int
    skipped: tuple[int, ...]
    agreement: float
    prospect: Prospect


def contexts_of(settings: SelfDraftSettings, limits: Limits) -> list[int]:
    """Tokens at which a draft is chosen, in rising order."""
    return sorted(set(settings.contexts or [min(DEFAULT_CONTEXT, limits.max_seq_len // 2)]))


def check_self_draft(settings: SelfDraftSettings, checkpoint: Checkpoint, limits: Limits) -> None:
    """Raises ConfigError or CheckpointError for what could not be built. Reads no weights."""
    if checkpoint.scheme is not None:
        raise ConfigError(
            f"self_draft: {checkpoint.name} is quantised ({checkpoint.scheme.method}), and the blocks to leave out are "
            "chosen with the original's weights: give the original, or --draft"
        )
    check_blocks(checkpoint)
    if (longest := contexts_of(settings, limits)[-1]) >= limits.max_seq_len:
        raise ConfigError(
            f"contexts {longest}: sequences have {limits.max_seq_len} tokens at most: use a smaller context, or raise "
            "--max-seq-len"
        )
    if limits.max_draft_len == 0:
        raise ConfigError("max_draft_len 0: a self-draft drafts one token at least: raise --max-draft-len")
    calibration_text(settings.calibrate)


def add_self_drafts(
    manifest: Manifest,
    settings: SelfDraftSettings,
    checkpoint: Checkpoint,
    backend: Backend,
    workspace: Path,
    report: Report,
) -> Manifest:
    """The manifest with a self-draft for each context, whose engines are built beside the target's in `workspace`."""
    contexts = contexts_of(settings, manifest.limits)
    report("self-draft: measure", 0.0)
    times = _step_times(settings, contexts, manifest, checkpoint, workspace, backend.kernels)
    report("self-draft: measure", 1.0)
    text = calibration_text(settings.calibrate)
    tensors = plain_tensors(checkpoint.name, checkpoint.load_weights())
    chooser = _Chooser(BlockDecoder(checkpoint, tensors), checkpoint, text, manifest)
    choices = [chooser.choose(context, times[context], report) for context in contexts]
    del chooser
    drafts: list[SelfDraft] = []
    engine, previous = None, None
    for choice in choices:
        if engine is None or choice.skipped != previous:
            engine = _build_engine(choice, manifest, checkpoint, tensors, backend, workspace, report)
            previous = choice.skipped
        drafts.append(_record(choice, engine, min_tokens=choice.context if drafts else 0))
        _warn_where_it_does_not_pay(choice)
    files = {draft.engine.model: hash_file(workspace / draft.engine.model) for draft in drafts}
    return manifest.model_copy(update={"self_drafts": drafts, "files": manifest.files | files})


class _Chooser:
    """Chooses the blocks to skip at a context, on texts that the target goes on with by itself."""

    def __init__(self, decoder: BlockDecoder, checkpoint: Checkpoint, text: str, manifest: Manifest) -> None:
        self._decoder = decoder
        self._checkpoint = checkpoint
        self._limits = manifest.limits
        self._stop_token_ids = torch.tensor(manifest.head.stop_token_ids, dtype=torch.int64)
        tokenizer = checkpoint.tokenizer
        self._begin: list[int] = tokenizer("")["input_ids"]
        self._stream = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        self._num_blocks = num_blocks(checkpoint)

    def choose(self, context: int, times: BlockTimes, report: Report) -> Choice:
        """Of the knapsack's sets the ones that promise most are run as they will be, and the best of these is taken."""
        step = f"self-draft {context}: choose blocks"
        report(step, 0.0)
        prefix, asked, said = self._references(context)
        sets = self._candidates(asked, said, times, lambda fraction: report(step, 0.8 * fraction))
        if not sets:
            raise ConfigError(
                f"{self._checkpoint.name}: at a context of {context} no block can be skipped without changing what "
                "follows beyond recognition: leave --self-draft out"
            )
        measured = []
        for index, skipped in enumerate(sets):
            agreement = self._agreement(prefix, asked, said, skipped)
            prospect = knapsack.prospect(agreement, skipped, self._num_blocks, times)
            measured.append(Choice(context, skipped, agreement, prospect))
            report(step, 0.8 + 0.2 * (index + 1) / len(sets))
        return max(measured, key=lambda choice: choice.prospect.tokens_per_step_time)

    def _references(self, context: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """int64 [m, n] of texts, [m, r] tokens that follow, and [m, r] tokens that the target chooses after each of
        these: it goes on from the text by itself, greedily and without an end."""
        num_texts = max(1, min(MAX_TEXTS, MAX_READ_TOKENS // context))
        num_said = max(MIN_TEXT_TOKENS, min(MAX_TEXT_TOKENS, MAX_REFERENCE_TOKENS // num_texts))
        num_said = min(num_said, self._limits.max_seq_len // 2)
        num_read = min(context, self._limits.max_seq_len - num_said)
        offsets = torch.arange(num_read) + (torch.arange(num_texts) * len(self._stream) // num_texts)[:, None]
        texts = self._stream[offsets % len(self._stream)]
        num_begin = min(len(self._begin), num_read - 1)
        texts[:, :num_begin] = torch.tensor(self._begin[:num_begin], dtype=torch.int64)
        decoder = self._decoder
        decoder.start(num_read + num_said)
        prefix, token = texts[:, :-1], texts[:, -1:]
        decoder.read(prefix)
        asked = [token]
        for _ in range(num_said):
            asked.append(self._choices(decoder.read(asked[-1])))
        decoder.rewind(num_read - 1)
        tokens = torch.cat(asked, dim=1)
        return prefix, tokens[:, :-1], tokens[:, 1:]

    def _candidates(
        self, asked: torch.Tensor, said: torch.Tensor, times: BlockTimes, advance: Callable[[float], None]
    ) -> list[tuple[int, ...]]:
        """The knapsack's sets that promise most, the best first. What they attend to is the target's, so far."""
        decoder, total = self._decoder, self._num_blocks
        of_attention, of_mlp = times.weights()
        found = knapsack.candidates(
            _Reporting(decoder, total, advance),
            decoder.look(asked),
            [of_mlp if block % 2 else of_attention for block in range(total)],
            knapsack.always_kept(total),
            (of_attention + of_mlp) * total // 4,
        )
        promised = []
        for candidate in found:
            if candidate.skipped:
                agreement = _share(self._choices(decoder.normed(candidate.hidden)) == said)
                prospect = knapsack.prospect(agreement, candidate.skipped, total, times)
                promised.append((prospect.tokens_per_step_time, candidate.skipped))
        promised.sort(key=lambda promise: -promise[0])
        return [skipped for _, skipped in promised[:MAX_MEASURED]]

    def _agreement(
        self, prefix: torch.Tensor, asked: torch.Tensor, said: torch.Tensor, skipped: Collection[int]
    ) -> float:
        decoder = self._decoder
        decoder.start(prefix.shape[1] + asked.shape[1])
        decoder.read(prefix, skipped)
        return _share(self._choices(decoder.read(asked, skipped)) == said)

    def _choices(self, hidden: torch.Tensor) -> torch.Tensor:
        """int64 [m, T]: the most probable tokens but for those that end a text."""
        logits = self._decoder.logits(hidden)
        logits[..., self._stop_token_ids] = -torch.inf
        return logits.argmax(dim=-1)


class _Reporting:
    """Runs blocks and says how far it has come."""

    def __init__(self, decoder: BlockDecoder, total: int, advance: Callable[[float], None]) -> None:
        self._decoder, self._total, self._advance = decoder, total, advance

    def run(self, block: int, hidden: torch.Tensor) -> torch.Tensor:
        self._advance(block / self._total)
        return self._decoder.run(block, hidden)


def _share(flags: torch.Tensor) -> float:
    return float(flags.double().mean())


def _step_times(
    settings: SelfDraftSettings,
    contexts: list[int],
    manifest: Manifest,
    checkpoint: Checkpoint,
    workspace: Path,
    kernels: Kernels,
) -> dict[int, BlockTimes]:
    """By context, as given or as measured: what a longer context adds is the attentions', the rest is divided by the
    sizes of the weights, which a step of one token has to read."""
    if (given := settings.step_times) is not None:
        each = given.attention_per_1000_tokens / 1000
        return {
            context: BlockTimes(given.attention + each * context, given.mlp, given.head, given.further_token)
            for context in contexts
        }
    (shortest, *steps), further = measure_target_steps(manifest, workspace, [1, *contexts])
    num_layers = num_blocks(checkpoint) // 2
    sizes = _sizes(checkpoint, manifest.target, kernels)
    attention, mlp, head = (shortest * size / sum(sizes) for size in sizes)
    return {
        context: BlockTimes((attention + max(0.0, step - shortest)) / num_layers, mlp / num_layers, head, further)
        for context, step in zip(contexts, steps, strict=True)
    }


def _sizes(checkpoint: Checkpoint, engine: ModelEngine, kernels: Kernels) -> tuple[float, float, float]:
    """Of the weights that a step of one token reads: of all attentions, all MLPs, and the projection; in bits."""
    plain = 32 if engine.dtype == "float32" else 16
    model, config = checkpoint.empty_model, checkpoint.config
    bits, projection_bits = bits_per_weight(kernels, engine.quantization, plain)

    def size(module: torch.nn.Module) -> float:
        experts = sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 3)
        others = sum(parameter.numel() for parameter in module.parameters()) - experts
        total = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 1
        return others * bits + experts * plain * (getattr(config, "num_experts_per_tok", None) or 1) / total

    layers = model.model.layers
    head = model.get_output_embeddings().weight.numel() * projection_bits
    return sum(size(layer.self_attn) for layer in layers), sum(size(layer.mlp) for layer in layers), head


def _build_engine(
    choice: Choice,
    manifest: Manifest,
    checkpoint: Checkpoint,
    tensors: Tensors,
    backend: Backend,
    workspace: Path,
    report: Report,
) -> ModelEngine:
    """Beside the target: ONNX Runtime reads no weights from outside of a graph's folder."""
    folder, _, file = manifest.target.model.rpartition("/")
    attentions = kept_attentions(num_blocks(checkpoint), choice.skipped)
    engine = manifest.target.model_copy(
        update={
            "model": f"{folder}/self_draft_{choice.context}{Path(file).suffix}",
            "num_layers": len(attentions),
        }
    )
    model = ModelPlan(folder, checkpoint, engine, choice.skipped, f"self-draft {choice.context}", backend.kernels)
    build = ModelBuild(model, manifest.limits, manifest.head, workspace, report)
    return backend.build_sharing(build, manifest.target, tensors)


def _record(choice: Choice, engine: ModelEngine, *, min_tokens: int) -> SelfDraft:
    num_layers = engine.num_layers + sum(block % 2 == 0 for block in choice.skipped)
    return SelfDraft(
        min_tokens=min_tokens,
        kept_attentions=kept_attentions(2 * num_layers, choice.skipped),
        kept_mlps=[layer for layer in range(num_layers) if 2 * layer + 1 not in choice.skipped],
        agreement=round(choice.agreement, 4),
        draft_length=choice.prospect.draft_length,
        tokens_per_step_time=round(choice.prospect.tokens_per_step_time, 4),
        engine=engine,
    )


def _warn_where_it_does_not_pay(choice: Choice) -> None:
    if (expected := choice.prospect.tokens_per_step_time) < 1:
        logger.warning(
            "self-draft at %d tokens: at best %.2f of plain decoding's speed is expected (agreement %.2f): n-gram "
            "lookup alone may be faster",
            choice.context,
            expected,
            choice.agreement,
        )
