"""A run of fly-tune, from a prompts file to its result: what is asked for is checked, engines are loaded once,
candidates are searched and judged.
"""

import dataclasses
import datetime
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fly_trt
from fly_trt.benchmark.likelihood import Likelihood
from fly_trt.benchmark.report import engine_record, machine_record, version_record
from fly_trt.benchmark.workload import BenchmarkPrompt, read_prompts
from fly_trt.checks import check_at_least
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import ConfigError, RequestError
from fly_trt.params import SamplingParams
from fly_trt.text.prompts import Prompt, PromptReader
from fly_trt.tuning.quality import DEFAULT_COMMAND_TIMEOUT, Judge, make_judge
from fly_trt.tuning.result import Candidate, CandidateResult, TuningResult, TuningSettings
from fly_trt.tuning.run import Assessor, Report, Run
from fly_trt.tuning.search import Search, SearchOutcome, split_prompts
from fly_trt.tuning.search_space import SearchSpace
from fly_trt.tuning.statistics import load_scipy_stats
from fly_trt.tuning.store import Store
from fly_trt.tuning.trials import Trials
from fly_trt.tuning.verdict import Rules, conclude

DEFAULT_CANDIDATES = 40
DEFAULT_FINALISTS = 3
DEFAULT_BUDGET = 30.0
# What decides what is measured, beside the engines and the prompts.
IDENTITY = (
    *("seed", "max_tokens", "chat", "concurrency", "min_retention", "confidence", "num_candidates", "num_finalists"),
    *("methods", "acceptances", "score_command", "num_threads"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TuningConfig:
    """What to tune for.

    prompts: a JSON Lines file. chat: put them into the model's chat template. max_tokens: of an answer at most.
    concurrency: requests in flight. min_retention: the share of the target's quality that is to be kept; confidence:
    with which that is claimed. judge, score_command, score_timeout: as make_judge has them, in
    seconds. methods, acceptances: drafters and
    policies to look at, none means all. num_candidates, num_finalists: how many are tried, and judged. budget: minutes,
    None for no limit. seed: of the order of the prompts and of the candidates that are drawn. state: where measurements
    are kept, so that the run can be continued; None keeps none. num_threads, devices: of the engines.
    """

    prompts: Path
    chat: bool = False
    max_tokens: int = 256
    concurrency: int = 1
    min_retention: float = 0.99
    confidence: float = 0.95
    judge: str | None = None
    score_command: str | None = None
    score_timeout: float = DEFAULT_COMMAND_TIMEOUT
    methods: Sequence[str] = ()
    acceptances: Sequence[str] = ()
    num_candidates: int = DEFAULT_CANDIDATES
    num_finalists: int = DEFAULT_FINALISTS
    budget: float | None = DEFAULT_BUDGET
    seed: int = 0
    state: Path | None = None
    num_threads: int | None = None
    devices: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for name in ("concurrency", "num_candidates", "num_finalists", "max_tokens"):
            check_at_least(name, getattr(self, name), 1)
        check_at_least("seed", self.seed, 0)
        for name in ("min_retention", "confidence"):
            if not 0 < (value := getattr(self, name)) < 1:
                lossless = "; acceptance exact tries lossless settings alone" if name == "min_retention" else ""
                raise ConfigError(f"{name} {value:g}: expected a share between 0 and 1, such as 0.95{lossless}")
        if self.budget is not None and not 0 < self.budget < math.inf:
            raise ConfigError(f"budget {self.budget:g}: expected minutes, above 0")
        if not 0 < self.score_timeout < math.inf:
            raise ConfigError(f"score_timeout {self.score_timeout:g}: expected seconds, above 0")
        SamplingParams(max_tokens=self.max_tokens)


def run_tuning(engine_dir: Path, config: TuningConfig, report: Report = lambda progress: None) -> TuningResult:
    """Raises ConfigError for what does not fit, before an engine is loaded, EngineError for a directory that cannot be
    used, and OSError for a state that cannot be written."""
    load_scipy_stats()
    prompts = read_distinct(config.prompts)
    with LoadedEngines(
        engine_dir, max_batch_size=config.concurrency, num_threads=config.num_threads, devices=config.devices
    ) as engines:
        _check_engines(engines, config)
        space = SearchSpace(engines.manifest, config.methods, config.acceptances)
        candidates = space.candidates(config.num_candidates, config.seed)
        given = token_prompts(engines, config, prompts)
        likelihood = Likelihood(engines)
        judge = make_judge(
            prompts,
            likelihood,
            judge=config.judge,
            score_command=config.score_command,
            command_timeout=config.score_timeout,
        )
        search_prompts, judge_prompts = split_prompts(len(prompts), config.seed)
        with (
            Store(config.state, _identity(engines, config, judge, candidates)) as store,
            Trials(engines, config.concurrency, config.max_tokens) as trials,
        ):
            run = Run(trials, store, Assessor(judge, likelihood, engines.turn), given, config.budget, report)
            search = Search(run, candidates, search_prompts, judge_prompts, config.min_retention, config.num_finalists)
            found = search.run()
        rules = Rules(judge.kind, config.min_retention, config.confidence, config.seed)
        blocks = [list({one.prompt_index: None for one in block}) for block in store.blocks(store.plans)]
        results, verdict = conclude(candidates, store.outcomes(), rules, blocks)
        return TuningResult(
            settings=_settings(engines, config, judge, len(prompts)),
            candidates=[_with_reason(result, found) for result in results],
            verdict=verdict,
            search_prompts=found.search_prompts,
            judge_prompts=found.judge_prompts,
            engine=engine_record(engines),
            machine=machine_record(engines),
            versions=version_record(engines.manifest),
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            seconds=store.elapsed,
            was_complete=found.was_complete,
        )


def read_distinct(path: Path) -> list[BenchmarkPrompt]:
    """The prompts of a file, each text once: one that chooses must not judge. Raises ConfigError."""
    prompts = list({prompt.prompt: prompt for prompt in reversed(read_prompts(path))}.values())[::-1]
    if len(prompts) < 2:
        raise ConfigError(f"{path}: one prompt: tuning takes one to choose by and others to judge by: give more")
    return prompts


def token_prompts(engines: LoadedEngines, config: TuningConfig, prompts: Sequence[BenchmarkPrompt]) -> list[Prompt]:
    """The prompts as the engines take them. Raises ConfigError for one that does not fit."""
    manifest = engines.manifest
    limit = manifest.limits.max_seq_len
    reader = PromptReader(
        engines.tokenizer, engines.directory / "tokenizer", vocab_size=manifest.target.vocab_size, max_seq_len=limit
    )
    given: list[Prompt] = []
    for prompt in prompts:
        start = str(prompt.prompt)[:40]
        try:
            if config.chat:
                token_ids = reader.render_chat(prompt.as_messages())["prompt_token_ids"]
            else:
                token_ids = reader.tokenize(prompt.prompt)
        except RequestError as error:
            raise ConfigError(f"{config.prompts}: {start!r}: {error}") from None
        if len(token_ids) >= limit:
            raise ConfigError(
                f"{config.prompts}: {start!r} has {len(token_ids)} tokens, max_seq_len is {limit} with the answer: "
                "leave it out, or rebuild with a larger --max-seq-len"
            )
        given.append({"prompt_token_ids": token_ids})
    return given


def _check_engines(engines: LoadedEngines, config: TuningConfig) -> None:
    manifest = engines.manifest
    if engines.backend.schedules:
        raise ConfigError(
            f"{engines.directory}: {manifest.backend} loads its models by itself, and candidates share what is loaded "
            "once: tune a directory of another backend"
        )
    limit = manifest.limits.max_batch_size
    if config.concurrency > limit:
        raise ConfigError(
            f"concurrency {config.concurrency}: {manifest.name} was built for {limit} requests in flight: rebuild with "
            f"--max-batch-size {config.concurrency}"
        )


def _identity(
    engines: LoadedEngines, config: TuningConfig, judge: Judge, candidates: Sequence[Candidate]
) -> Mapping[str, Any]:
    machine = machine_record(engines)
    return {
        "fly-trt version": fly_trt.__version__,
        "engine": engines.manifest.engine_sha256(),
        "default of the engine": engines.manifest.speculative,
        "machine": {name: machine[name] for name in ("cpu", "num_cores", "gpu")},
        "prompts file": _sha256(config.prompts),
        "judge": judge.kind,
        **{name: getattr(config, name) for name in IDENTITY},
        # Of a program that has policies or drafters of its own, which the version says nothing of.
        "list of candidates": hashlib.sha256(repr([one.name for one in candidates]).encode()).hexdigest(),
    }


def _settings(engines: LoadedEngines, config: TuningConfig, judge: Judge, num_prompts: int) -> TuningSettings:
    own = {field.name for field in dataclasses.fields(TuningSettings)}
    extra = {name: getattr(config, name) for name in (*IDENTITY, "budget") if name not in own}
    return TuningSettings(
        prompts=str(config.prompts),
        prompts_sha256=_sha256(config.prompts),
        num_prompts=num_prompts,
        judged_by=judge.kind,
        min_retention=config.min_retention,
        confidence=config.confidence,
        seed=config.seed,
        max_tokens=config.max_tokens,
        extra=extra | {"default": engines.manifest.speculative},
    )


def _with_reason(result: CandidateResult, found: SearchOutcome) -> CandidateResult:
    """With the search's word on what did not get through it."""
    if result.stage == "judge":
        return result
    return dataclasses.replace(result, verdict=found.dropped.get(result.candidate.name, result.verdict))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
