"""The circuit breaker: loose settings whose audited quality is not what it should be are exact until a person or a
timer resets them.

Each setting of acceptance is judged by its own audits. A client's own setting cannot so make others exact, and cannot
speak for the server's default either, which is its own setting from the first audit on. There are MAX_SETTINGS of their
own; those that are audited first after so many share one, which a client can therefore fill and trip, but not the
default. It knows settings by their names and qualities by their numbers; nothing of requests or engines.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from fly_trt.checks import is_number
from fly_trt.errors import ConfigError, RequestError
from fly_trt.runtime.quality import QualityWatch, Verdict, audits_to_judge

DEFAULT_SETTING = "default"
OTHER_SETTINGS = "others"
MAX_SETTINGS = 32
DEFAULT_MIN_QUALITY = 0.98
DEFAULT_ERROR_RATE = 0.01

ResetBy = Literal["person", "timer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerConfig:
    """min_quality: what the mean quality of a setting's audited answers must not be below; 0 is no breaker. error_rate:
    the probability, at most, that a good setting is tripped within 100,000 audits of it; good is one that loses no more
    than a quarter of what min_quality allows. reset_seconds: after which a tripped setting is tried again; None leaves
    it to a person."""

    min_quality: float = DEFAULT_MIN_QUALITY
    error_rate: float = DEFAULT_ERROR_RATE
    reset_seconds: float | None = None

    def __post_init__(self) -> None:
        if not (is_number(self.min_quality) and 0 <= self.min_quality < 1):
            raise ConfigError(f"min_quality {self.min_quality!r}: expected a number from 0, no breaker, to below 1")
        if not (is_number(self.error_rate) and 1e-6 <= self.error_rate <= 0.5):
            raise ConfigError(f"breaker_error_rate {self.error_rate!r}: expected a number from 1e-6 to 0.5")
        seconds = self.reset_seconds
        if seconds is not None and not (is_number(seconds) and 0 < seconds < math.inf):
            raise ConfigError(f"breaker_reset_seconds {seconds!r}: expected seconds, above 0, or None")


class BreakerChange(NamedTuple):
    """A setting was tripped, for `why`, or is loose again, reset by `why`."""

    setting: str
    is_tripped: bool
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class BreakerState:
    """Of one setting. since: when it was tripped or reset or first audited, as time.time(); why: it was tripped, or
    "person" or "timer" where it was reset, or None. mean, lower, upper: of the quality of `num_audits` audits since
    then, or, where it is tripped, of those that tripped it; see QualityWatch. num_trips: since the start."""

    setting: str
    is_tripped: bool
    since: float
    why: str | None
    num_audits: int
    mean: float | None
    lower: float
    upper: float
    num_trips: int


class _Setting:
    """What is known of one."""

    def __init__(self, name: str, watch: QualityWatch) -> None:
        self.name = name
        self.watch = watch
        self.since = time.time()
        self.reset_at = -math.inf  # as time.time()
        self.tripped_at: float | None = None  # of the breaker's clock
        self.why: str | None = None
        self.num_trips = 0

    def state(self) -> BreakerState:
        watch = self.watch
        return BreakerState(
            setting=self.name,
            is_tripped=self.tripped_at is not None,
            since=self.since,
            why=self.why,
            num_audits=watch.num_audits,
            mean=watch.mean,
            lower=watch.lower,
            upper=watch.upper,
            num_trips=self.num_trips,
        )


class Breaker:
    """Any thread may use it.

    when_changed: is told of each change, in the thread that makes it: that of `record` for a trip, any for a reset.
    clock: seconds, for the timer.
    """

    def __init__(
        self,
        config: BreakerConfig,
        when_changed: Callable[[BreakerChange], None] = lambda change: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._when_changed = when_changed
        self._clock = clock
        self._lock = threading.Lock()
        self._settings: dict[str, _Setting] = {DEFAULT_SETTING: self._new_setting(DEFAULT_SETTING)}
        self._num_tripped = 0  # most of the time none is, which is all that a request has to look at

    def record(self, setting: str, quality: float, finished_at: float = math.inf) -> BreakerChange | None:
        """Takes one audit of a request that finished then, as time.time() has it. What comes of requests that ran
        before their setting was tripped counts no more, also after the reset."""
        with self._lock:
            name = self._name(setting)
            if name not in self._settings:
                self._settings[name] = self._new_setting(name)
            kept = self._settings[name]
            if kept.tripped_at is not None or finished_at < kept.reset_at:
                return None
            if (verdict := kept.watch.observe(quality)) is None:
                return None
            kept.tripped_at, kept.since = self._clock(), time.time()
            kept.why = self._reason(verdict, kept.watch)
            kept.num_trips += 1
            self._num_tripped += 1
            change = BreakerChange(name, True, kept.why)
        self._when_changed(change)
        return change

    def is_tripped(self, setting: str) -> bool:
        """Whether requests of this setting are to be exact now."""
        if not self._num_tripped:
            return False
        self._reset_late()
        with self._lock:
            kept = self._settings.get(self._name(setting))
            return kept is not None and kept.tripped_at is not None

    def reset(self, by: ResetBy = "person", setting: str | None = None) -> list[BreakerChange]:
        """Makes a tripped setting loose again, or all that are; its statistics begin anew. Returns what changed. Raises
        RequestError for a setting that was never audited."""
        with self._lock:
            if setting is not None and setting not in self._settings:
                known = ", ".join(self._settings)
                raise RequestError(f"setting {setting!r}: no audit knows it: expected one of {known}")
            names = list(self._settings) if setting is None else [setting]
            changes = [self._reset(name, by) for name in names if self._settings[name].tripped_at is not None]
        for change in changes:
            self._when_changed(change)
        return changes

    def state(self) -> list[BreakerState]:
        """Of every setting that was audited, the default's first."""
        self._reset_late()
        with self._lock:
            return [kept.state() for kept in self._settings.values()]

    def _reset_late(self) -> None:
        """Resets what the timer is up for."""
        seconds = self._config.reset_seconds
        if seconds is None or not self._num_tripped:
            return
        end = self._clock() - seconds
        with self._lock:
            settings = self._settings.items()
            late = [name for name, kept in settings if kept.tripped_at is not None and kept.tripped_at <= end]
            changes = [self._reset(name, "timer") for name in late]
        for change in changes:
            self._when_changed(change)

    def _reset(self, name: str, by: ResetBy) -> BreakerChange:
        kept = self._settings[name]
        kept.watch, kept.tripped_at, kept.why = self._new_watch(), None, by
        kept.since = kept.reset_at = time.time()
        self._num_tripped -= 1
        return BreakerChange(name, False, by)

    def _name(self, setting: str) -> str:
        """Under which a setting is kept."""
        is_own = setting in self._settings or len(self._settings) < MAX_SETTINGS
        return setting if is_own else OTHER_SETTINGS

    def _new_setting(self, name: str) -> _Setting:
        return _Setting(name, self._new_watch())

    def _new_watch(self) -> QualityWatch:
        return QualityWatch(self._config.min_quality, self._config.error_rate)

    def _reason(self, verdict: Verdict, watch: QualityWatch) -> str:
        least = self._config.min_quality
        if verdict == "dropped":
            return f"mean quality {watch.mean:.3f} of {watch.num_audits} audits, certainly below min_quality {least:g}"
        length = audits_to_judge(least, self._config.error_rate)
        return f"{length} audits did not show that mean quality is above min_quality {least:g}"
