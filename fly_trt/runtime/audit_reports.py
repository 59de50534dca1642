"""What becomes of audits: each is counted and written down, and the breaker hears of it. It knows results and whom they
are for; nothing of how they are made.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry

from fly_trt.runtime.audit import AuditCounts, AuditResult
from fly_trt.runtime.audit_log import AuditLog, AuditLogConfig
from fly_trt.runtime.audit_metrics import AuditMetrics
from fly_trt.runtime.breaker import Breaker, BreakerChange, BreakerConfig

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]


class AuditReports:
    """Takes results in the engine thread.

    breaker: None where nothing is to be made exact. log: None writes nothing. registry: where the metrics go. decode:
    the text of token ids, for a log that has text.
    """

    def __init__(
        self, breaker: BreakerConfig | None, log: AuditLogConfig | None, registry: CollectorRegistry, decode: Decode
    ) -> None:
        self.breaker = None if breaker is None else Breaker(breaker, self._tell)
        self._log = None if log is None else AuditLog(log)
        self._decode = decode if log is not None and log.has_text else None
        self._metrics = AuditMetrics(self._log, self.breaker)
        registry.register(self._metrics)

    def show_counts(self, counts: AuditCounts) -> None:
        """Those of whoever makes the audits, who goes on counting."""
        self._metrics.counts = counts

    def __call__(self, result: AuditResult) -> None:
        self._metrics.record(result)
        change = (
            None if self.breaker is None else self.breaker.record(result.setting, result.quality, result.finished_at)
        )
        if self._log is not None:
            self._log.write(lambda: self._record(result, change))

    def close(self) -> None:
        """After the last result."""
        if self._log is not None:
            self._log.close()

    def _tell(self, change: BreakerChange) -> None:
        self._metrics.record_change(change)
        if change.is_tripped:
            logger.warning(
                "breaker: setting %r is exact from now on: %s: reset it when it is known why",
                change.setting,
                change.why,
            )
        else:
            logger.warning("breaker: setting %r is loose again: reset by a %s", change.setting, change.why)

    def _record(self, result: AuditResult, change: BreakerChange | None) -> dict[str, Any]:
        """A line of the log. Text only where it is asked for."""
        found = asdict(result)
        exact = found.pop("exact")
        prompt, output = found.pop("prompt_token_ids"), found.pop("token_ids")
        for name in ("log_likelihood", "best_log_likelihood"):
            found[name] = round(found[name], 6) if math.isfinite(found[name]) else None
        found |= {"quality": result.quality, "seconds": round(result.seconds, 6)}
        found["exact"] = None if exact is None else {name: exact[name] for name in ("num_tokens", "parted_at")}
        found["breaker"] = None if change is None else change.why
        if self._decode is not None:
            found |= {"prompt": self._decode(prompt.tolist()), "output": self._decode(output.tolist())}
            found["exact_text"] = None if exact is None else self._decode(exact["token_ids"].tolist())
        return found
