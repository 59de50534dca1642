"""What `LLM` and `AsyncLLM` have in common: loading, chat templates, metrics and shutdown."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fly_trt.drafting import Drafter, MakeDrafter
from fly_trt.engines.directory import LoadedEngines
from fly_trt.errors import FlyError
from fly_trt.grammar import StructuredOutputs
from fly_trt.params import SpeculativeConfig
from fly_trt.runtime.audit import AuditCounts, OnResult
from fly_trt.runtime.breaker import BreakerState
from fly_trt.service.config import ServiceConfig
from fly_trt.service.service import Service
from fly_trt.text.chat import ChatMessage
from fly_trt.text.prompts import Prompt, TokensPrompt


class Facade:
    """An engine directory that is being served; engine_dir may be a LoadedEngines, which several share.

    speculative_config: None means the engine directory's defaults, a dict changes some of them, a SpeculativeConfig
    replaces them; method None decodes without drafts. drafter: one of your own in place of the one that `method` names,
    or a function that makes it of SpeculativeConfig and DraftParts; it serves this LLM alone. on_audit: takes what
    comes of each audited request, in the engine thread, where audit_fraction asks for audits. settings: the fields of
    ServiceConfig. Raises EngineError for a directory that cannot be used and ConfigError for settings that do not fit
    it.
    """

    def __init__(
        self,
        engine_dir: str | os.PathLike[str] | LoadedEngines,
        *,
        speculative_config: SpeculativeConfig | Mapping[str, Any] | None = None,
        drafter: Drafter | MakeDrafter | None = None,
        on_audit: OnResult | None = None,
        **settings: Any,
    ) -> None:
        self._service = Service(engine_dir, speculative_config, ServiceConfig.from_dict(settings), drafter, on_audit)
        self.manifest = self._service.manifest
        self.speculative_config = self._service.speculative_config
        self.setting = self._service.setting  # str() of it says in one line what runs, and what is known of its loss
        self.tokenizer = self._service.tokenizer
        self.sizes = self._service.sizes
        self.engine_dir = self._service.engine_dir

    def render_chat(self, /, messages: Sequence[ChatMessage], **template_variables: Any) -> TokensPrompt:
        """A conversation as a prompt for `generate`, by the model's own chat template: of several the one named by
        chat_template, else "tool_use" where there are tools (JSON schemas), else "default". Other `template_variables`
        go to the template (add_generation_prompt is True by default). Raises RequestError for what it refuses."""
        return self._service.render_chat(messages, **template_variables)

    def tokenize(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """The ids that `generate` would read. Raises RequestError for a prompt that cannot be read."""
        return self._service.tokenize(prompt, add_special_tokens=add_special_tokens)

    def compile_grammar(self, structured_outputs: StructuredOutputs) -> None:
        """Has it ready for requests, or finds out why not. Raises RequestError for what cannot be compiled, ConfigError
        without llguidance."""
        self._service.compile_grammar(structured_outputs)

    def warm_up_grammars(self) -> None:
        """Reads the tokenizer for grammars, which the first request with one does otherwise while others stand still.
        Nothing where none can be served, as such a request will be told."""
        with contextlib.suppress(FlyError):
            self._service.compile_grammar(StructuredOutputs(json_object=True))

    def breaker_state(self) -> list[BreakerState]:
        """Of each setting of acceptance that was audited: whether it is exact for now and why, and what is known of its
        quality. Empty without audit_fraction."""
        return self._service.breaker_state()

    def reset_breaker(self, setting: str | None = None) -> list[str]:
        """Makes a setting that the breaker tripped loose again, or all that are, and returns which; their statistics
        begin anew. Raises RequestError for a setting that was never audited, ConfigError without a breaker."""
        return self._service.reset_breaker(setting)

    def metrics(self) -> dict[str, float]:
        """Counters, gauges and histogram buckets since the start, by Prometheus name."""
        return self._service.metrics.as_dict()

    @property
    def threads(self) -> str | None:
        """The CPU threads that compute, in words; None where a GPU does."""
        return self._service.threads

    @property
    def registry(self) -> Any:
        """The prometheus_client registry behind `metrics`, for an exporter."""
        return self._service.metrics.registry

    @property
    def audits(self) -> AuditCounts | None:
        """What became of the requests that were drawn for an audit; None without audits."""
        return None if self._service.auditor is None else self._service.auditor.counts

    def shutdown(self) -> None:
        """Aborts what is served and releases the engines, unless they are shared. Safe to call twice."""
        self._service.shutdown()
