"""The settings of acceptance, declared once: which policy, what it reads, and where a loose one is exact all the same.

An engine's SpeculativeConfig and a request's AcceptanceParams have them, and flags, request fields and benchmark modes
are made of them. Unknown names and values that cannot be honoured are refused; nothing is ignored.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fly_trt.checks import check_at_least
from fly_trt.errors import ConfigError
from fly_trt.settings import Setting, check_settings, setting, settings_of
from fly_trt.verification import (
    APPLY_TO,
    POLICIES,
    PRESETS,
    AcceptancePolicy,
    GuardSettings,
    HeadInfo,
    check_regions,
)

DEFAULT_ACCEPTANCE = "fly"
PRESET_SETTINGS = ("fly_window_size", "fly_entropy_threshold")  # in the unit of their preset
GUARDS = tuple(f.name for f in dataclasses.fields(GuardSettings))


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceSettings:
    """The settings of all acceptance policies and of the guards, which every loose policy has. Each policy says which
    it reads."""

    acceptance: str | AcceptancePolicy | None = setting(
        str, "Which rule: exact is lossless, all others are loose. [as built]", choices=POLICIES
    )
    preset: str | None = setting(str, "Which FLy. [as built]", choices=PRESETS)
    fly_entropy_threshold: float | None = setting(
        float,
        "Gate, in nats; under preset paper a fraction of ln V; 0: no gate. [the preset's]",
        metavar="X",
        search=(0.15, 0.45, 0.6, 0.9),
    )
    fly_window_size: int | None = setting(
        int, "Deferred window, in tokens; 0: no window. [the preset's]", metavar="W", search=(0, 2, 4, 8)
    )
    fly_entropy_top_k: int | None = None
    relaxed_top_n: int | None = setting(
        int, "relaxed: the target's N most probable tokens. [3]", metavar="N", least=1, search=(2,)
    )
    relaxed_delta: float | None = setting(
        float, "relaxed: probability below the largest. [0.6]", metavar="X", most=1, search=(0.1, 0.2, 0.4)
    )
    margin_threshold: float | None = setting(
        float, "margin: nats between the two most probable. [0.5]", metavar="X", search=(0.1, 0.25, 1.0)
    )
    typical_threshold: float | None = setting(
        float, "typical: epsilon, a probability. [0.09]", metavar="X", most=1, search=(0.2, 0.3)
    )
    typical_alpha: float | None = setting(
        float, "typical: alpha of alpha exp(-H). [0.3]", metavar="X", most=1, search=(0.5, 0.7)
    )
    conditional_alpha: float | None = setting(
        float, "conditional: alpha of beta - alpha H. [0.1]", metavar="X", most=100, search=(0.05, 0.2)
    )
    conditional_beta: float | None = setting(float, "conditional: beta. [0.4]", metavar="X", most=1, search=(0.6, 0.8))
    conditional_floor: float | None = setting(
        float, "conditional: least probability. [0.01]", metavar="X", most=1, search=(0.1, 0.3)
    )
    conditional_apply_to: str | None = setting(str, "conditional: to copied drafts or all. [ngram]", choices=APPLY_TO)
    adaptive_max_distance: float | None = setting(
        float, "adaptive: Jensen-Shannon distance, at most. [0.5]", metavar="X", most=1, search=(0.2, 0.35)
    )
    cactus_delta: float | None = setting(
        float, "cactus: KL divergence of a token, in nats. [0.75]", metavar="X", most=100
    )
    exact_first: int | None = setting(int, "Exact for the first N output tokens. [0]", metavar="N")
    exact_token_ids: Sequence[int] | None = setting(
        int, "Tokens that are never loosened. [none]", metavar="IDS", is_list=True
    )
    exact_within: Sequence[str] | None = setting(
        str, "Exact within code, json, digits, before:TAG, after:TAG. [none]", metavar="NAMES", is_list=True
    )
    max_loosened_per_100: int | None = setting(
        int, "Loosened tokens among any 100 in a row, at most. [any number]", metavar="N", search=(1, 3, 10)
    )

    def __post_init__(self) -> None:
        own = isinstance(self.acceptance, AcceptancePolicy)
        check_settings(self, but=("acceptance",) if own else ())
        check_regions(self.exact_within or ())
        if self.fly_entropy_top_k is not None:
            check_at_least("fly_entropy_top_k", self.fly_entropy_top_k, 1)

    def policy(self, head: HeadInfo) -> AcceptancePolicy:
        """The rule for an engine with such a head. Raises ConfigError where that does not offer what the rule reads."""
        if isinstance(self.acceptance, AcceptancePolicy):
            rule: AcceptancePolicy | type[AcceptancePolicy] = self.acceptance
        else:
            rule = POLICIES[self.acceptance or DEFAULT_ACCEPTANCE]
        asked = self.fly_entropy_top_k
        if "fly_entropy_top_k" in rule.settings and asked not in (None, head.entropy_top_k):
            raise ConfigError(
                f"fly_entropy_top_k {asked}: the engine was built for {head.entropy_top_k}: "
                f"rebuild with --entropy-top-k {asked}"
            )
        if (rule.needs_top or rule.needs_draft_scores) and not head.has_top_tokens:
            raise ConfigError(
                f"acceptance {rule.name!r}: reads the most probable tokens by name, which this engine was built "
                "without: rebuild it with fly-build"
            )
        if isinstance(rule, AcceptancePolicy):
            return rule
        return rule.make({f.name: getattr(self, f.name) for f in dataclasses.fields(AcceptanceSettings)}, head)

    def guard_settings(self) -> GuardSettings:
        """Where a loose policy is exact all the same."""
        return GuardSettings(
            exact_first=self.exact_first or 0,
            exact_token_ids=frozenset(self.exact_token_ids or ()),
            exact_within=tuple(self.exact_within or ()),
            max_loosened_per_100=self.max_loosened_per_100,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class AcceptanceParams(AcceptanceSettings):
    """Which draft tokens stand. Every field None means: as the engine was configured.

    acceptance: the name of a policy, "exact" (lossless) or a loose one: "fly", "relaxed", "margin", "typical",
    "conditional", "adaptive", "cactus"; or an AcceptancePolicy of your own. Every setting whose name begins with a
    policy's is that policy's; the rules are in fly_trt/verification, a module each.
    preset: which "fly": "reference" (the authors' code), "paper" or "vllm". fly_entropy_threshold: in nats; under
    preset "paper" a fraction of ln(vocabulary size); 0 leaves out the gate. fly_window_size: tokens; 0 leaves out the
    window. fly_entropy_top_k: probabilities that the gate looks at; fixed when the engine is built.
    Guards, for every loose policy: exact_first: so many output tokens are decided exactly, from the first on.
    exact_token_ids: tokens that are neither loosened nor replaced by a loosened one. exact_within: regions of the
    output in which everything is decided exactly: "code" (fences), "json", "digits", "before:TAG", "after:TAG".
    max_loosened_per_100: of any 100 output tokens in a row.
    """

    def over(self, defaults: AcceptanceSettings) -> "AcceptanceParams":
        """These settings where given, `defaults` elsewhere; of guards both hold, as `defaults` are a bound that no
        request loosens. Another preset drops the defaults' window and threshold. Raises ConfigError for a setting that
        the policy does not read."""
        self._check_has_effect(self.acceptance or defaults.acceptance or DEFAULT_ACCEPTANCE)
        changes_preset = self.preset is not None and self.preset != defaults.preset
        dropped = PRESET_SETTINGS if changes_preset else ()
        values = {}
        for f in dataclasses.fields(AcceptanceSettings):
            own, bound = getattr(self, f.name), getattr(defaults, f.name)
            if own is None and f.name not in dropped:
                own = bound
            elif f.name in GUARDS and bound is not None:
                own = STRICTER[f.name](own, bound)
            values[f.name] = own
        return AcceptanceParams(**values)

    def _check_has_effect(self, acceptance: str | AcceptancePolicy) -> None:
        rule = POLICIES[acceptance] if isinstance(acceptance, str) else acceptance
        for name in acceptance_settings():
            value = getattr(self, name)
            is_read = name in rule.settings or (name in GUARDS and rule.name != "exact")
            if value is None or name == "acceptance" or is_read:
                continue
            reader = next((other for other, policy in POLICIES.items() if name in policy.settings), DEFAULT_ACCEPTANCE)
            raise ConfigError(
                f"{name} {value!r}: has no effect with acceptance {rule.name!r}: add acceptance={reader!r}"
            )


def _union(own: Sequence[Any], bound: Sequence[Any]) -> list[Any]:
    return list(dict.fromkeys((*bound, *own)))


STRICTER: dict[str, Callable[[Any, Any], Any]] = {
    "exact_first": max,
    "exact_token_ids": _union,
    "exact_within": _union,
    "max_loosened_per_100": min,
}
"""Of each guard the one of two values, or what has both, that allows less."""


def acceptance_settings() -> dict[str, Setting]:
    """The settings of acceptance that can be given anywhere, by name."""
    return settings_of(AcceptanceSettings)
