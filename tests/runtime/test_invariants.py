"""FLY_TRT_CHECK=1 has the product look after every step at what tests look at."""

from pathlib import Path

import pytest

from eval_prompts import load_eval_prompts
from fly_trt import LLM, EngineError, SamplingParams
from fly_trt.runtime.request import Request
from loop_stack import make_request, make_stack
from table_engine import hashed


@pytest.mark.parametrize("is_checked", [False, True])
def test_a_broken_rule_is_named_where_it_is_looked_for(is_checked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLY_TRT_CHECK", "1" if is_checked else "0")
    stack = make_stack(hashed(32, 1))
    request = make_request(request_id="seven")
    stack.loop.add([request])
    stack.loop.step()
    request.output_token_ids.append(3)
    if not is_checked:
        stack.loop.step()
        return
    with pytest.raises(AssertionError, match="seven: prompt and output are the committed tokens"):
        stack.loop.step()


def test_a_service_that_checks_itself_serves_and_ends_only_what_breaks_a_rule(
    demo_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [prompt["prompt"] for prompt in load_eval_prompts()[:12]]
    params = SamplingParams(max_tokens=40)
    with LLM(demo_engine) as llm:
        want = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    monkeypatch.setenv("FLY_TRT_CHECK", "1")
    with LLM(demo_engine) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == want
        commit = Request.commit

        def commit_twice(request: Request, tokens: list[int], logprobs: None = None) -> int:
            request.output_token_ids.append(tokens[0])
            return commit(request, tokens, logprobs)

        with monkeypatch.context() as patch:
            patch.setattr(Request, "commit", commit_twice)
            with pytest.raises(EngineError, match="prompt and output are the committed tokens"):
                llm.generate(prompts[0], params)
        assert llm.generate(prompts[0], params)[0].outputs[0].token_ids == want[0]
