"""What fly-tune may propose: candidates made of what is declared of drafters, policies, their settings and draft stops.

It knows the tables DRAFTERS, POLICIES and DRAFT_STOPS, which settings there are and what an engine directory can do. It
knows nothing of speed and quality. A new line in one of the tables takes part without a word here.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fly_trt.acceptance import GUARDS, PRESET_SETTINGS, acceptance_settings
from fly_trt.checks import check_choice
from fly_trt.drafting import DRAFT_STOPS, DRAFTERS
from fly_trt.errors import ConfigError
from fly_trt.manifest import Manifest
from fly_trt.params import SpeculativeConfig
from fly_trt.service.config import ServiceConfig, head_info, resolve_sizes, resolve_speculative_config
from fly_trt.tuning.result import DEFAULT, PLAIN, Candidate
from fly_trt.verification import POLICIES, ExactPolicy

EXACT = ExactPolicy.name
DRAFT_LENGTHS = (3, 5, 8, 12, 20, 30)
CHANCE_TO_VARY = 0.4  # of each setting of a drawn candidate
CHANCE_OF_EXACT = 0.4  # of a drawn candidate
NUM_TRIES = 10  # draws for each candidate that is wanted: a small space has fewer


class SearchSpace:
    """Candidates of one engine directory. methods, acceptances: drafters and policies to look at; none means all that
    the engines can do. Raises ConfigError for an unknown name, and where nothing is left to compare."""

    def __init__(self, manifest: Manifest, methods: Sequence[str] = (), acceptances: Sequence[str] = ()) -> None:
        for method in methods:
            check_choice("method", method, tuple(DRAFTERS))
        for acceptance in acceptances:
            check_choice("acceptance", acceptance, tuple(POLICIES))
        self._manifest = manifest
        self._as_built = resolve_speculative_config(manifest, {})
        # What greedy decoding never loosens would be exact acceptance under another name.
        wanted = [name for name, policy in POLICIES.items() if not policy.needs_uniforms]
        self._acceptances = [name for name in wanted if not acceptances or name in acceptances]
        self._methods = [
            name
            for name in DRAFTERS
            if (not methods or name in methods) and self.make({"method": name, "acceptance": EXACT}) is not None
        ]
        if not self._methods:
            asked = f"method {', '.join(methods)}: " if methods else ""
            raise ConfigError(
                f"{asked}{manifest.name} was built for no such way to draft, so that there is nothing to compare with "
                "plain decoding: leave the filter out, or rebuild with --draft"
            )

    def candidates(self, count: int, seed: int) -> list[Candidate]:
        """Plain decoding, the engine's default, then every drafter exactly, the presets, each policy as it is by
        itself, and from there on draws of the seed: `count` in all, or fewer where there are no more."""
        found: dict[str, Candidate] = {}
        draws = self._draws(np.random.default_rng(seed), NUM_TRIES * count)
        for settings in (*self._usual(), *draws):
            if len(found) >= count - 1:  # and plain decoding
                break
            if (made := self.make(settings)) is not None:
                candidate, config = made
                found.setdefault(repr(config), candidate)
        candidates = list(found.values())
        plain = Candidate(PLAIN, {"method": None}, is_lossless=True)
        return [plain, self._default(), *(one for one in candidates if one.settings)]

    def make(self, settings: Mapping[str, Any]) -> tuple[Candidate, SpeculativeConfig] | None:
        """A candidate with what it comes to; None for what the engines cannot do."""
        try:
            config = resolve_speculative_config(self._manifest, settings)
            resolve_sizes(ServiceConfig(), config, self._manifest)
        except ConfigError:
            return None
        policy = config.policy(head_info(self._manifest))
        if config.method is None:
            return Candidate(_name(settings), dict(settings), is_lossless=True), config
        preset = config.preset if "preset" in policy.settings else None
        candidate = Candidate(_name(settings), dict(settings), config.method, policy.name, preset, not policy.is_loose)
        return candidate, config

    def _default(self) -> Candidate:
        made = self.make({})
        assert made is not None  # as the engine directory was built
        candidate, _ = made
        return candidate

    def _usual(self) -> Iterator[dict[str, Any]]:
        """The engine's default comes first, so that what is the same is not there twice."""
        yield {}
        exactly = self._methods if EXACT in self._acceptances else self._methods[:1]  # one as a baseline, whoever asks
        yield from ({"method": method, "acceptance": EXACT} for method in exactly)
        for method in self._methods:
            usual = DRAFTERS[method].acceptance
            for settings in self._presets(usual) if usual in self._acceptances and usual != EXACT else ():
                yield {"method": method, **settings}
        for acceptance in self._acceptances:
            if acceptance != EXACT:
                yield {"method": self._methods[0], "acceptance": acceptance}

    def _presets(self, acceptance: str) -> Iterator[dict[str, Any]]:
        """The published variants of a policy that has some."""
        if "preset" not in POLICIES[acceptance].settings:
            yield {"acceptance": acceptance}
            return
        for preset in acceptance_settings()["preset"].choices or ():
            yield {"acceptance": acceptance, "preset": preset}

    def _draws(self, random: np.random.Generator, count: int) -> Iterator[dict[str, Any]]:
        loose = [name for name in self._acceptances if name != EXACT]
        for _ in range(count):
            method = _pick(random, self._methods)
            is_exact = not loose or (EXACT in self._acceptances and random.random() < CHANCE_OF_EXACT)
            acceptance = EXACT if is_exact else _pick(random, loose)
            settings = {"method": method, "acceptance": acceptance}
            for name, values in self._values(method, acceptance).items():
                if random.random() < CHANCE_TO_VARY:
                    settings[name] = _pick(random, values)
            yield settings | self._draw_stop(random, method)

    def _draw_stop(self, random: np.random.Generator, method: str) -> dict[str, Any]:
        if not DRAFTERS[method].has_scores or random.random() >= CHANCE_TO_VARY:
            return {}
        name = _pick(random, list(DRAFT_STOPS))
        rule = DRAFT_STOPS[name]
        thresholds = (None, *rule.search) if rule is not None else (None,)
        threshold = _pick(random, thresholds)
        return {"draft_stop": name} | ({} if threshold is None else {"draft_stop_threshold": threshold})

    def _values(self, method: str, acceptance: str) -> dict[str, Sequence[Any]]:
        """The settings that matter for a drafter with a policy, each with the values to try."""
        drafter, policy = DRAFTERS[method], POLICIES[acceptance]
        limit = self._manifest.limits.max_draft_len
        usual = self._as_built.num_speculative_tokens
        lengths = [length for length in DRAFT_LENGTHS if length <= limit and length != usual]
        values: dict[str, Sequence[Any]] = {"num_speculative_tokens": lengths or [usual]}
        values |= dict(drafter.search)
        guards = () if acceptance == EXACT else GUARDS
        for name, declared in acceptance_settings().items():
            tried = tuple(declared.choices or ()) or declared.search
            if name in (*policy.settings, *guards) and tried:
                values[name] = tried
        if set(PRESET_SETTINGS) <= set(policy.settings) and drafter.has_scores:
            values["adaptive_acceptance"] = (False,)  # windows are opened whether they pay or not
        return values


def _pick(random: np.random.Generator, values: Sequence[Any]) -> Any:
    return values[int(random.integers(len(values)))]


def _name(settings: Mapping[str, Any]) -> str:
    """As fly-bench writes a mode."""
    if not settings:
        return DEFAULT
    if settings["method"] is None:
        return PLAIN
    others = [f"{name}={_text(value)}" for name, value in settings.items() if name not in ("method", "acceptance")]
    return ",".join([f"{settings['method']}+{settings['acceptance']}", *others])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
