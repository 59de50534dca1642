"""Log-probabilities in OpenAI's two forms are those of LLM.generate, also of a stream and of parts of characters."""

import pytest
from openai import OpenAI
from tokenizers import Tokenizer

from eval_prompts import load_eval_prompts
from fly_trt import LLM, SamplingParams
from fly_trt.outputs import Logprob
from fly_trt.serving.openai.answers.logprobs import ChatLogprobs, CompletionLogprobs
from fly_trt.text.token_text import TokenReader

PROMPT = load_eval_prompts()[0]["prompt"]
QUESTION = PROMPT.removeprefix("### Instruction:\n").removesuffix("\n### Response:\n")
LETTERS = {"structured_outputs": {"regex": "(ä|€|日本|😀){3,6}"}}
SAMPLED = {"temperature": 1.0, "seed": 2, "max_tokens": 60}


@pytest.fixture(scope="module")
def reader(llm: LLM) -> TokenReader:
    return TokenReader(llm.tokenizer)


def test_completions_list_them(client: OpenAI, llm: LLM) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=20, logprobs=2))[0].outputs[0]
    found = client.completions.create(model="demo", prompt=PROMPT, max_tokens=20, temperature=0, logprobs=2)
    lists = found.choices[0].logprobs
    entries = list(zip(expected.token_ids, expected.logprobs, strict=True))
    assert lists.token_logprobs == [entry[token].logprob for token, entry in entries]
    assert lists.tokens == [entry[token].decoded_token for token, entry in entries]
    assert lists.top_logprobs == [
        {found.decoded_token: found.logprob for found in entry.values()} for _, entry in entries
    ]
    for token, offset in zip(lists.tokens, lists.text_offset, strict=True):
        assert found.choices[0].text[offset:].startswith(token) or token == "<|eos|>"


def test_a_stream_lists_the_same_in_pieces(client: OpenAI) -> None:
    fields = {"model": "demo", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 2, "echo": True}
    fields["extra_body"] = {"num_speculative_tokens": 3}
    whole = client.completions.create(**fields).choices[0].logprobs
    pieces = [chunk.choices[0].logprobs for chunk in client.completions.create(stream=True, **fields)]
    assert len(pieces) > 2
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [item for piece in pieces for item in getattr(piece, name)] == getattr(whole, name)


def test_an_echoed_prompt_has_them_too(client: OpenAI, llm: LLM) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=5, logprobs=1, prompt_logprobs=1))[0]
    found = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=5, temperature=0, logprobs=1, echo=True
    ).choices[0]
    num_prompt = len(expected.prompt_token_ids)
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:num_prompt] == [
        entry[token].logprob
        for token, entry in zip(expected.prompt_token_ids[1:], expected.prompt_logprobs[1:], strict=True)
    ]
    for token, offset in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        assert found.text[offset:].startswith(token) or token.startswith("<|")


def test_chats_have_records(client: OpenAI, llm: LLM) -> None:
    params = SamplingParams(max_tokens=20, logprobs=2)
    expected = llm.chat([{"role": "user", "content": QUESTION}], params)[0].outputs[0]
    fields = {"model": "demo", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 20, "temperature": 0}
    fields |= {"logprobs": True, "top_logprobs": 2}
    records = client.chat.completions.create(**fields).choices[0].logprobs.content
    assert [record.logprob for record in records] == [
        entry[token].logprob for token, entry in zip(expected.token_ids, expected.logprobs, strict=True)
    ]
    for record, entry in zip(records, expected.logprobs, strict=True):
        best = sorted(entry.values(), key=lambda found: found.rank)[:2]
        assert [(top.token, top.logprob) for top in record.top_logprobs] == [
            (found.decoded_token, found.logprob) for found in best
        ]
    streamed = [
        record
        for chunk in client.chat.completions.create(stream=True, **fields)
        if chunk.choices[0].logprobs
        for record in chunk.choices[0].logprobs.content
    ]
    assert streamed == records


