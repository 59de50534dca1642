"""Tokenizers of the usual kinds, and grammars over them, for tests of structured output."""

from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fly_trt.grammar import GrammarCompiler

DEMO_TOKENIZER = Path(__file__).parent / "assets/pair/target/tokenizer.json"


def letters_of(count: int) -> Tokenizer:
    """Token i is one character from "A" on, as bytes."""
    tokenizer = Tokenizer(models.BPE(vocab={chr(ord("A") + i): i for i in range(count)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: special tokens, bytes as tokens, words that begin with a space, and letters."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁yes", "▁no", *"abcdefghijklmnopqrstuvwxyz", '"', "{", "}", ":", ",", "0", "1", '":', "ab", "abc"]
    vocabulary = {word: token for token, word in enumerate(words)}
    model = models.BPE(vocab=vocabulary, merges=[("a", "b"), ("ab", "c")], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in words[:3]])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


def demo() -> Tokenizer:
    """The demo pair's, on bytes."""
    return Tokenizer.from_file(str(DEMO_TOKENIZER))


# By name: the tokenizer, and the size of the model's embedding table, which may be larger or smaller.
KINDS = {"byte level": (demo, 896), "byte fallback": (byte_fallback, 320), "small table": (demo, 700)}
END = {"byte level": 1, "byte fallback": 2, "small table": 1}


@cache
def tokenizer_of(kind: str) -> Tokenizer:
    return KINDS[kind][0]()


@cache
def compiler_of(kind: str) -> GrammarCompiler:
    return GrammarCompiler(tokenizer_of(kind), KINDS[kind][1])


@cache
def letter_compiler(count: int) -> GrammarCompiler:
    return GrammarCompiler(letters_of(count), count)
