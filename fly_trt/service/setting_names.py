"""The name of a request's acceptance setting: what it changes of the engine's own, as text that is the same for the
same setting. Audits judge requests by it, so that who changes anything is judged apart. It knows settings; no audits.
"""

import hashlib
from collections.abc import Iterable
from typing import Any

from fly_trt.acceptance import GUARDS, AcceptanceParams
from fly_trt.params import SamplingParams, SpeculativeConfig
from fly_trt.runtime.breaker import DEFAULT_SETTING
from fly_trt.verification import AcceptancePolicy

MAX_CHARACTERS = 120
DRAFTING = ("num_speculative_tokens", "draft_stop", "draft_stop_threshold")  # which decide a loose request's tokens too


def setting_name(
    params: SamplingParams, policy: AcceptancePolicy, defaults: SpeculativeConfig, default_policy: AcceptancePolicy
) -> str:
    """DEFAULT_SETTING where the request decides as the engine does by itself, or "fly_window_size=1 exact_first=4".

    policy, default_policy: the rules of both, before a request made its own of them."""
    asked = params.acceptance_params
    is_same = all(getattr(params, name) is None for name in DRAFTING)
    if is_same and asked == AcceptanceParams():
        return DEFAULT_SETTING
    resolved = asked.over(defaults)
    own_rule = () if policy == default_policy else ("acceptance", *policy.settings)
    guards, default_guards = resolved.guard_settings(), defaults.guard_settings()
    of_rule = [(name, getattr(resolved, name), getattr(defaults, name)) for name in own_rule]
    of_others = [(name, getattr(guards, name), getattr(default_guards, name)) for name in GUARDS]
    of_others += [
        (name, value, getattr(defaults, name)) for name in DRAFTING if (value := getattr(params, name)) is not None
    ]
    changed = _changed(of_rule)
    if own_rule and not changed:  # rules of somebody's own, of one name
        changed = [f"acceptance={policy.name}"]
    changed += _changed(of_others)
    return _short(" ".join(changed)) or DEFAULT_SETTING


def _changed(values: Iterable[tuple[str, Any, Any]]) -> list[str]:
    """Of names with a request's value and the engine's."""
    return [f"{name}={_text(value)}" for name, value, default in values if _text(value) != _text(default)]


def _text(value: Any) -> str:
    if isinstance(value, AcceptancePolicy):
        return value.name
    if isinstance(value, (list, tuple, frozenset)):
        return _digest(str(sorted(value))) if value else "none"
    return "none" if value is None else str(value)


def _short(text: str) -> str:
    """Printable, and of a length that a label of a metric may have."""
    text = ascii(text)[1:-1]
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]}...{_digest(text)}"


def _digest(text: str) -> str:
    """Of what is long, or a client's own words: names are shown to whoever reads metrics."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
