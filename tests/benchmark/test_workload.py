"""Where a benchmark's prompts come from, and what is wrong with files that hold none."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fly_trt import ConfigError
from fly_trt.benchmark.workload import FRAME, built_in_prompts, random_prompts, read_prompts, repeated
from fly_trt.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]


def test_the_built_in_prompts_are_framed_different_and_mostly_checked() -> None:
    prompts = built_in_prompts()
    texts = [str(prompt.prompt) for prompt in prompts]
    assert len(set(texts)) == len(texts) == 32
    assert all(text.startswith(FRAME[0]) and text.endswith(FRAME[1]) for text in texts)
    assert sum(prompt.check is not None for prompt in prompts) > 24


def test_their_families_come_by_turns_so_that_a_few_prompts_have_all_of_them() -> None:
    lines = (ROOT / "fly_trt" / "benchmark" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    families = [json.loads(line)["family"] for line in lines]
    assert len(set(families[:6])) == len(set(families)) == 6


def test_the_wheel_has_them(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        ROOT,
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "fly_trt/benchmark/prompts.jsonl" in zipfile.ZipFile(wheel).namelist()


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('\ufeff{"prompt": "a"}\n', encoding="utf-8")
    assert [prompt.prompt for prompt in read_prompts(file)] == ["a"]


def test_a_file_may_have_blank_lines_other_keys_and_line_separators_in_its_texts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    check = {"kind": "contains", "value": "b"}
    file.write_text('{"prompt": "a\u2028b", "id": 7}\r\n\n' + json.dumps({"prompt": "c", "check": check}), "utf-8")
    assert [(prompt.prompt, prompt.check) for prompt in read_prompts(file)] == [("a\u2028b", None), ("c", check)]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{'prompt': 'x'}", "not JSON ("),
        ('["x"]', 'list, expected an object such as {"prompt": "Tell me"}'),
        ('{"text": "x"}', "prompt None, expected a non-empty text under the key prompt"),
        ('{"prompt": ""}', "prompt '', expected a non-empty text"),
        ('{"prompt": "x", "check": {"kind": "regexp"}}', "check of kind 'regexp', expected one of contains, regex"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(ConfigError) as caught:
        read_prompts(file)
    assert str(caught.value).startswith(f"{file}:3: {problem}")
    assert len(str(caught.value).splitlines()) == 1


def test_files_without_prompts_are_named(tmp_path: Path) -> None:
    for content, problem in ((b"\n", "no prompts"), (b"\xff", "not UTF-8 text"), (None, "No such file")):
        file = tmp_path / f"{problem}.jsonl"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{problem}\.jsonl: {problem}"):
            read_prompts(file)


def test_random_prompts_are_those_of_their_seed_and_have_no_special_tokens(demo_engine: Path) -> None:
    tokenizer = load_tokenizer(demo_engine)
    prompts = random_prompts(tokenizer, 600, 50, 40, seed=3)
    assert prompts == random_prompts(tokenizer, 600, 50, 40, seed=3)
    assert prompts != random_prompts(tokenizer, 600, 50, 40, seed=4)
    token_ids = [prompt.prompt["prompt_token_ids"] for prompt in prompts]
    assert {len(ids) for ids in token_ids} == {50}
    drawn = {token for ids in token_ids for token in ids}
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    assert special
    assert not drawn & special
    assert max(drawn) < 600
    assert len(drawn) > 500


def test_more_prompts_than_there_are_start_again() -> None:
    assert repeated([1, 2, 3], 2) == [1, 2]
    assert repeated([1, 2, 3], 7) == [1, 2, 3, 1, 2, 3, 1]
