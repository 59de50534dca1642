"""Which setting is served, in one line: the rule, the drafts, the guards, and whether the engine's tuning is about it.

It knows resolved settings and the engine's manifest; it measures nothing and decides nothing.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fly_trt.manifest import Manifest, Tuning
from fly_trt.params import SpeculativeConfig
from fly_trt.service.config import head_info, resolve_speculative_config
from fly_trt.verification import AcceptancePolicy, FlyPolicy

TuningStatus = Literal["none", "applies", "other setting", "other engine"]
DRAFTS = {
    "multi_level": "model + lookup",
    "draft_model": "model",
    "ngram": "lookup",
    "alignment": "aligned lookup",
    "hybrid": "model or lookup",
}
OF_EVERY_POLICY = {field.name for field in dataclasses.fields(AcceptancePolicy)}


@dataclass(frozen=True, slots=True)
class RunningSetting:
    """`str()` of it is one line.

    description: what runs. tuning: what fly-tune wrote into the engine directory, None where nothing; its evidence
    "applies", or is about an "other setting" (`differing` names what is not as it was tuned) or an "other engine", of
    whose files one has changed since. is_loose: whether the default rule may emit what the target would not.
    """

    description: str
    acceptance: str
    is_loose: bool
    method: str | None
    num_speculative_tokens: int
    guards: Mapping[str, Any]
    tuning: Tuning | None
    status: TuningStatus
    differing: tuple[str, ...] = ()

    def __str__(self) -> str:
        evidence = self.evidence
        return f"{self.description}; {evidence}" if evidence else self.description

    @property
    def evidence(self) -> str:
        """What is known of its loss; nothing where none is to be expected."""
        tuning = self.tuning
        if tuning is None:
            return "not tuned" if self.is_loose else ""
        if self.status == "other engine":
            return f"tuned on {tuning.date}, and the engine's files changed since: that evidence is not about them"
        if self.status == "other setting":
            verb = "differs" if len(self.differing) == 1 else "differ"
            return f"not as tuned on {tuning.date} ({', '.join(self.differing)} {verb}): that evidence is not about it"
        if not self.is_loose:  # the target's own answers, so that a confidence would be of nothing
            return f"tuned on {tuning.date}: {tuning.speedup_over_plain:.1f}x plain on {tuning.num_prompts} prompts"
        kept, sure = _percent(tuning.lower_bound), _percent(tuning.confidence)
        return (
            f"tuned on {tuning.date}: keeps {kept} with {sure} confidence on {tuning.num_prompts} prompts, "
            f"{tuning.speedup_over_plain:.1f}x plain"
        )

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        tuning = None
        if self.tuning is not None:
            left_out = {"setting", "previous", "engine_sha256"}
            tuning = {"status": self.status, "differing": list(self.differing)}
            tuning |= self.tuning.model_dump(mode="json", exclude=left_out)
        return {
            "line": str(self),
            "acceptance": self.acceptance,
            "method": self.method,
            "num_speculative_tokens": self.num_speculative_tokens,
            "guards": dict(self.guards),
            "tuning": tuning,
        }

    def labels(self) -> dict[str, str]:
        """Of a metric."""
        return {
            "acceptance": self.acceptance,
            "method": self.method or "none",
            "setting": self.description,
            "tuning": self.status,
        }


def describe_setting(manifest: Manifest, config: SpeculativeConfig, *, has_own_drafter: bool = False) -> RunningSetting:
    """What an engine directory is served with. has_own_drafter: in place of the one that the method names."""
    policy = config.policy(head_info(manifest))
    guards = config.guard_settings().in_force()
    is_loose = policy.is_loose and config.method is not None
    tuning = manifest.tuning
    status: TuningStatus = "none"
    differing: tuple[str, ...] = ()
    if tuning is not None:
        differing = _differing(manifest, tuning, config, has_own_drafter=has_own_drafter)
        is_other = tuning.engine_sha256 != manifest.engine_sha256()
        status = "other engine" if is_other else "other setting" if differing else "applies"
    return RunningSetting(
        description=", ".join(_parts(config, policy, guards, has_own_drafter=has_own_drafter)),
        acceptance=policy.name,
        is_loose=is_loose,
        method=config.method,
        num_speculative_tokens=0 if config.method is None else config.num_speculative_tokens,
        guards=guards,
        tuning=tuning,
        status=status,
        differing=differing,
    )


def _parts(
    config: SpeculativeConfig, policy: AcceptancePolicy, guards: Mapping[str, Any], *, has_own_drafter: bool
) -> list[str]:
    if config.method is None:
        return ["plain decoding"]
    kind = "own" if has_own_drafter else DRAFTS.get(config.method, config.method)
    parts = [_rule(config, policy), f"{kind} drafts of {config.num_speculative_tokens}"]
    if config.draft_stop not in (None, "none") and not has_own_drafter:
        parts[-1] += f" that {config.draft_stop} ends"
    if "max_loosened_per_100" in guards:
        parts.append(f"at most {guards['max_loosened_per_100']} loosened per 100")
    if "exact_first" in guards:
        parts.append(f"the first {guards['exact_first']} exact")
    if "exact_within" in guards:
        parts.append(f"exact within {' and '.join(guards['exact_within'])}")
    if "exact_token_ids" in guards:
        parts.append(f"{len(guards['exact_token_ids'])} token ids exact")
    return parts


def _rule(config: SpeculativeConfig, policy: AcceptancePolicy) -> str:
    """The rule with its settings, as they are in force."""
    if not policy.is_loose:
        return policy.name if policy.name == "exact" else f"{policy.name} (loosens nothing)"
    if isinstance(policy, FlyPolicy):
        gate = f"threshold {policy.entropy_threshold:.3g}" if policy.entropy_threshold else "no gate"
        return f"{policy.name} ({config.preset}: {gate}, {f'window {policy.window}' if policy.window else 'no window'})"
    own = dataclasses.fields(policy) if dataclasses.is_dataclass(policy) else ()
    values = [(field.name, getattr(policy, field.name)) for field in own if field.name not in OF_EVERY_POLICY]
    given = [f"{name} {_text(value)}" for name, value in values if not name.startswith("_")]
    return f"{policy.name} ({', '.join(given)})" if given else policy.name


def _differing(
    manifest: Manifest, tuning: Tuning, config: SpeculativeConfig, *, has_own_drafter: bool
) -> tuple[str, ...]:
    """The settings that are not as they were tuned."""
    tuned = resolve_speculative_config(manifest.model_copy(update={"speculative": tuning.setting}), {})
    names = [field.name for field in dataclasses.fields(config)]
    found = [name for name in names if _plain(getattr(tuned, name)) != _plain(getattr(config, name))]
    return (*(["drafter"] if has_own_drafter else []), *found)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _percent(fraction: float) -> str:
    """Rounded down: it is a bound."""
    return f"{math.floor(1000 * fraction + 1e-9) / 10:g} %"
