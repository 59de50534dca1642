"""How an engine directory is served: what is asked for, and the sizes and settings that come of it.

Asked-for settings may leave things open; what they resolve to leaves nothing open. Everything that does not fit the
engines is found here, before one of them is loaded.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from fly_trt.acceptance import GUARDS, PRESET_SETTINGS, AcceptanceParams
from fly_trt.checks import check_at_least, check_flag
from fly_trt.drafting import DRAFTERS
from fly_trt.engines.directory import EngineSettings, LoadedEngines
from fly_trt.errors import ConfigError
from fly_trt.manifest import Manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.runtime.audit import AuditConfig
from fly_trt.runtime.audit_log import AuditLogConfig
from fly_trt.runtime.breaker import DEFAULT_ERROR_RATE, DEFAULT_MIN_QUALITY, BreakerConfig
from fly_trt.runtime.loosening import DRAFT_TOKEN_COST, VERIFICATION_TOKEN_COST, StepCosts
from fly_trt.verification import DEFAULT_PRESET, HeadInfo

DEFAULT_MAX_QUEUE_SIZE = 1024
AUDIT = AuditConfig()
AUDIT_LOG = AuditLogConfig(path="audit.jsonl")
OF_AUDIT_LOG = ("audit_log_max_bytes", "audit_log_backups", "audit_log_text")
OF_BREAKER = ("breaker_error_rate", "breaker_reset_seconds")
OF_AUDITOR = tuple(f"audit_{field.name}" for field in dataclasses.fields(AuditConfig) if field.name != "fraction")
OF_AUDITS = ("audit_log", "min_quality", *OF_AUDIT_LOG, *OF_BREAKER, *OF_AUDITOR)
ALIASES = {"max_num_seqs": "max_batch_size", "max_model_len": "max_seq_len"}
ENGINE_SETTINGS = tuple(field.name for field in dataclasses.fields(EngineSettings))


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceConfig(EngineSettings):
    """How an engine directory is served, beside how its engines are loaded. None means: as it was built.

    max_batch_size: requests in flight. max_seq_len: tokens of a sequence, prompt and output. max_num_tokens: prompt
    tokens that one iteration reads, and tokens that its verification step has; less keeps the pauses of running
    requests short while a long prompt is read, more reads it faster. max_queue_size: requests that may wait.
    enable_prefix_caching: a prompt starts from the cache of another that begins alike.

    audit_fraction: of finished requests, those that the target reads again, as AuditConfig has it with the other audit
    settings; more than 0 loads the target with a slot more than max_batch_size, so that no request and no prefix has to
    make room. audit_log: a file that each audit is a line of, with the other audit_log settings as AuditLogConfig has
    them. min_quality: a setting whose audits do not keep it is exact, as BreakerConfig has it with the other breaker
    settings; 0 makes none so.
    """

    max_seq_len: int | None = None
    max_num_tokens: int | None = None
    max_queue_size: int = DEFAULT_MAX_QUEUE_SIZE
    enable_prefix_caching: bool = True
    audit_fraction: float = AUDIT.fraction
    audit_exact_fraction: float = AUDIT.exact_fraction
    audit_share: float = AUDIT.share
    audit_seed: int = AUDIT.seed
    audit_max_tokens: int = AUDIT.max_tokens
    audit_max_queue_size: int = AUDIT.max_queue_size
    audit_log: str | None = None
    audit_log_max_bytes: int = AUDIT_LOG.max_bytes
    audit_log_backups: int = AUDIT_LOG.backups
    audit_log_text: bool = AUDIT_LOG.has_text
    min_quality: float = DEFAULT_MIN_QUALITY
    breaker_error_rate: float = DEFAULT_ERROR_RATE
    breaker_reset_seconds: float | None = None

    def __post_init__(self) -> None:
        EngineSettings.__post_init__(self)
        for name in ("max_seq_len", "max_num_tokens", "max_queue_size"):
            if (value := getattr(self, name)) is not None or name == "max_queue_size":
                check_at_least(name, value, 1)
        check_flag("enable_prefix_caching", self.enable_prefix_caching)
        self.audit_config()
        self.audit_log_config()
        self.breaker_config()
        check_flag("audit_log_text", self.audit_log_text)
        self._check_have_effect(OF_AUDITS, "audit_fraction")
        self._check_have_effect(OF_AUDIT_LOG, "audit_log")
        self._check_have_effect(OF_BREAKER, "min_quality")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Raises ConfigError for an unknown name; vLLM's max_num_seqs and max_model_len are known too."""
        known = [f.name for f in dataclasses.fields(cls)]
        given: dict[str, Any] = {}
        for name, value in settings.items():
            field = ALIASES.get(name, name)
            if field not in known:
                raise ConfigError(f"unknown setting {name!r}: expected one of {', '.join([*known, *ALIASES])}")
            if field in given:
                raise ConfigError(f"{name}: the same setting as {field}: give one of them")
            given[field] = value
        return cls(**given)

    def _check_have_effect(self, names: tuple[str, ...], needed: str) -> None:
        if getattr(self, needed):
            return
        for field in dataclasses.fields(self):
            if field.name in names and (value := getattr(self, field.name)) != field.default:
                raise ConfigError(f"{field.name} {value!r}: has no effect without {needed}: add it, or leave this out")

    def audit_config(self) -> AuditConfig:
        """Which requests are audited, at which cost. Raises ConfigError for what cannot be."""
        names = [f.name for f in dataclasses.fields(AuditConfig)]
        return AuditConfig(**{name: getattr(self, f"audit_{name}") for name in names})

    def audit_log_config(self) -> AuditLogConfig | None:
        """Where audits are written down. Raises ConfigError for what cannot be."""
        if self.audit_log is None:
            return None
        return AuditLogConfig(
            path=self.audit_log,
            max_bytes=self.audit_log_max_bytes,
            backups=self.audit_log_backups,
            has_text=self.audit_log_text,
        )

    def breaker_config(self) -> BreakerConfig | None:
        """What audits have to show. Raises ConfigError for what cannot be."""
        config = BreakerConfig(
            min_quality=self.min_quality,
            error_rate=self.breaker_error_rate,
            reset_seconds=self.breaker_reset_seconds,
        )
        return config if config.min_quality else None

    def engine_settings(self) -> dict[str, Any]:
        """Those of LoadedEngines."""
        return {name: getattr(self, name) for name in ENGINE_SETTINGS}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What is served, in requests and tokens; ServiceConfig's sizes with nothing left open."""

    max_batch_size: int
    max_seq_len: int
    max_num_tokens: int
    max_queue_size: int


