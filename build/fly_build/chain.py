"""`--inner-draft`: whether the inner draft shall guess for the draft, and how many tokens at a time.

Under a loose rule tokens depend on the draft, and so the choice depends on no clock of the machine that serves: it is
made here once, from the times of a step and from how often the models agree, and stands in fly.json.
"""

import logging
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from fly_build.backends import Backend
from fly_build.calibration import calibration_prompts
from fly_build.latency import MAX_LENGTH, Stack, StepTime, best_lengths, best_stack
from fly_build.measure import estimated_step_times, step_times
from fly_build.progress import Report
from fly_build.schema import ChainSettings
from fly_trt.engines import Engine, load_engine
from fly_trt.manifest import Chain, Manifest
from fly_trt.tokens import IntArray

INNER, DRAFT, TARGET = range(3)
# What a draft model verifies at once, whatever it could (fly_trt/drafting/model.py).
MAX_GUESS = 15
MAX_PROMPTS, MAX_PROMPT_TOKENS, NUM_SAID = 8, 256, 48

logger = logging.getLogger(__name__)


def add_chain(
    manifest: Manifest, settings: ChainSettings, backend: Backend, directory: Path, report: Report
) -> Manifest:
    """The manifest with what was expected of the chain, and with `method` and `inner_num_tokens` among its speculative
    defaults, where they are not given. Where agreement is neither given nor measured nothing is chosen."""
    assert manifest.draft is not None
    assert manifest.inner_draft is not None
    report("chain", 0.0)
    models = (manifest.inner_draft, manifest.draft, manifest.target)
    given = {(DRAFT, TARGET): settings.draft_acceptance, (INNER, DRAFT): settings.inner_draft_acceptance}
    acceptance = {pair: rate for pair, rate in given.items() if rate is not None}
    if backend.runs_where_built:
        with ExitStack() as stack:
            engines = [
                stack.enter_context(closing(load_engine(directory, manifest, model, num_slots=1))) for model in models
            ]
            times = step_times(engines, manifest)
            if len(acceptance) < len(given):
                acceptance = (
                    _agreement(engines, _prompts(settings, directory, manifest.limits.max_seq_len)) | acceptance
                )
    else:
        times = estimated_step_times(models)
    report("chain", 1.0)
    if len(acceptance) < len(given):
        logger.warning(
            "inner_draft: not used unless asked for by method chain: the engines do not run here, and nobody says how "
            "often the models agree: give draft_acceptance and inner_draft_acceptance in the recipe's chain"
        )
        return manifest
    return _chosen(manifest, times, acceptance)


def _chosen(manifest: Manifest, times: list[StepTime], acceptance: dict[tuple[int, int], float]) -> Manifest:
    longest = [0, MAX_GUESS, max(1, min(MAX_LENGTH, manifest.limits.max_draft_len))]
    without = best_lengths((DRAFT, TARGET), times, acceptance, longest)
    chain = best_lengths((INNER, DRAFT, TARGET), times, acceptance, longest)
    _warn_where_less_is_faster(best_stack(times, acceptance, longest), without, chain)
    step = times[TARGET].single
    record = Chain(
        draft_acceptance=round(acceptance[DRAFT, TARGET], 4),
        inner_draft_acceptance=round(acceptance[INNER, DRAFT], 4),
        num_tokens=chain.lengths[0],
        tokens_per_step_time=float(f"{step / chain.time_per_token:.3g}"),
        tokens_per_step_time_without=float(f"{step / without.time_per_token:.3g}"),
    )
    method = "chain" if chain.time_per_token < without.time_per_token else "multi_level"
    chosen = {"method": method, "inner_num_tokens": record.num_tokens}
    return manifest.model_copy(update={"chain": record, "speculative": chosen | manifest.speculative})


def _warn_where_less_is_faster(best: Stack, *stacks: Stack) -> None:
    if best.models == (INNER, TARGET) and all(best.time_per_token < stack.time_per_token for stack in stacks):
        logger.warning("inner_draft: faster as the only draft, without the other one: build with it as --draft")


def _prompts(settings: ChainSettings, directory: Path, max_seq_len: int) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    texts = calibration_prompts(settings.calibrate)[:MAX_PROMPTS]
    longest = min(MAX_PROMPT_TOKENS, max_seq_len // 2)
    return [ids[:longest] for text in texts if (ids := tokenizer.encode(text).ids)]


def _agreement(engines: list[Engine], prompts: list[list[int]]) -> dict[tuple[int, int], float]:
    """How often two models say the same next token, by their indexes, where the target goes on from the prompts."""
    said: list[list[IntArray]] = [[] for _ in engines]
    for prompt in prompts:
        text = _continued(engines[TARGET], prompt)
        for choices, engine in zip(said, engines, strict=True):
            choices.append(_choices(engine, text[:-1])[len(prompt) - 1 :])
    inner, draft, target = (np.concatenate(choices) for choices in said)
    pairs = {(INNER, DRAFT): (inner, draft), (INNER, TARGET): (inner, target), (DRAFT, TARGET): (draft, target)}
    return {pair: float(np.mean(one == other)) for pair, (one, other) in pairs.items()}


def _continued(engine: Engine, prompt: list[int]) -> IntArray:
    """The prompt, and what the model says after it until it ends."""
    room = engine.info.max_seq_len - len(prompt)
    tokens = [*prompt, int(_choices(engine, np.array(prompt))[-1])]
    step = engine.step(0, 1, 1)
    while len(tokens) - len(prompt) < min(NUM_SAID, room) and tokens[-1] not in engine.info.stop_token_ids:
        step.set_row(0, len(tokens) - 1, np.array(tokens[-1:]))
        engine.run(step)
        tokens.append(int(step.next_token[0]))
    return np.array(tokens)


def _choices(engine: Engine, tokens: IntArray) -> IntArray:
    """What the model says after each token of a sequence. Tokens that its vocabulary does not have are read as its
    last one, as a drafter reads them."""
    tokens = np.minimum(tokens, engine.info.vocab_size - 1)
    choices = []
    for start in range(0, len(tokens), engine.info.max_num_tokens):
        part = tokens[start : start + engine.info.max_num_tokens]
        step = engine.step(0, 1, len(part))
        step.set_row(0, start, part)
        engine.run(step)
        choices.append(step.argmax[0].copy())
    return np.concatenate(choices)
