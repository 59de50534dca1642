"""An engine directory at work: what `LLM` and `AsyncLLM` share.

It wires engines, admission of requests, generation loop and engine thread together, and starts and ends them. It knows
no requests; an inbox is the way in.
"""

import atexit
import importlib
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fly_trt.drafting import DRAFTERS, Drafter, DraftParts, MakeDrafter
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import ConfigError
from fly_trt.grammar import StructuredOutputs
from fly_trt.manifest import Manifest
from fly_trt.params import SamplingParams, SpeculativeConfig
from fly_trt.runtime.audit import AuditResult, OnResult
from fly_trt.runtime.audit_reports import AuditReports
from fly_trt.runtime.auditor import Auditor
from fly_trt.runtime.breaker import Breaker, BreakerState
from fly_trt.runtime.executor import Executor, ExecutorParts, LoadExecutor, OwnExecutor
from fly_trt.runtime.loop import GenerationLoop, LoopConfig
from fly_trt.runtime.metrics import Metrics
from fly_trt.runtime.thread import EngineThread
from fly_trt.service.admission import Admission
from fly_trt.service.config import ServiceConfig, fit_to_shared, resolve_sizes, resolve_speculative_config, step_costs
from fly_trt.service.inbox import AsyncInbox, Inbox
from fly_trt.service.setting import describe_setting
from fly_trt.text.chat import ChatMessage
from fly_trt.text.prompts import Prompt, TokensPrompt


