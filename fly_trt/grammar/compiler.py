"""From what a caller says of an output's form to a grammar that its tokens can be held against.

Grammars are compiled by llguidance, which walks them token by token without tables of the whole vocabulary: a schema
is ready within milliseconds, and a mask costs some ten microseconds. The compiler knows one tokenizer and keeps the
grammars that were asked for last. Any thread may compile.
"""

import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from fly_trt.errors import ConfigError, RequestError, one_line
from fly_trt.grammar.matcher import GrammarMatcher
from fly_trt.grammar.structured_outputs import StructuredOutputs

MAX_CACHED = 128


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """`matcher`: llguidance's, at the beginning, to be copied and never advanced."""

    matcher: Any
    vocab_size: int

    def new_matcher(self) -> GrammarMatcher:
        """Of one sequence."""
        return GrammarMatcher(self.matcher.deep_copy(), self.vocab_size)


class GrammarCompiler:
    """end_token_ids: the model's own ends, which are what may follow a finished output."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_token_ids = sorted(end_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        self._compiled: OrderedDict[StructuredOutputsKey, CompiledGrammar] = OrderedDict()

    def is_ready(self, wanted: StructuredOutputs) -> bool:
        """Whether `compile` would take no time."""
        return _key(wanted) in self._compiled

    def compile(self, wanted: StructuredOutputs) -> CompiledGrammar:
        """Raises RequestError for what cannot be compiled, ConfigError without llguidance."""
        key = _key(wanted)
        with self._lock:
            if (found := self._compiled.get(key)) is not None:
                self._compiled.move_to_end(key)
                return found
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
        compiled = CompiledGrammar(self._compile(wanted), self._vocab_size)
        with self._lock:
            self._compiled[key] = compiled
            while len(self._compiled) > MAX_CACHED:
                self._compiled.popitem(last=False)
        return compiled

    def _read_vocabulary(self) -> Any:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise ConfigError("structured_outputs: needs llguidance: pip install 'fly-trt[structured]'") from None
        return LLTokenizer(self._tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=self._end_token_ids)

    def _compile(self, wanted: StructuredOutputs) -> Any:
        from llguidance import LLMatcher, grammar_from

        try:
            if wanted.kind in ("json", "json_object"):
                schema = wanted.text if wanted.kind == "json" else '{"type": "object"}'
                options: Any = {"whitespace_flexible": not wanted.disable_any_whitespace}
                grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)
            else:
                grammar = grammar_from(wanted.kind, wanted.text)  # type: ignore[arg-type]
        except ValueError as error:
            raise RequestError(f"structured_outputs.{wanted.kind}: {one_line(error)}: mend it") from None
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0)
        if matcher.is_error():
            raise RequestError(f"structured_outputs.{wanted.kind}: {' '.join(matcher.get_error().split())}: mend it")
        return matcher


StructuredOutputsKey = tuple[str, str, bool, str | None]


def _key(wanted: StructuredOutputs) -> StructuredOutputsKey:
    return wanted.kind, wanted.text, wanted.disable_any_whitespace, wanted.whitespace_pattern