def resolve_sizes(
    config: ServiceConfig, speculative_config: SpeculativeConfig, manifest: Manifest, *, has_own_drafter: bool = False
) -> Sizes:
    """The engine's limits where nothing was asked for. has_own_drafter: in place of the one that the method names.
    Raises ConfigError for more than was built."""
    _check_speculative_limits(speculative_config, manifest, has_own_drafter=has_own_drafter)
    limits = manifest.limits
    sizes = {}
    for name in ("max_batch_size", "max_seq_len", "max_num_tokens"):
        limit, asked = getattr(limits, name), getattr(config, name)
        if asked is not None and asked > limit:
            flag = name.replace("_", "-")
            raise ConfigError(f"{name} {asked}: {manifest.name} was built for {limit}: rebuild with --{flag} {asked}")
        sizes[name] = limit if asked is None else asked
    if sizes["max_num_tokens"] < sizes["max_batch_size"]:
        raise ConfigError(
            f"max_num_tokens {sizes['max_num_tokens']}: less than one token for each of max_batch_size "
            f"{sizes['max_batch_size']} requests: raise it, or lower max_batch_size"
        )
    return Sizes(**sizes, max_queue_size=config.max_queue_size)


def fit_to_shared(config: ServiceConfig, engines: LoadedEngines) -> ServiceConfig:
    """The settings of one of those that share these engines. Raises ConfigError for what was settled by loading them,
    for what cannot be shared, and in a forked process."""
    engines.check_home()
    if engines.backend.schedules:
        raise ConfigError(
            f"{engines.directory}: {engines.manifest.backend} schedules by itself and is not to be shared: give LLM "
            "the directory"
        )
    for name, default in (("num_threads", None), ("device_id", None), ("devices", None), ("verify_hashes", False)):
        if (value := getattr(config, name)) is not default:
            raise ConfigError(f"{name} {value!r}: the engines are loaded already: give it to LoadedEngines")
    if config.enable_prefix_caching:
        raise ConfigError(
            "enable_prefix_caching True: others write to the caches of shared engines: add enable_prefix_caching=False"
        )
    if (config.max_batch_size or 0) > engines.max_batch_size:
        raise ConfigError(
            f"max_batch_size {config.max_batch_size}: the engines were loaded for {engines.max_batch_size}: give "
            f"LoadedEngines max_batch_size={config.max_batch_size}"
        )
    return dataclasses.replace(config, max_batch_size=config.max_batch_size or engines.max_batch_size)


