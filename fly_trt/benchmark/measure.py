"""The measurement: all modes on the same loaded engines, the same prompts and the same loads, by turns.

One request at a time, the modes take turns prompt by prompt; under any other load, with the whole set. Either way a
machine that slows down for a while slows all of them. Each load begins with requests that are not measured, and ends
with what takes no part in the times: how probable the target finds what the modes emitted.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fly_trt.benchmark.client import Client, Load
from fly_trt.benchmark.likelihood import Likelihood
from fly_trt.benchmark.modes import choose_modes
from fly_trt.benchmark.results import Round, Row, summarise
from fly_trt.benchmark.step_log import NotedStep, StepLog
from fly_trt.benchmark.workload import BenchmarkPrompt, built_in_prompts, random_prompts, read_prompts, repeated
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import ConfigError, RequestError
from fly_trt.outputs import RequestOutput
from fly_trt.params import SamplingParams, SpeculativeConfig
from fly_trt.service.config import DEFAULT_MAX_QUEUE_SIZE, ServiceConfig
from fly_trt.service.service import Service
from fly_trt.text.prompts import Prompt

WARMUP_PROMPTS = 2  # for each request in flight

Progress = Callable[[str, int, int], None]
"""Told what is being done, how many completions are done, and of how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """What to measure.

    modes: as `read_modes` reads them; none means the usual ones that the engine directory can do. loads: how requests
    arrive, one after another. rounds: measured repetitions of each load. prompts: a JSON Lines file, or random_tokens:
    the length of random prompts; neither means the built-in prompts. num_prompts: taken from the front, and again from
    there where there are fewer. chat: put the prompts into the model's chat template. max_tokens, ignore_eos,
    temperature: as in SamplingParams. seed: of sampling, of random prompts and of arrivals. speculative: fields of
    SpeculativeConfig, for the modes that they fit. num_threads, devices: of the engines. perplexity: also find out how
    probable the target finds the outputs. traces: also have every mode complete every prompt once more, untimed, and
    keep how each token came to be.
    """

    modes: Sequence[str] = ()
    loads: Sequence[Load] = (Load(concurrency=1),)
    rounds: int = 3
    prompts: Path | None = None
    random_tokens: int | None = None
    num_prompts: int = 16
    chat: bool = False
    max_tokens: int = 128
    ignore_eos: bool = False
    temperature: float = 0.0
    seed: int = 0
    speculative: Mapping[str, Any] = field(default_factory=dict)
    num_threads: int | None = None
    devices: Sequence[int] | None = None
    perplexity: bool = True
    traces: bool = False

    def __post_init__(self) -> None:
        for name in ("rounds", "num_prompts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.seed < 0:
            raise ConfigError(f"seed {self.seed}: expected at least 0")
        if self.prompts is not None and self.random_tokens is not None:
            raise ConfigError("prompts and random_tokens: give one of them")
        if self.random_tokens is not None and self.chat:
            raise ConfigError("chat: random tokens are no message: leave out --chat or --random-tokens")
        if not self.loads:
            raise ConfigError("no load: give a concurrency or a request_rate")
        self.sampling_params()

    def sampling_params(self, *, is_traced: bool = False) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            seed=self.seed,
            speculation_trace=is_traced,
        )

    @property
    def most_in_flight(self) -> int | None:
        """Slots that the loads need; None means as many as the engines have."""
        concurrencies = [load.concurrency for load in self.loads]
        return None if None in concurrencies else max(c for c in concurrencies if c is not None)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """What was measured: `rows` by load and mode, `modes` as they were configured, the engines' load times in
    seconds, and the prompts with their checks. `traced`: by mode an output for each prompt, under the first load, where
    traces were asked for. `steps`: of each row, what the engines did in all of its rounds, where a log was kept."""

    engines: LoadedEngines
    config: BenchmarkConfig
    modes: dict[str, SpeculativeConfig]
    prompts: list[BenchmarkPrompt]
    rows: list[Row]
    traced: dict[str, list[RequestOutput]]
    steps: list[list[NotedStep]]


def run_benchmark(
    engine_dir: Path, config: BenchmarkConfig, progress: Progress = lambda what, done, total: None
) -> Benchmark:
    """Loads the engines once and measures every mode under every load.

    Raises ConfigError for what does not fit the engine directory, before any engine is loaded where that can be told,
    EngineError for a directory that cannot be used, and RequestError for a prompt that cannot be served.
    """
    slots = config.most_in_flight
    engines = LoadedEngines(engine_dir, max_batch_size=slots, num_threads=config.num_threads, devices=config.devices)
    if engines.backend.schedules:
        raise ConfigError(
            f"{engine_dir}: {engines.manifest.backend} loads its models by itself, and modes here share what is loaded "
            "once: measure it with trtllm-bench, or with LLM by one mode a process"
        )
    with engines:
        return measure_modes(engines, config, progress)


