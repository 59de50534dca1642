"""What a run of fly-tune keeps: whole lines or nothing, and nobody else's."""

import json
from pathlib import Path
from typing import Any

import pytest

from fly_trt import ConfigError
from fly_trt.tuning.result import PLAIN, Outcome
from fly_trt.tuning.store import Plan, Store

IDENTITY = {"engine": "abc", "seed": 0, "methods": ("ngram",)}
PLAN = Plan("search 0", [PLAIN], [3, 1])


def outcome(prompt: int) -> Outcome:
    return Outcome(PLAIN, prompt, "search", 0, 2, 0.5, 0, [7, 8], 1.0)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Of a run that has measured two blocks and is not finished."""
    path = tmp_path / "folder" / "state.jsonl"
    with Store(path, IDENTITY) as store:
        store.add_plan(PLAN)
        store.add_outcomes(PLAN.name, 0, [outcome(3)], elapsed=1.5)
        store.add_outcomes(PLAN.name, 1, [outcome(1)], elapsed=2.5)
    return path


def test_a_run_goes_on_with_what_it_has_measured(state: Path) -> None:
    with Store(state, IDENTITY) as store:
        assert store.plans == {PLAN.name: PLAN}
        assert store.outcomes() == [outcome(3), outcome(1)]
        assert store.elapsed == 2.5
        assert not store.is_finished
        store.finish()
    with Store(state, IDENTITY) as store:
        assert store.is_finished


def test_cut_off_at_any_byte_it_has_the_lines_that_are_whole(state: Path) -> None:
    content = state.read_bytes()
    for size in range(0, len(content), 11):
        state.write_bytes(content[:size])
        with Store(state, IDENTITY) as store:
            num_blocks = len(store.outcomes())
        assert num_blocks == max(0, content[:size].count(b"\n") - 2)
        assert content.startswith(state.read_bytes()) or size == 0
        assert state.read_bytes().endswith(b"\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"engine": "abd"}, 'another engine ("abc", now "abd")'),
        ({"seed": 1}, "another seed (0, now 1)"),
        ({"methods": ()}, 'another methods (["ngram"], now [])'),
        ({"chat": True}, "another chat (null, now true)"),
    ],
)
def test_measurements_of_another_run_are_refused_by_name(state: Path, change: dict[str, Any], named: str) -> None:
    before = state.read_bytes()
    with pytest.raises(ConfigError) as caught:
        Store(state, IDENTITY | change)
    assert f"{state}: a run with {named}" in str(caught.value)
    assert state.read_bytes() == before


def test_of_another_default_what_differs_is_named(tmp_path: Path) -> None:
    """As after --write, which leaves most of it as it was."""
    default = {"draft_token_cost": 0.12, "verification_token_cost": 0.06, "acceptance": "fly"}
    path = tmp_path / "state.jsonl"
    Store(path, {"default": default}).__exit__(None, None, None)
    with pytest.raises(ConfigError) as caught:
        Store(path, {"default": default | {"acceptance": "exact", "preset": "vllm"}})
    assert '({"acceptance": "fly"}, now {"acceptance": "exact", "preset": "v ...)' in str(caught.value)


@pytest.mark.parametrize("content", ['{"prompt": "x"}\n', "hello", "[]\n", '{"format": "fly-tune 0"}\n', "\xff\n"])
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match="not a state of"):
        Store(path, IDENTITY)
    assert path.read_text(encoding="latin-1") == content


def test_two_runs_do_not_write_one_file(state: Path) -> None:
    with Store(state, IDENTITY), pytest.raises(ConfigError, match="another fly-tune writes it"):
        Store(state, IDENTITY)


def test_without_a_file_it_remembers() -> None:
    with Store(None, IDENTITY) as store:
        store.add_plan(PLAN)
        store.add_outcomes(PLAN.name, 0, [outcome(3)], elapsed=1.0)
        assert store.outcomes() == [outcome(3)]


def test_every_line_is_json_that_others_can_read(state: Path) -> None:
    header, plan, *blocks = map(json.loads, state.read_text().splitlines())
    assert header["identity"]["seed"] == 0
    assert plan["plan"]["prompts"] == [3, 1]
    assert [block["outcomes"][0]["prompt_index"] for block in blocks] == [3, 1]