class Service:
    """Engines, tokenizer and engine thread of one engine directory, or of one that was loaded to be shared.

    drafter: in place of the one that speculative_config's method names. on_audit: takes the results of audits, in the
    engine thread. Raises EngineError for a directory that cannot be used and ConfigError for settings that do not fit
    it.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str] | LoadedEngines,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None,
        config: ServiceConfig,
        drafter: Drafter | MakeDrafter | None = None,
        on_audit: OnResult | None = None,
    ) -> None:
        if on_audit is not None and not config.audit_fraction:
            raise ConfigError("on_audit: has no effect without audit_fraction: add it, or leave this out")
        self._on_audit = on_audit or _count_only
        if isinstance(engine_dir, LoadedEngines):
            engines, release = engine_dir, _leave_to_the_others
            config = fit_to_shared(config, engines)
        else:
            num_spare_slots = 1 if config.audit_fraction else 0
            engines = LoadedEngines(engine_dir, **config.engine_settings(), num_spare_slots=num_spare_slots)
            release = engines.close
        try:
            self._make(engines, release, speculative_config, config, drafter)
        except BaseException:
            release()  # they may have processes
            raise

    def _make(
        self,
        engines: LoadedEngines,
        release: Callable[[], None],
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None,
        config: ServiceConfig,
        drafter: Drafter | MakeDrafter | None,
    ) -> None:
        """`release` is the engine thread's to call from its start on."""
        self._engines = engines  # those that are shared may be held by nobody else
        self.manifest: Manifest = engines.manifest
        self.engine_dir: Path = engines.directory
        if not isinstance(speculative_config, SpeculativeConfig):
            speculative_config = resolve_speculative_config(self.manifest, speculative_config or {})
        self.speculative_config: SpeculativeConfig = speculative_config
        has_own_drafter = drafter is not None
        self.sizes = resolve_sizes(config, speculative_config, self.manifest, has_own_drafter=has_own_drafter)
        self.tokenizer = engines.tokenizer
        self.setting = describe_setting(self.manifest, speculative_config, has_own_drafter=has_own_drafter)
        self.metrics = Metrics()
        self.metrics.set_setting(self.setting.labels())
        self.auditor: Auditor | None = None
        self._reports: AuditReports | None = None
        if engines.backend.schedules:
            own = self._load_executor(engines, config, has_own_drafter=has_own_drafter)
            try:
                self._admission = Admission(engines, speculative_config, self.sizes, check=own.check)
                self._start(own, own.close, engines)
            except BaseException:
                own.close()
                raise
            return
        self._admission = Admission(
            engines,
            speculative_config,
            self.sizes,
            has_own_drafter=has_own_drafter,
            names_settings=config.audit_fraction > 0,
        )
        drafter = self._make_drafter(engines, drafter, config.enable_prefix_caching)
        loop_config = LoopConfig(
            num_slots=self.sizes.max_batch_size,
            max_seq_len=self.sizes.max_seq_len,
            num_draft_tokens=speculative_config.num_speculative_tokens,
            max_num_tokens=self.sizes.max_num_tokens,
            max_queue_size=self.sizes.max_queue_size,
            adaptive_draft_length=speculative_config.adaptive_draft_length,
            prefix_caching=config.enable_prefix_caching,
            step_costs=step_costs(self.manifest, speculative_config),
            spare_slot=engines.max_batch_size if engines.num_spare_slots else None,
        )
        loop = GenerationLoop(engines.target, drafter, loop_config, self.tokenizer, self.metrics)
        if drafter is not None and speculative_config.adaptive_draft_length:
            with engines.turn.held():
                loop.warm_up()
        if config.audit_fraction:
            release = self._audit(loop, config, release)
        self._start(loop, release, engines)

    def _audit(self, loop: GenerationLoop, config: ServiceConfig, release: Callable[[], None]) -> Callable[[], None]:
        """Has the loop's requests audited, and returns `release` with what ends with the audits."""
        log, breaker = config.audit_log_config(), config.breaker_config()
        self._reports = reports = AuditReports(breaker, log, self.metrics.registry, self.tokenizer.decode)
        takers = reports, self._on_audit  # and not self: the engine thread would keep it alive

        def take(result: AuditResult) -> None:
            for taker in takers:
                taker(result)

        self.auditor = loop.audit(config.audit_config(), take, is_shared=release is _leave_to_the_others)
        reports.show_counts(self.auditor.counts)
        loop.speculation.breaker = reports.breaker

        def release_all() -> None:
            try:
                release()
            finally:
                reports.close()

        return release_all

    @property
    def threads(self) -> str | None:
        return self._engines.threads

    def _start(self, executor: Executor, release: Callable[[], None], engines: LoadedEngines) -> None:
        self._thread = EngineThread(executor, release, engines.turn, self.auditor, engines.held_cores())
        engines.when_failed(self._thread.fail)
        # Also when the interpreter ends without a shutdown(): the thread must not run into a library's teardown. By
        # itself a finalizer would come after what libraries have registered when they were loaded.
        self._finalizer = weakref.finalize(self, self._thread.shutdown)
        atexit.register(self._finalizer)

    def shutdown(self) -> None:
        """Aborts what is served and releases the engines, unless they are shared. Safe to call twice. Raises
        EngineError when a step does not end."""
        self._thread.shutdown()
        self._finalizer.detach()
        atexit.unregister(self._finalizer)

    def check_running(self) -> None:
        """Raises EngineDeadError after a failure, ConfigError after shutdown and in a forked process."""
        self._thread.check_running()

    def breaker_state(self) -> list[BreakerState]:
        """Of each setting that was audited; empty without a breaker. Any thread may ask."""
        breaker = self._breaker
        return [] if breaker is None else breaker.state()

    def reset_breaker(self, setting: str | None = None) -> list[str]:
        """Makes a tripped setting loose again, or all that are, and returns which. Any thread may ask. Raises
        RequestError for one that was never audited, ConfigError without a breaker."""
        if (breaker := self._breaker) is None:
            raise ConfigError("there is no breaker to reset: serve with audit_fraction and min_quality above 0")
        return [change.setting for change in breaker.reset("person", setting)]

    @property
    def _breaker(self) -> Breaker | None:
        return None if self._reports is None else self._reports.breaker

    def render_chat(self, /, messages: Sequence[ChatMessage], **variables: Any) -> TokensPrompt:
        return self._admission.render_chat(messages, **variables)

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        return self._admission.tokenize(prompt, add_special_tokens=add_special_tokens)

    def compile_grammar(self, wanted: StructuredOutputs) -> None:
        self._admission.compile_grammar(wanted)

    def is_quick(self, prompt: Prompt, params: SamplingParams | None) -> bool:
        """Whether preparing such a request takes no longer than an event loop may stand still."""
        return self._admission.is_quick(prompt, params)

    def open_inbox(self) -> Inbox:
        """For requests of a caller that blocks; used in a `with` statement."""
        return Inbox(self._admission, self._thread)

    def open_async_inbox(self) -> AsyncInbox:
        """For requests of a task of the running event loop; used in a `with` statement."""
        return AsyncInbox(self._admission, self._thread)

    def abort(self, request_id: str) -> None:
        """Ends the request that has this id now, if there is one. Raises ConfigError in a forked process."""
        self._thread.abort(request_id)

    def _load_executor(self, engines: LoadedEngines, config: ServiceConfig, *, has_own_drafter: bool) -> OwnExecutor:
        if has_own_drafter:
            raise ConfigError(f"drafter: {self.manifest.backend} makes its drafts by itself: leave it out")
        if config.audit_fraction:
            raise ConfigError(
                f"audit_fraction {config.audit_fraction:g}: {self.manifest.backend} runs its models by itself, and no "
                "steps that read a text again: leave it out"
            )
        load: LoadExecutor = importlib.import_module(engines.backend.module).load_executor
        return load(
            ExecutorParts(
                directory=engines.directory,
                manifest=self.manifest,
                speculative_config=self.speculative_config,
                num_slots=self.sizes.max_batch_size,
                max_seq_len=self.sizes.max_seq_len,
                max_queue_size=self.sizes.max_queue_size,
                tokenizer=self.tokenizer,
                metrics=self.metrics,
                as_built=resolve_speculative_config(self.manifest, {}),
                max_num_tokens=config.max_num_tokens,
                prefix_caching=config.enable_prefix_caching,
            )
        )

    def _make_drafter(
        self, engines: LoadedEngines, own: Drafter | MakeDrafter | None, reuse_cache: bool
    ) -> Drafter | None:
        config = self.speculative_config
        if config.method is None:
            if own is not None:
                raise ConfigError("drafter: has no effect with method None, which makes no drafts: leave out one")
            return None
        parts = DraftParts(
            load_draft_model=lambda: engines.draft,
            target_vocab_size=self.manifest.target.vocab_size,
            reuse_cache=reuse_cache,
            load_self_drafts=lambda: engines.self_drafts,
            load_inner_draft_model=lambda: engines.inner_draft,
        )
        make = DRAFTERS[config.method].make if own is None else own
        return make if isinstance(make, Drafter) else make(config, parts)


def _leave_to_the_others() -> None:
    """Engines that are shared stay open."""


def _count_only(result: AuditResult) -> None:
    """Of audits nothing but their number is wanted."""