def measure_modes(
    engines: LoadedEngines, config: BenchmarkConfig, progress: Progress, log: StepLog | None = None
) -> Benchmark:
    """As `run_benchmark`, on engines that are there; `log`: what watches them, for `Benchmark.steps`."""
    _check_concurrency(config)
    limit = engines.manifest.limits.max_batch_size
    if engines.max_batch_size > limit:
        raise ConfigError(
            f"concurrency {engines.max_batch_size}: {engines.manifest.name} was built for {limit} requests in flight: "
            f"rebuild with --max-batch-size {engines.max_batch_size}"
        )
    modes = choose_modes(config.modes, engines.manifest, config.speculative)
    prompts = _prompts(config, engines)
    total = len(config.loads) * len(modes) * config.rounds * len(prompts)
    meter = _Meter(progress, total)
    benchmark = Benchmark(engines, config, modes, prompts, rows=[], traced={}, steps=[])
    meter.say("loading engines")
    for load in config.loads:
        _measure(benchmark, load, meter, log)
    return benchmark


class _Meter:
    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def say(self, what: str, num_more: int = 0) -> None:
        self._done += num_more
        self._progress(what, self._done, self._total)


def _check_concurrency(config: BenchmarkConfig) -> None:
    for load in config.loads:
        if (load.concurrency or 1) > config.num_prompts:
            raise ConfigError(
                f"concurrency {load.concurrency}: {config.num_prompts} prompts never are as many: raise --num-prompts"
            )


def _prompts(config: BenchmarkConfig, engines: LoadedEngines) -> list[BenchmarkPrompt]:
    if config.random_tokens is not None:
        vocab_size = engines.manifest.target.vocab_size
        return random_prompts(engines.tokenizer, vocab_size, config.random_tokens, config.num_prompts, config.seed)
    prompts = built_in_prompts() if config.prompts is None else read_prompts(config.prompts)
    return repeated(prompts, config.num_prompts)


def _measure(benchmark: Benchmark, load: Load, meter: _Meter, log: StepLog | None) -> None:
    """One load in all modes."""
    engines, config, prompts = benchmark.engines, benchmark.config, benchmark.prompts
    settings = ServiceConfig(
        max_batch_size=load.concurrency,
        max_queue_size=max(len(prompts), DEFAULT_MAX_QUEUE_SIZE),
        enable_prefix_caching=False,
    )
    services: dict[str, Service] = {}
    rounds: dict[str, list[Round]] = {mode: [] for mode in benchmark.modes}
    try:
        for mode, speculative_config in benchmark.modes.items():
            services[mode] = Service(engines, speculative_config, settings)
        given = [_as_given(prompt, config, services[mode]) for prompt in prompts]
        for mode, service in services.items():
            meter.say(f"warming up {mode}, {load}")
            num_warmup = WARMUP_PROMPTS * (load.concurrency or engines.max_batch_size)
            Client(service).complete(given[:num_warmup], config.sampling_params(), Load(request_rate=float("inf")))
        for number in range(config.rounds):
            for mode, round_ in _round(services, given, load, config, number, meter, log).items():
                rounds[mode].append(round_)
        if config.traces and load is config.loads[0]:
            for mode, service in services.items():
                meter.say(f"traces, {mode}")
                benchmark.traced[mode] = Client(service).outputs(given, config.sampling_params(is_traced=True), load)
    finally:
        for service in services.values():
            service.shutdown()
    if config.perplexity:
        meter.say(f"perplexity, {load}")
        _score(rounds, Likelihood(engines))
    benchmark.rows.extend(summarise(load, rounds, prompts))
    benchmark.steps.extend([step for round_ in own for step in round_.steps] for own in rounds.values())


def _round(
    services: Mapping[str, Service],
    prompts: list[Prompt],
    load: Load,
    config: BenchmarkConfig,
    number: int,
    meter: _Meter,
    log: StepLog | None,
) -> dict[str, Round]:
    """Every prompt in every mode once. Whose turn comes first changes with every turn."""
    shares = [[prompt] for prompt in prompts] if load.concurrency == 1 else [prompts]
    rounds = {mode: Round([], 0.0) for mode in services}
    order = list(services)
    log = log or StepLog()
    for turn, share in enumerate(shares, start=number):
        first = turn % len(order)
        for mode in order[first:] + order[:first]:
            meter.say(f"{mode}, {load}, round {number + 1} of {config.rounds}")
            log.take()
            client = Client(services[mode])
            exchanges, seconds = client.complete(share, config.sampling_params(), load, config.seed + number)
            rounds[mode].exchanges += exchanges
            rounds[mode].seconds += seconds
            rounds[mode].steps += log.take()
            meter.say(f"{mode}, {load}, round {number + 1} of {config.rounds}", len(share))
    return rounds


def _score(rounds: Mapping[str, list[Round]], likelihood: Likelihood) -> None:
    """Prompt by prompt, since outputs of the same prompt mostly begin alike."""
    every = [round_.exchanges for own in rounds.values() for round_ in own]
    for exchanges in zip(*every, strict=True):
        for exchange in exchanges:
            exchange.log_likelihood = likelihood.log_likelihood(exchange.prompt_token_ids, exchange.token_ids)


def _as_given(prompt: BenchmarkPrompt, config: BenchmarkConfig, service: Service) -> Prompt:
    if not config.chat:
        return prompt.prompt
    try:
        return service.render_chat(prompt.as_messages())
    except RequestError as error:
        raise ConfigError(f"chat: {error}") from None