def test_bytes_of_tokens_are_the_text(client: OpenAI) -> None:
    found = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "x"}], logprobs=True, extra_body=LETTERS, **SAMPLED
    ).choices[0]
    raw = b"".join(bytes(record.bytes) for record in found.logprobs.content)
    assert raw.removesuffix(b"<|eos|>").decode() == found.message.content
    assert any("�" in record.token for record in found.logprobs.content)


def test_parts_of_characters_have_names_and_places(client: OpenAI) -> None:
    found = client.completions.create(
        model="demo", prompt="x", logprobs=0, echo=True, extra_body=LETTERS, **SAMPLED
    ).choices[0]
    raw = found.text.encode()
    position = 0
    for token, offset in zip(found.logprobs.tokens, found.logprobs.text_offset, strict=True):
        if token.startswith("<|"):
            continue
        piece = bytes.fromhex(token.removeprefix("bytes:").replace("\\x", "")) if "\\x" in token else token.encode()
        assert raw[position:].startswith(piece)
        assert offset == len(raw[: position + 1].decode(errors="ignore")) - (raw[position] < 0x80) or (
            offset == len(raw[:position].decode(errors="ignore"))
        )
        position += len(piece)
    assert position == len(raw)


def test_tokens_may_be_named_by_their_ids(client: OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True, "return_token_ids": True}
    fields = {"model": "demo", "max_tokens": 4, "temperature": 0, "extra_body": extra}
    completion = client.completions.create(prompt=PROMPT, logprobs=1, **fields).choices[0]
    names = [f"token_id:{token}" for token in completion.token_ids]
    assert completion.logprobs.tokens == names
    messages = [{"role": "user", "content": QUESTION}]
    answer = client.chat.completions.create(messages=messages, logprobs=True, **fields).choices[0]
    assert [record.token for record in answer.logprobs.content] == [f"token_id:{t}" for t in answer.token_ids]


def test_prompts_have_those_of_vllm(client: OpenAI, llm: LLM) -> None:
    expected = llm.generate(PROMPT, SamplingParams(max_tokens=1, prompt_logprobs=2))[0]
    fields = {"model": "demo", "max_tokens": 1, "temperature": 0, "extra_body": {"prompt_logprobs": 2}}
    found = client.completions.create(prompt=PROMPT, **fields).choices[0].prompt_logprobs
    assert found == [
        entry and {str(token): logprob._asdict() for token, logprob in entry.items()}
        for entry in expected.prompt_logprobs
    ]
    messages = [{"role": "user", "content": QUESTION}]
    assert client.chat.completions.create(messages=messages, **fields).prompt_logprobs[0] is None


def test_a_probability_of_zero_is_a_number(reader: TokenReader) -> None:
    entry = {5: Logprob(float("-inf"), 896, "a")}
    found = CompletionLogprobs(reader, 1, as_token_ids=False, skips_special=True).of([5], [entry])
    assert found["token_logprobs"] == [-9999.0]
    assert ChatLogprobs(reader, 1, as_token_ids=False).of([5], [entry])["content"][0]["logprob"] == -9999.0


def test_every_byte_of_a_byte_level_vocabulary_is_known(llm: LLM, reader: TokenReader) -> None:
    text = "".join(chr(code) for code in [*range(1, 0x250), 0x20AC, 0x1F600]) + "日本"
    ids = llm.tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(reader.as_bytes(token, reader.text(token)) for token in ids) == text.encode()


def test_byte_tokens_stand_for_their_bytes() -> None:
    from tokenizers import decoders, models

    vocabulary = {"<unk>": 0, "a": 1, "<0xE2>": 2, "<0x82>": 3, "<0xAC>": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    reader = TokenReader(tokenizer)
    assert [reader.as_bytes(token, reader.text(token)) for token in (1, 2, 3, 4)] == [b"a", b"\xe2", b"\x82", b"\xac"]
