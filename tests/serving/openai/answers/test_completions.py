"""/v1/completions through the official client: tokens, texts and numbers are those of LLM.generate."""

import asyncio
from typing import Any

import pytest
from openai import BadRequestError, OpenAI

from eval_prompts import load_eval_prompts
from fly_trt import LLM, AcceptanceParams, RequestOutput, SamplingParams

PROMPTS = [record["prompt"] for record in load_eval_prompts()[:50]]
PROMPT = PROMPTS[0]
TOKENS = {"return_token_ids": True}
SAMPLED = {"temperature": 1.5, "seed": 7}
LETTERS = {"structured_outputs": {"regex": "(ä|€|日本|😀){6,8}"}}  # each of several tokens, which are no text alone


def generate(llm: LLM, prompt: Any = PROMPT, **params: Any) -> RequestOutput:
    return llm.generate(prompt, SamplingParams(**{"max_tokens": 32, **params}))[0]


def complete(client: OpenAI, prompt: Any = PROMPT, extra: dict[str, Any] | None = None, **fields: Any) -> Any:
    fields = {"max_tokens": 32, "temperature": 0, **fields}
    return client.completions.create(model="demo", prompt=prompt, extra_body=extra, **fields)


def joined(stream: Any) -> dict[int, dict[str, Any]]:
    """What the chunks of a stream come to, by choice."""
    found: dict[int, dict[str, Any]] = {}
    for chunk in stream:
        for choice in chunk.choices:
            one = found.setdefault(choice.index, {"text": "", "tokens": [], "chunks": 0, "finish_reason": None})
            assert one["finish_reason"] is None, "a chunk after the last one"
            one["text"] += choice.text
            one["tokens"] += getattr(choice, "token_ids", [])
            one["chunks"] += 1
            one["finish_reason"] = choice.finish_reason
    return found


def test_fifty_prompts_at_once_give_the_tokens_of_generate(demo: Any, llm: LLM) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(max_tokens=16))
    fields = {"model": "demo", "max_tokens": 16, "temperature": 0, "extra_body": TOKENS}

    async def ask() -> list[Any]:
        async with demo.async_client() as client:

            async def whole(prompt: str) -> tuple[str, list[int]]:
                found = await client.completions.create(prompt=prompt, **fields)
                return found.choices[0].text, found.choices[0].token_ids

            async def streamed(prompt: str) -> tuple[str, list[int]]:
                text, tokens = "", []
                async for chunk in await client.completions.create(prompt=prompt, stream=True, **fields):
                    text += chunk.choices[0].text
                    tokens += chunk.choices[0].token_ids
                return text, tokens

            return await asyncio.gather(
                *(whole(prompt) if number % 2 else streamed(prompt) for number, prompt in enumerate(PROMPTS))
            )

    assert asyncio.run(ask()) == [(output.outputs[0].text, output.outputs[0].token_ids) for output in expected]


@pytest.mark.parametrize("acceptance", ["exact", "fly"])
def test_a_request_chooses_how_drafts_are_accepted(client: OpenAI, llm: LLM, acceptance: str) -> None:
    expected = generate(llm, acceptance=AcceptanceParams(acceptance=acceptance))
    found = complete(client, extra={"acceptance": acceptance})
    assert found.choices[0].text == expected.outputs[0].text
    assert found.metrics["acceptance"] == acceptance
    assert found.metrics["num_loosened_tokens"] == expected.metrics.num_loosened_tokens


def test_a_request_may_do_without_drafts(client: OpenAI, llm: LLM) -> None:
    expected = generate(llm, num_speculative_tokens=0)
    found = complete(client, extra={"num_speculative_tokens": 0})
    assert found.choices[0].text == expected.outputs[0].text
    details = found.usage.completion_tokens_details
    assert (details.accepted_prediction_tokens, details.rejected_prediction_tokens) == (0, 0)
    assert complete(client, extra={"num_speculative_tokens": 4}).usage.completion_tokens_details != details


