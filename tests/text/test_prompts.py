"""Prompts as token ids: what is added to them, what is refused, and what a refusal says."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from fly_trt import RequestError
from fly_trt.text.prompts import PromptReader

TARGET = Path(__file__).parents[1] / "assets" / "pair" / "target"
USER = {"role": "user", "content": "Spell out: 21."}
BOS, EOS = 0, 1
HALF = "a\ud83d"


@pytest.fixture
def tokenizer() -> Tokenizer:
    """The demo pair's, with one token more than the embedding table has rows."""
    tokenizer = Tokenizer.from_file(str(TARGET / "tokenizer.json"))
    tokenizer.add_special_tokens([f"[PAD{i}]" for i in range(3, 8)])
    assert tokenizer.token_to_id("[PAD7]") == 896
    return tokenizer


def make_reader(tokenizer: Tokenizer, folder: Path = TARGET, max_seq_len: int = 100) -> PromptReader:
    return PromptReader(tokenizer, folder, vocab_size=896, max_seq_len=max_seq_len)


def test_a_token_without_an_embedding_is_refused_by_name_however_it_comes(tokenizer: Tokenizer) -> None:
    reader = make_reader(tokenizer)
    rendered = reader.render_chat([{"role": "user", "content": "hello [PAD7]"}])
    for prompt in ("hello [PAD7]", {"prompt_token_ids": [BOS, 896]}, rendered):
        with pytest.raises(RequestError) as raised:
            reader.tokenize(prompt)
        assert str(raised.value) == (
            "the prompt: the tokenizer's token '[PAD7]' has the id 896, and the target's embedding table has only 896 "
            "rows: leave it out, or give the checkpoint a row for it (resize_token_embeddings) and rebuild the engine"
        )


