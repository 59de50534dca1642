"""What an answer is worth: what a prompts file offers decides, and what is wrong with it or with a command is named."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, ConfigError, SamplingParams
from fly_trt.benchmark.client import Exchange
from fly_trt.benchmark.likelihood import Likelihood
from fly_trt.benchmark.workload import BenchmarkPrompt, read_prompts
from fly_trt.engines.directory import LoadedEngines
from fly_trt.tuning.quality import AgreementJudge, Judge, make_judge, normalised

CHECKED = BenchmarkPrompt("a", check={"kind": "contains", "value": "42"})
ANSWERED = BenchmarkPrompt("b", reference="Forty-two")
BARE = BenchmarkPrompt("c")
# Prints for each line that it reads the length of the output, cut to 1 and less, and notes what it was given.
SCORER = """
import json, pathlib, sys
lines = [json.loads(line) for line in sys.stdin]
with pathlib.Path(sys.argv[1]).open("a") as file:
    file.writelines(json.dumps(line) + "\\n" for line in lines)
for line in lines:
    print(len(line["output"]) / 10)
"""


def answers(*texts: str, of: int = 0) -> list[tuple[int, Exchange]]:
    return [(of, Exchange(text=text)) for text in texts]


def values(judge: Judge, given: list[tuple[int, Exchange]]) -> list[float]:
    return [score.value for score in judge.scores(given)]


def judge_of(*prompts: BenchmarkPrompt, **asked: object) -> Judge:
    return make_judge(prompts, None, **asked)  # type: ignore[arg-type]


def python(tmp_path: Path, program: str, *arguments: str) -> str:
    file = tmp_path / "score.py"
    file.write_text(program)
    return shlex.join([sys.executable, str(file), *arguments])


def test_checks_come_first_then_references_then_agreement() -> None:
    both = BenchmarkPrompt("d", check=CHECKED.check, reference="42")
    assert judge_of(CHECKED, both).kind == "checks"
    assert judge_of(ANSWERED, both).kind == "references"
    assert judge_of(BARE, BARE).kind == "agreement"
    assert judge_of(both, judge="references").kind == "references"
    assert judge_of(both, judge="agreement").kind == "agreement"
    assert judge_of(both, score_command="scorer").kind == "command"


def test_a_file_in_which_only_some_prompts_can_be_judged_is_refused() -> None:
    with pytest.raises(ConfigError, match="2 of 3 prompts have a check, number 3 has none: give each of them one"):
        judge_of(CHECKED, CHECKED, BARE)
    with pytest.raises(ConfigError, match="2 of 3 prompts have a reference answer, number 1 has none"):
        judge_of(BARE, ANSWERED, ANSWERED)
    with pytest.raises(ConfigError, match="judge 'checks': 1 of 2 prompts have no check, number 2 first"):
        judge_of(CHECKED, BARE, judge="checks")
    assert judge_of(CHECKED, BARE, judge="agreement").kind == "agreement"


def test_a_judge_that_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="judge 'taste': expected one of checks, references, command, agreement"):
        judge_of(BARE, judge="taste")
    with pytest.raises(ConfigError, match="give the command"):
        judge_of(BARE, judge="command")
    with pytest.raises(ConfigError, match="do not go together"):
        judge_of(CHECKED, judge="checks", score_command="scorer")
    with pytest.raises(ConfigError, match="mend the quotes"):
        judge_of(BARE, score_command="'scorer")
    with pytest.raises(ConfigError, match="expected a command"):
        judge_of(BARE, score_command=" ")


def test_checks_are_passed_or_not() -> None:
    assert values(judge_of(CHECKED), answers("it is 42", "it is 43")) == [1, 0]


@pytest.mark.parametrize("text", ["Forty-two", " forty-TWO.\n", '"Forty-two"', "Ｆorty-two!", "**forty-two**"])
def test_a_reference_answer_is_the_same_however_it_is_set(text: str) -> None:
    assert values(judge_of(ANSWERED), answers(text)) == [1]


@pytest.mark.parametrize("text", ["", "forty two", "It is forty-two", "forty-three"])
def test_another_answer_is_wrong(text: str) -> None:
    assert values(judge_of(ANSWERED), answers(text)) == [0]
    assert normalised("a\n  b") == "a b"


def test_a_file_may_call_its_reference_answers_answer(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    records = [
        {"prompt": "a", "reference": "x", "answer": "y"},
        {"prompt": "b", "answer": "y"},
        {"prompt": "c", "answer": 12},
        {"prompt": "d", "reference": 0.5},
        {"prompt": "e", "answer": ["some", "other", "use"]},
        {"prompt": "f", "answer": " "},
        {"prompt": "g", "answer": True},
        {"prompt": "h"},
    ]
    file.write_text("\n".join(json.dumps(record) for record in records))
    found = [prompt.reference for prompt in read_prompts(file)]
    assert found == ["x", "y", "12", "0.5", None, None, None, None]


@pytest.mark.parametrize("reference", [["x"], {}, True, " "])
def test_a_reference_that_is_none_is_named(tmp_path: Path, reference: object) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a", "reference": reference}))
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:1: reference .*, expected a non-empty text or a number"):
        read_prompts(file)


def test_a_command_is_told_prompt_reference_and_output_and_asked_once_of_each(tmp_path: Path) -> None:
    log = tmp_path / "log"
    judge = judge_of(ANSWERED, BARE, score_command=python(tmp_path, SCORER, str(log)))
    assert values(judge, [*answers("long", "é\n", "long"), *answers("long", of=1)]) == [0.4, 0.2, 0.4, 0.4]
    assert values(judge, answers("long", "x")) == [0.4, 0.1]
    assert [json.loads(line) for line in log.read_text().splitlines()] == [
        {"prompt": "b", "reference": "Forty-two", "output": "long"},
        {"prompt": "b", "reference": "Forty-two", "output": "é\n"},
        {"prompt": "c", "reference": None, "output": "long"},
        {"prompt": "b", "reference": "Forty-two", "output": "x"},
    ]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import sys; print('no key', file=sys.stderr); sys.exit(3)", "exit status 3: no key"),
        ("import sys; sys.exit(3)", "exit status 3: nothing on stderr"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("print(1)", "1 lines for 2 answers, expected a number from 0 to 1 for each"),
        ("print('1\\n1\\n1')", "3 lines for 2 answers"),
        ("print('1\\n\\n1')", "3 lines for 2 answers"),
        ("print('1\\ngood')", "line 2 of its output is 'good', expected a number from 0 to 1"),
        ("print('1\\n1.5')", "line 2 of its output is '1.5'"),
        ("print('nan\\n1')", "line 1 of its output is 'nan'"),
        ("import time; time.sleep(60)", "not done with 2 answers after 1 s"),
    ],
)
def test_what_a_command_does_wrong_is_named(tmp_path: Path, program: str, says: str) -> None:
    timeout = 1.0 if "sleep" in program else 60.0
    judge = judge_of(BARE, score_command=python(tmp_path, program), command_timeout=timeout)
    with pytest.raises(ConfigError) as caught:
        judge.scores(answers("a", "b"))
    assert says in str(caught.value)
    assert str(caught.value).startswith("score_command ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    judge = judge_of(BARE, score_command=str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="No such file or directory: give a program that can be run"):
        judge.scores(answers("a"))


def test_the_targets_own_answers_agree_and_others_less(demo_engine: Path) -> None:
    prompts = [record["prompt"] for record in load_eval_prompts()[::120]]
    params = [SamplingParams(max_tokens=20), SamplingParams(max_tokens=20, temperature=3, seed=1)]
    with LLM(demo_engine, speculative_config={"method": None}) as llm:
        outputs = [[llm.generate(prompt, each)[0] for prompt in prompts] for each in params]
    with LoadedEngines(demo_engine, max_batch_size=1) as engines:
        judge = AgreementJudge(Likelihood(engines))
        exchanges = [
            (index, Exchange(token_ids=list(one.outputs[0].token_ids), prompt_token_ids=list(one.prompt_token_ids)))
            for outcome in outputs
            for index, one in enumerate(outcome)
        ]
        scores = judge.scores(exchanges)
    own, sampled = scores[: len(prompts)], scores[len(prompts) :]
    assert [score.value for score in own] == pytest.approx([1] * len(prompts), abs=1e-4)
    assert all(0 < score.value < 0.9 for score in sampled)
    for one, other in zip(own, sampled, strict=True):
        assert one.log_likelihood is not None
        assert other.log_likelihood is not None
        assert one.log_likelihood > other.log_likelihood
