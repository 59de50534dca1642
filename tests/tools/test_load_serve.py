"""The load on fly-serve, shortened: each kind of request twice. Its checks see what is wrong."""

import asyncio
from collections import Counter
from pathlib import Path

import pytest

import load_serve
from load_serve import Load, Tally, check_memory, check_metrics


@pytest.fixture
def idle() -> dict[str, float]:
    gauges = dict.fromkeys(("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"), 0.0)
    return gauges | {"request_success_totalstop": 3.0, "generation_tokens_total": 50.0}


def test_a_short_load_has_no_wrong_answer(demo_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()

    async def each_once(load: Load, num_clients: int, seconds: float) -> None:
        await asyncio.gather(*(kind() for _, kind in load._kinds for _ in range(num_clients)))
        seen.update(kind.__name__ for _, kind in load._kinds)

    monkeypatch.setattr(Load, "run", each_once)
    monkeypatch.setattr(load_serve, "BODY_SECONDS", 1.0)
    tally, _ = asyncio.run(load_serve.run(demo_engine, tmp_path / "log", clients=2, seconds=0, num_prompts=2))
    assert tally.failures == []
    assert len(seen) == 8
    assert sum(tally.ended.values()) > 0


@pytest.mark.parametrize(
    ("ended", "num_cut", "num_tokens", "is_right"),
    [(3, 0, 50, True), (2, 1, 40, True), (2, 0, 40, False), (4, 5, 50, False), (3, 0, 51, False)],
)
def test_counters_that_do_not_agree_are_found(
    idle: dict[str, float], ended: int, num_cut: int, num_tokens: int, is_right: bool
) -> None:
    tally = Tally(ended=Counter(stop=ended), num_cut=num_cut, num_tokens=num_tokens)
    check_metrics(tally, idle)
    assert (not tally.failures) == is_right


def test_a_request_that_still_runs_is_found(idle: dict[str, float]) -> None:
    tally = Tally(ended=Counter(stop=3))
    check_metrics(tally, idle | {"num_requests_running": 1.0})
    assert tally.failures == ["metrics: num_requests_running is 1.0"]


@pytest.mark.parametrize(("growth", "is_right"), [(0, True), (100_000, True), (500_000, False)])
def test_memory_that_grows_is_found(growth: int, is_right: bool) -> None:
    tally = Tally(memory=[(float(second), 200_000_000 + growth * second) for second in range(300)])
    assert "after a minute" in check_memory(tally)
    assert (not tally.failures) == is_right