@pytest.mark.parametrize(
    "extra",
    [
        {"acceptance": "fly", "preset": "paper", "fly_window_size": 3, "fly_entropy_threshold": 0.2},
        {"acceptance": "typical", "typical_threshold": 0.2, "exact_first": 3, "exact_within": ["digits"]},
        {"acceptance": "relaxed", "relaxed_top_n": 2, "exact_token_ids": [5, 6], "max_loosened_per_100": 4},
    ],
)
def test_settings_of_acceptance_are_fields(client: OpenAI, llm: LLM, extra: dict[str, Any]) -> None:
    expected = generate(llm, acceptance=AcceptanceParams(**extra))
    found = complete(client, extra=extra | TOKENS)
    assert found.choices[0].token_ids == expected.outputs[0].token_ids
    for name in ("guards", "num_loosened_tokens", "num_saved_tokens", "num_refused_loosenings_by_guard"):
        assert found.metrics[name] == getattr(expected.metrics, name)


def test_the_options_of_vllm_for_fly_have_its_names(client: OpenAI, llm: LLM) -> None:
    asked = {"fly_window_size": 3, "fly_entropy_threshold": 0.3, "fly_entropy_top_k": 3}
    expected = generate(llm, acceptance=AcceptanceParams(acceptance="fly", preset="vllm", **asked))
    found = complete(client, extra={"rejection_sample_method": "fly"} | asked | TOKENS)
    assert found.choices[0].token_ids == expected.outputs[0].token_ids
    exact = complete(client, extra={"rejection_sample_method": "standard"})
    assert exact.metrics["acceptance"] == "exact"


@pytest.mark.parametrize(
    ("fields", "extra"),
    [
        ({"presence_penalty": 1.5, "frequency_penalty": 0.5}, {"repetition_penalty": 1.2}),
        ({"logit_bias": {"91": 100}}, {"min_tokens": 4}),
        ({"top_p": 0.8, "seed": 3, "temperature": 0.9}, {"top_k": 20, "min_p": 0.01}),
        ({}, {"ignore_eos": True}),
        ({}, {"bad_words": ["shells"]}),
        ({}, {"stop_token_ids": [15]}),
    ],
)
def test_sampling_is_that_of_generate(client: OpenAI, llm: LLM, fields: Any, extra: Any) -> None:
    asked = dict(fields)
    if "logit_bias" in asked:
        asked["logit_bias"] = {int(token): bias for token, bias in asked["logit_bias"].items()}
    expected = generate(llm, **asked, **extra).outputs[0]
    found = complete(client, extra=extra | TOKENS, **fields).choices[0]
    assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
    assert (found.finish_reason, found.stop_reason) == (expected.finish_reason, expected.stop_reason)
    again = joined(complete(client, extra=extra | TOKENS, stream=True, **fields))[0]
    assert (again["text"], again["tokens"], again["finish_reason"]) == (
        expected.text,
        expected.token_ids,
        expected.finish_reason,
    )


def test_prompts_and_choices_are_counted_through(client: OpenAI, llm: LLM) -> None:
    prompts = PROMPTS[:3]
    expected = [generate(llm, prompt, n=2, **SAMPLED) for prompt in prompts]
    texts = [completion.text for output in expected for completion in output.outputs]
    found = complete(client, prompts, n=2, **SAMPLED)
    assert [choice.index for choice in found.choices] == list(range(6))
    assert [choice.text for choice in found.choices] == texts
    assert found.usage.prompt_tokens == sum(len(output.prompt_token_ids) for output in expected)
    assert found.usage.completion_tokens == sum(output.metrics.num_output_tokens for output in expected)
    streamed = joined(complete(client, prompts, n=2, stream=True, **SAMPLED))
    assert [streamed[index]["text"] for index in range(6)] == texts


def test_prompts_may_be_token_ids(client: OpenAI, llm: LLM) -> None:
    outputs = [generate(llm, prompt) for prompt in PROMPTS[:2]]
    ids = [output.prompt_token_ids for output in outputs]
    assert complete(client, ids[0]).choices[0].text == outputs[0].outputs[0].text
    found = complete(client, ids, extra=TOKENS)
    assert [choice.text for choice in found.choices] == [output.outputs[0].text for output in outputs]
    assert [choice.prompt_token_ids for choice in found.choices] == ids


def test_a_wrong_prompt_among_several_is_named(client: OpenAI) -> None:
    with pytest.raises(BadRequestError, match=r"prompt\[1\]: .*896 is not a token id"):
        complete(client, [[5, 6], [5, 896]])