@pytest.mark.parametrize("token", [897, -1, 2**40, -(2**40)])
def test_an_id_that_no_token_has_is_refused_with_the_range(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(RequestError, match=f"prompt_token_ids: {token} is not a token id, expected 0 to 895"):
        make_reader(tokenizer).tokenize({"prompt_token_ids": [5, token]})


def test_a_text_that_begins_with_the_first_token_does_not_get_it_twice(tokenizer: Tokenizer) -> None:
    reader = make_reader(tokenizer)
    plain = reader.tokenize("Spell out: 21.")
    assert plain[0] == BOS != plain[1]
    assert reader.tokenize("<|bos|>Spell out: 21.") == plain
    assert reader.tokenize("<|bos|>") == [BOS]
    assert reader.tokenize("<|bos|><|bos|>x")[:3] == [BOS, BOS, reader.tokenize("x")[1]], "the text's own stay"
    assert reader.tokenize({"prompt_token_ids": [BOS, *plain]}) == [BOS, *plain], "ids are taken as they are"


def test_a_rendered_conversation_reads_the_same_as_text_and_as_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(TARGET, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    reader = make_reader(tokenizer, tmp_path)
    assert reader.tokenize("<|bos|>Spell out: 21.") == reader.render_chat([USER])["prompt_token_ids"]


@pytest.mark.parametrize(
    ("template", "want"),
    [("$A <|eos|>", lambda ids: [*ids, EOS]), ("<|bos|> <|eos|> $A <|eos|>", lambda ids: [BOS, EOS, *ids, EOS])],
)
def test_only_what_the_tokenizer_puts_before_a_text_counts_as_its_beginning(
    tokenizer: Tokenizer, template: str, want: Any
) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<|bos|>", BOS), ("<|eos|>", EOS)]
    )
    ids = tokenizer.encode("hello", add_special_tokens=False).ids
    reader = make_reader(tokenizer)
    assert reader.tokenize("hello") == want(ids)
    assert reader.tokenize("<|eos|><|eos|>hello") == want([EOS, EOS, *ids])
    if template.startswith("<|bos|>"):
        assert reader.tokenize("<|bos|><|eos|>hello") == want(ids)


def test_a_tokenizer_that_adds_nothing_changes_nothing(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    reader = make_reader(tokenizer)
    assert reader.tokenize("<|bos|><|bos|>") == [BOS, BOS]


def test_half_a_surrogate_pair_is_refused_in_text_and_in_chat(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(TARGET, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{{ tools | tojson }}{{ mood }}")
    reader = make_reader(tokenizer, tmp_path)
    message = (
        r"the prompt: '\\ud83d' at character 1 is half of a surrogate pair and no text: decode its source as UTF-8"
    )
    with pytest.raises(RequestError, match=message):
        reader.tokenize(HALF)
    tools = [{"type": "function", "function": {"name": HALF}}]
    for content, variables in ((HALF, {}), ("x", {"tools": tools}), ("x", {"mood": HALF})):
        with pytest.raises(RequestError, match=r"the rendered chat: '\\ud83d' at character \d+ is half of a surrogate"):
            reader.render_chat([{"role": "user", "content": content}], **variables)


class WatchedTokenizer:
    """Says what it was given to encode, and in which way."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.encoded: list[str] = []
        self.blocking: list[str] = []

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        self.blocking.append(text)
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_batch(self, texts: list[str], add_special_tokens: bool = True) -> Any:
        self.encoded += texts
        return self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(tokenizer: Tokenizer) -> None:
    watched = WatchedTokenizer(tokenizer)
    reader = make_reader(watched)
    longest = max(map(len, tokenizer.get_vocab()))
    text = "x" * (100 * longest + 1)
    with pytest.raises(RequestError, match=r"the prompt has \d+ characters, max_seq_len is 100 tokens of up to"):
        reader.tokenize(text)
    with pytest.raises(RequestError, match=r"the rendered chat has \d+ characters, max_seq_len is 100 tokens of up to"):
        reader.render_chat([{"role": "user", "content": text}])
    assert not watched.encoded


def test_nothing_of_a_prompt_is_tokenised_under_pythons_lock(tokenizer: Tokenizer) -> None:
    """tokenizers' encode holds it, encode_batch does not."""
    watched = WatchedTokenizer(tokenizer)
    reader = make_reader(watched)
    reader.tokenize("a prompt")
    reader.render_chat([USER])
    assert len(watched.encoded) == 2
    assert not watched.blocking


@pytest.mark.parametrize("prompt", ["", {"prompt_token_ids": []}])
def test_an_empty_prompt_is_refused(tokenizer: Tokenizer, prompt: Any) -> None:
    with pytest.raises(RequestError, match="the prompt is empty: give at least one character or token"):
        make_reader(tokenizer).tokenize(prompt)


def test_a_template_that_renders_nothing_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(TARGET, tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{# nothing #}")
    with pytest.raises(RequestError, match="the rendered chat is empty"):
        make_reader(tokenizer, tmp_path).render_chat([USER])


def test_a_bad_word_is_its_tokens_at_the_start_and_after_a_space(tokenizer: Tokenizer) -> None:
    """So that the same letters within a longer word are other tokens, which may come."""
    reader = make_reader(tokenizer)
    plain, spaced, longer = (tokenizer.encode(w, add_special_tokens=False).ids for w in ("eight", " eight", " eighty"))
    assert reader.bad_words(["eight"]) == reader.bad_words([" eight"]) == [plain, spaced]
    assert plain != spaced != longer[: len(spaced)]


def test_a_bad_word_that_the_target_cannot_generate_needs_no_mask(tokenizer: Tokenizer) -> None:
    reader = make_reader(tokenizer)
    assert reader.bad_words(["[PAD7]", "eight"]) == reader.bad_words(["eight"])


@pytest.mark.parametrize("word", [" ", "\n\t"])
def test_a_bad_word_without_tokens_is_refused_by_name(tokenizer: Tokenizer, word: str) -> None:
    with pytest.raises(RequestError) as raised:
        make_reader(tokenizer).bad_words(["a", word])
    assert str(raised.value) == f"bad_words: {word!r} has no tokens of its own: leave it out"
