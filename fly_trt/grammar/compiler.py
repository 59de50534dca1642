"""From what a caller says of an output's form to a grammar that its tokens can be held against.

Grammars are compiled by llguidance, which walks them token by token without tables of the whole vocabulary: a schema
is ready within milliseconds, and a mask costs some ten microseconds. The compiler knows one tokenizer and keeps the
grammars that were asked for last. Any thread may compile.
"""

import functools
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from fly_trt.errors import FlyError, RequestError
from fly_trt.grammar.masks import num_words, words_of
from fly_trt.grammar.matcher import Beginning, GrammarMatcher, short_error
from fly_trt.grammar.structured_outputs import StructuredOutputs
from fly_trt.grammar.vocabulary import Vocabulary, make_vocabulary

MAX_CACHED = 128
MAX_CACHED_CHARACTERS = 2_000_000
# A space, or a line's end and its indentation: what there is of white space has an end.
WHITESPACE = r" |\r?\n[ \t]{0,32}"
# Half of llguidance's own or less: a grammar that needs more would have the others of its batch wait for it.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "max_lexer_states": 40_000,
    "max_grammar_size": 100_000,
}
STACK_BYTES = 128 * 2**20  # of which only what is used costs memory
_STACK_SIZE_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class CompiledGrammar:
    """Over the tokens of `vocabulary`, of which the model can choose the first `vocab_size`. `name`: of the setting."""

    beginning: Beginning
    name: str
    vocabulary: Vocabulary
    vocab_size: int

    def new_matcher(self, end_token_ids: Iterable[int]) -> GrammarMatcher:
        """Of one sequence that ends with one of these tokens. Raises RequestError where the model can choose none."""
        ends = np.array(sorted(token for token in end_token_ids if 0 <= token < self.vocab_size), np.int64)
        if not len(ends):
            raise RequestError(
                "structured_outputs: no token may end the output, and nothing else may follow a finished one: leave "
                "ignore_eos out, or give stop_token_ids"
            )
        ended_by = words_of(ends, self.vocabulary.size)
        never = words_of(np.array([self.vocabulary.end_id]), self.vocabulary.size)
        return GrammarMatcher(self.beginning, self.name, self.vocab_size, frozenset(ends.tolist()), ended_by, never)


class GrammarCompiler:
    """For one tokenizer and a model over `vocab_size` tokens, of which each may have more than the other."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._vocabulary_lock = threading.Lock()
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[StructuredOutputs, Future[CompiledGrammar]] = OrderedDict()

    def is_ready(self, wanted: StructuredOutputs) -> bool:
        """Whether `compile` would take no time."""
        found = self._compiled.get(wanted)
        return found is not None and found.done()

    def compile(self, wanted: StructuredOutputs) -> CompiledGrammar:
        """Compiles it once, however many ask at once. Raises RequestError for what cannot be compiled, ConfigError
        without llguidance, or for a tokenizer that it cannot read."""
        while True:
            with self._lock:
                found = self._compiled.get(wanted)
                if found is None:
                    mine = self._compiled[wanted] = Future()
                    break
                self._compiled.move_to_end(wanted)
            try:
                return found.result()
            except CancelledError:
                continue  # whoever compiled it was interrupted
            except FlyError as error:
                raise type(error)(str(error)) from None
        try:
            mine.set_result(self._compile(wanted))
        except BaseException as error:
            with self._lock:
                self._compiled.pop(wanted, None)
            if isinstance(error, FlyError):
                mine.set_exception(error)
            else:
                mine.cancel()
            raise
        with self._lock:
            self._forget_oldest()
        return mine.result()

    def _forget_oldest(self) -> None:
        num_characters = sum(len(wanted.text) for wanted in self._compiled)
        while len(self._compiled) > 1 and (len(self._compiled) > MAX_CACHED or num_characters > MAX_CACHED_CHARACTERS):
            forgotten, _ = self._compiled.popitem(last=False)
            num_characters -= len(forgotten.text)

    def _compile(self, wanted: StructuredOutputs) -> CompiledGrammar:
        vocabulary = self._read_vocabulary()
        make = functools.partial(_on_large_stack, functools.partial(_make_matcher, vocabulary, wanted))
        return CompiledGrammar(Beginning(make), _name(wanted), vocabulary, self._vocab_size)

    def _read_vocabulary(self) -> Vocabulary:
        with self._vocabulary_lock:
            if self._vocabulary is None:
                self._vocabulary = make_vocabulary(self._tokenizer, self._vocab_size)
            return self._vocabulary


def _name(wanted: StructuredOutputs) -> str:
    return f"structured_outputs.{wanted.kind}"


def _on_large_stack(call: Callable[[], Any]) -> Any:
    """In a thread of its own: llguidance follows references by recursion, and knows no limit to it."""
    result: Future[Any] = Future()

    def work() -> None:
        try:
            result.set_result(call())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=work, name="fly-grammar", daemon=True)
    with _STACK_SIZE_LOCK:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return result.result()


def _make_matcher(vocabulary: Vocabulary, wanted: StructuredOutputs) -> Any:
    """At the beginning. Raises RequestError."""
    from llguidance import LLMatcher, LLParserLimits

    name = _name(wanted)
    try:
        grammar = _source(wanted)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: {short_error(str(error))}: mend it") from None
    limits = LLParserLimits(**LIMITS, verbose_errors=False)
    matcher = LLMatcher(vocabulary.tokens, grammar, log_level=0, limits=limits)
    if warnings := matcher.get_grammar_warnings():
        raise RequestError(f"{name}: {short_error(warnings[0])}: it would not be enforced: leave it out")
    if not matcher.is_error():
        first = np.zeros(num_words(vocabulary.size), np.uint32)
        matcher.unsafe_compute_mask_ptr(first.ctypes.data, first.nbytes)
    if matcher.is_error():
        reason = matcher.get_error()
        is_empty = reason.startswith("NoExtension")
        raise RequestError(f"{name}: {'no text has this form' if is_empty else short_error(reason)}: mend it")
    return matcher


def _source(wanted: StructuredOutputs) -> str:
    """In llguidance's own form. Raises ValueError."""
    from llguidance import LLMatcher, grammar_from

    if wanted.kind in ("json", "json_object"):
        pattern = WHITESPACE if wanted.whitespace_pattern is None else wanted.whitespace_pattern
        options: Any = {
            "whitespace_flexible": not wanted.disable_any_whitespace,
            "whitespace_pattern": None if wanted.disable_any_whitespace else pattern,
            "lenient": False,
            "coerce_one_of": False,
        }
        return LLMatcher.grammar_from_json_schema(wanted.text, overrides=options)
    if wanted.kind == "choice":
        return LLMatcher.grammar_from_regex("|".join(map(re.escape, json.loads(wanted.text))))
    if wanted.kind == "regex":
        return LLMatcher.grammar_from_regex(wanted.text)
    return grammar_from("grammar", wanted.text)