def _check_speculative_limits(config: SpeculativeConfig, manifest: Manifest, *, has_own_drafter: bool) -> None:
    method = None if has_own_drafter else config.method
    if method is not None and (missing := _missing_draft(method, manifest)) is not None:
        what, flag = missing
        raise ConfigError(
            f"method {config.method!r} needs a {what} and {manifest.name} was built without one: "
            f"use method={_usual_method(manifest)!r} or rebuild with {flag}"
        )
    if config.method is not None and config.num_speculative_tokens > manifest.limits.max_draft_len:
        raise ConfigError(
            f"num_speculative_tokens {config.num_speculative_tokens}: built for max_draft_len "
            f"{manifest.limits.max_draft_len}: rebuild with --max-draft-len {config.num_speculative_tokens}"
        )
    policy = config.policy(head_info(manifest))
    if not has_own_drafter:
        config.check_policy(policy)
    size = manifest.target.vocab_size
    if unknown := [token for token in config.exact_token_ids or () if not 0 <= token < size]:
        raise ConfigError(f"exact_token_ids: {unknown[0]} is not a token id, expected 0 to {size - 1}")


def head_info(manifest: Manifest) -> HeadInfo:
    """What the target's head offers to a rule."""
    return HeadInfo(manifest.target.vocab_size, manifest.head.entropy_top_k, manifest.head.top_tokens)


def step_costs(manifest: Manifest, config: SpeculativeConfig) -> StepCosts | None:
    """What windows are decided by: as configured, as measured when the engine was built, or as is usual. None where
    they are always opened."""
    if not config.adaptive_acceptance:
        return None
    usual = {"draft_token_cost": DRAFT_TOKEN_COST, "verification_token_cost": VERIFICATION_TOKEN_COST}
    costs = []
    for name, cost in usual.items():
        given = [value for value in (getattr(config, name), manifest.speculative.get(name)) if value is not None]
        costs.append(given[0] if given else cost)
    return StepCosts(*costs)


def resolve_speculative_config(manifest: Manifest, overrides: Mapping[str, Any]) -> SpeculativeConfig:
    """The engine's defaults with `overrides` on top, see `merged_settings`."""
    config = SpeculativeConfig.from_dict(merged_settings(manifest, overrides))
    # A guard bounds requests with other rules too.
    names = [f.name for f in dataclasses.fields(AcceptanceParams) if f.name not in GUARDS]
    asked = AcceptanceParams(**{name: overrides[name] for name in names if name in overrides})
    asked.over(config)  # refuses a setting that would have no effect
    return config


def merged_settings(manifest: Manifest, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The engine's defaults with `overrides` on top, by name: what they would be if these were the defaults. Without a
    draft model the default is a self-draft, without one of these n-gram lookup, and the default number of draft tokens
    is at most the engine's max_draft_len."""
    limit = manifest.limits.max_draft_len
    settings = dict(manifest.speculative)
    if overrides.get("preset") not in (None, settings.get("preset", DEFAULT_PRESET)):
        for name in PRESET_SETTINGS:  # in the unit of the other preset
            settings.pop(name, None)
    method = settings.get("method", SpeculativeConfig().method)
    if method in DRAFTERS and _missing_draft(method, manifest) is not None:
        settings["method"] = _usual_method(manifest)
    if limit == 0:
        settings["method"] = None
    method = overrides.get("method", settings.get("method", method))
    has_scores = method in tuple(DRAFTERS) and DRAFTERS[method].has_scores
    if not has_scores or overrides.get("draft_stop") is not None:  # of another rule, or of a draft model
        for name in ("draft_stop", "draft_stop_threshold"):
            settings.pop(name, None)
    wanted = settings.get("num_speculative_tokens", SpeculativeConfig().num_speculative_tokens)
    settings["num_speculative_tokens"] = max(1, min(wanted, limit))
    return settings | dict(overrides)


def _missing_draft(method: str, manifest: Manifest) -> tuple[str, str] | None:
    """What the method needs and was not built, and fly-build's flag for it."""
    kind = DRAFTERS[method]
    if kind.needs_draft_model and manifest.draft is None:
        return "draft model", "--draft"
    if kind.needs_self_draft and not manifest.self_drafts:
        return "self-draft", "--self-draft"
    if kind.needs_inner_draft and manifest.inner_draft is None:
        return "second, inner draft model", "--inner-draft"
    return None


def _usual_method(manifest: Manifest) -> str:
    """The way to draft that makes the most of what was built."""
    possible = [name for name in DRAFTERS if _missing_draft(name, manifest) is None]
    return min(possible, key=lambda name: not (DRAFTERS[name].needs_draft_model or DRAFTERS[name].needs_self_draft))