def test_echo_begins_with_the_prompt(client: OpenAI, llm: LLM) -> None:
    expected = generate(llm)
    text = PROMPT + expected.outputs[0].text
    assert complete(client, echo=True).choices[0].text == text
    assert joined(complete(client, echo=True, stream=True))[0]["text"] == text
    assert complete(client, expected.prompt_token_ids, echo=True).choices[0].text == text


def test_the_prompt_alone_can_be_looked_at(client: OpenAI, llm: LLM) -> None:
    expected = generate(llm, prompt_logprobs=1)
    found = complete(client, echo=True, logprobs=1, max_tokens=0)
    assert found.choices[0].text == PROMPT
    assert found.choices[0].logprobs.token_logprobs == [
        entry and entry[token].logprob
        for token, entry in zip(expected.prompt_token_ids, expected.prompt_logprobs, strict=True)
    ]
    assert found.usage.completion_tokens == found.usage.completion_tokens_details.accepted_prediction_tokens == 0
    assert found.usage.total_tokens == found.usage.prompt_tokens == len(expected.prompt_token_ids)


@pytest.mark.parametrize(("acceptance", "drafts"), [("exact", 0), ("exact", 3), ("exact", 15), ("fly", 15)])
def test_stop_strings_end_stream_and_answer_at_the_same_place(
    client: OpenAI, llm: LLM, acceptance: str, drafts: int
) -> None:
    asked = {"acceptance": acceptance, "num_speculative_tokens": drafts}
    for number, prompt in enumerate(PROMPTS[:2]):
        params = asked | {"acceptance": AcceptanceParams(acceptance=acceptance)}
        text = generate(llm, prompt, max_tokens=20, **params).outputs[0].text
        for start in (3 + number, len(text) - 6 - number):
            stop = text[start : start + 3]
            extra = asked | {"include_stop_str_in_output": bool(number)}
            whole = complete(client, prompt, stop=stop, extra=extra).choices[0]
            streamed = joined(complete(client, prompt, stop=stop, stream=True, extra=extra))[0]
            end = text.index(stop) + number * len(stop)
            assert whole.text == streamed["text"] == text[:end]
            assert (whole.finish_reason, whole.stop_reason) == ("stop", stop)
            assert streamed["finish_reason"] == "stop"


@pytest.mark.parametrize(("drafts", "stop"), [(0, "本ä"), (3, "😀"), (15, "本ä"), (15, None)])
def test_characters_of_several_tokens_come_whole(client: OpenAI, llm: LLM, drafts: int, stop: str | None) -> None:
    extra = LETTERS | {"num_speculative_tokens": drafts, "acceptance": "exact"}
    params = LETTERS | {"num_speculative_tokens": drafts, "acceptance": AcceptanceParams(acceptance="exact")}
    sampling = {"temperature": 1.0, "seed": 3, "stop": stop, "max_tokens": 100}
    expected = generate(llm, **params, **sampling).outputs[0]
    whole = complete(client, extra=extra | TOKENS, **sampling).choices[0]
    streamed = joined(complete(client, stream=True, extra=extra | TOKENS, **sampling))[0]
    assert whole.text == streamed["text"] == expected.text
    assert whole.token_ids == streamed["tokens"] == expected.token_ids
    assert set(expected.text) <= set("ä€日本😀")


def test_text_cut_within_a_character_is_the_same_in_a_stream(client: OpenAI, llm: LLM) -> None:
    for max_tokens in range(1, 5):
        sampling = {"temperature": 1.0, "seed": 1, "max_tokens": max_tokens}
        expected = generate(llm, **LETTERS, **sampling).outputs[0].text
        assert complete(client, extra=LETTERS, **sampling).choices[0].text == expected
        assert joined(complete(client, extra=LETTERS, stream=True, **sampling))[0]["text"] == expected


def test_a_form_of_the_output_is_kept(client: OpenAI) -> None:
    found = complete(client, extra={"structured_outputs": {"choice": ["left", "right"]}})
    assert found.choices[0].text in ("left", "right")


def test_the_length_ends_an_answer(client: OpenAI) -> None:
    found = complete(client, max_tokens=3, extra=TOKENS).choices[0]
    assert (len(found.token_ids), found.finish_reason) == (3, "length")
    assert complete(client, max_tokens=None, temperature=None).usage.completion_tokens <= 16
