"""The modes that a benchmark compares: how one is written, and the SpeculativeConfig that it has for an engine
directory.

    [NAME=]DRAFTER[+POLICY][,SETTING=VALUE...]      loose=draft_model+fly,fly_window_size=0

Instead of DRAFTER+POLICY stands the short name of a usual mode, a drafter alone (with the policy of its drafts by
default), or a policy alone (on multi-level drafts). Settings are the fields of SpeculativeConfig, their values JSON or
plain words. Several modes are separated by commas too: what is no setting begins the next one.
"""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fly_trt.acceptance import AcceptanceParams, acceptance_settings
from fly_trt.drafting import DRAFTERS
from fly_trt.errors import ConfigError
from fly_trt.manifest import Manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.service.config import ServiceConfig, resolve_sizes, resolve_speculative_config
from fly_trt.settings import settings_of
from fly_trt.verification import POLICIES

AUTOREGRESSIVE = "autoregressive"
EXACT = "exact"
WITHOUT_DRAFT_MODEL = ("ngram", "self")  # the drafters among the usual modes
SEPARATOR = re.compile(r",(?![^\[{]*[\]}])")  # a comma, but none within a JSON list or object


def modes() -> dict[str, dict[str, Any]]:
    """The settings of the usual modes, by their short names: few, since each of them takes its time."""
    drafters = {name: _settings(name) for name in WITHOUT_DRAFT_MODEL if name in DRAFTERS}
    return {
        AUTOREGRESSIVE: {"method": None},
        EXACT: _settings("multi_level", "exact"),
        "fly-draft": _settings("draft_model", "fly"),
        "fly": _settings("multi_level", "fly"),
        **drafters,
    }


def read_modes(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The settings of each mode that is written in one of `texts`, by its name; without one it is called as it is
    written. The usual modes come first, in the order of `modes`, then the others as they were given.

    Raises ConfigError for what is no mode, for a setting without one, and for a name that means two things.
    """
    usual = modes()
    found: dict[str, dict[str, Any]] = {}
    for text in _split(texts):
        name, settings = _read(text)
        if (found | usual).get(name, settings) != settings:
            raise ConfigError(f"mode {text}: {name} is another mode's name: give it one of its own, such as my-{name}")
        found[name] = settings
    return {name: found[name] for name in usual if name in found} | found


def choose_modes(
    asked: Sequence[str], manifest: Manifest, overrides: Mapping[str, Any] | None = None
) -> dict[str, SpeculativeConfig]:
    """What each of the modes `asked` for means, in the order of `read_modes`; none means all usual ones that the
    engines can do.

    overrides: fields of SpeculativeConfig, each for the modes that it fits and that do not say it themselves. Raises
    ConfigError for an unknown mode, for one that needs a draft model or draft tokens that were not built, and for a
    setting that fits no mode.
    """
    if asked:
        chosen = read_modes(asked)
    else:
        chosen = {mode: settings for mode, settings in modes().items() if _is_possible(settings, manifest)}
    overrides = overrides or {}
    for name, value in overrides.items():
        if not any(_fits(name, value, settings) for settings in chosen.values()):
            raise ConfigError(f"{name} {value!r}: has no effect in mode {', '.join(chosen)}: leave it out, or add fly")
    return {mode: _config(mode, settings, manifest, overrides) for mode, settings in chosen.items()}


def _split(texts: Iterable[str]) -> list[str]:
    """One text for each mode, with its settings."""
    split: list[str] = []
    for text in texts:
        first, *others = (piece.strip() for piece in SEPARATOR.split(text))
        split.append(first)
        for piece in others:
            if _is_setting(piece):
                split[-1] += f",{piece}"
            else:
                split.append(piece)
    return split


def _is_setting(piece: str) -> bool:
    name, is_given, _ = piece.partition("=")
    return bool(is_given) and name in [field.name for field in dataclasses.fields(SpeculativeConfig)]


def _read(text: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of one mode."""
    head, *pieces = SEPARATOR.split(text)
    if _is_setting(head):
        raise ConfigError(f"mode {text!r}: a setting without a mode: write it after one, such as fly,{head}")
    name, is_named, what = head.partition("=")
    if is_named and not name:
        raise ConfigError(f"mode {text!r}: no name before the =: write it, or leave the = out")
    settings = _what(what if is_named else head, text)
    for piece in pieces:
        field, _, value = piece.partition("=")
        if field in ("method", "acceptance"):
            raise ConfigError(f"mode {text!r}: a mode's {field} has its place: write it as DRAFTER+POLICY")
        if settings["method"] is None:
            raise ConfigError(f"mode {text!r}: {field} has no effect without drafts: leave it out")
        if field in settings:
            raise ConfigError(f"mode {text!r}: {field} twice: leave one out")
        settings[field] = _value(field, value)
    return name if is_named else text, settings


def _what(what: str, text: str) -> dict[str, Any]:
    """DRAFTER+POLICY, or what may stand instead of it."""
    if what in (usual := modes()):
        return usual[what]
    drafter, _, policy = what.partition("+")
    if what in POLICIES:
        return _settings("multi_level", what)
    if drafter in DRAFTERS and (drafter == what or policy in POLICIES):
        return _settings(drafter, policy)
    raise ConfigError(
        f"mode {text!r}: expected {', '.join(usual)}, or [NAME=]DRAFTER[+POLICY][,SETTING=VALUE...] with a drafter of "
        f"{', '.join(DRAFTERS)}, a policy of {', '.join(POLICIES)} and fields of SpeculativeConfig"
    )


def _settings(drafter: str, policy: str = "") -> dict[str, Any]:
    return {"method": drafter, "acceptance": policy or DRAFTERS[drafter].acceptance}


def _value(field: str, text: str) -> Any:
    """As JSON has it; a word that JSON does not know is a text, and a list of one needs no brackets. What does not suit
    its field, SpeculativeConfig refuses."""
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    declared = settings_of(SpeculativeConfig).get(field)
    is_item = declared is not None and declared.is_list and isinstance(value, (str, int))
    return [value] if is_item else value


def _is_possible(settings: Mapping[str, Any], manifest: Manifest) -> bool:
    try:
        _resolve(settings, manifest)
    except ConfigError:
        return False
    return True


def _fits(name: str, value: Any, settings: Mapping[str, Any]) -> bool:
    if settings["method"] is None:
        return False
    if name.startswith("draft_stop"):
        return DRAFTERS[settings["method"]].has_scores
    if name not in acceptance_settings():
        return True
    asked = AcceptanceParams(**{name: value})
    try:
        asked.over(AcceptanceParams(acceptance=settings["acceptance"]))
    except ConfigError:
        return False
    return True


def _config(
    mode: str, settings: Mapping[str, Any], manifest: Manifest, overrides: Mapping[str, Any]
) -> SpeculativeConfig:
    fitting = {name: value for name, value in overrides.items() if _fits(name, value, settings)}
    try:
        return _resolve({**fitting, **settings}, manifest)
    except ConfigError as error:
        raise ConfigError(f"mode {mode}: {error}") from None


def _resolve(settings: Mapping[str, Any], manifest: Manifest) -> SpeculativeConfig:
    """Raises ConfigError for what the engines cannot do."""
    config = resolve_speculative_config(manifest, settings)
    resolve_sizes(ServiceConfig(), config, manifest)
    return config
