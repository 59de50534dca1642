"""What form an answer to a chat has: free text, text of a given form, calls of tools, and which of them may come.

`ToolCalling` is what a server knows of its model, `AnswerForm` what one request asks for: what its template and its
sampling are given, and how its text is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from fly_trt.errors import FlyError, RequestError
from fly_trt.grammar import StructuredOutputs
from fly_trt.serving.openai.requests.response_format import ANY_OBJECT, SCHEMA, read_response_format
from fly_trt.serving.openai.requests.tool_calls import PARSERS, Delta, ToolParser, check_parser, detect, make_parser
from fly_trt.serving.openai.requests.tool_calls.forced import arguments_schema, calls_grammar
from fly_trt.serving.openai.requests.tool_calls.tools import Choice, Tool, invalid, read_choice, read_tools


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerForm:
    """tools: those that the template is told of. callable: those that may be called. parser: the name of the format
    of calls, None where none are looked for. answer: the schema that was asked for of a text."""

    choice: Choice = "none"
    tools: tuple[Tool, ...] = ()
    callable: tuple[Tool, ...] = ()
    parser: str | None = None
    max_calls: int | None = None
    answer: Mapping[str, Any] | bool | None = None
    structured_outputs: StructuredOutputs | None = None
    shown_special_tokens: tuple[str, ...] = ()

    @property
    def template_variables(self) -> dict[str, Any]:
        return {"tools": [tool.as_template_variable() for tool in self.tools]} if self.tools else {}

    @property
    def sampling(self) -> dict[str, Any]:
        """Fields of SamplingParams."""
        found: dict[str, Any] = {}
        if self.structured_outputs is not None:
            found["structured_outputs"] = self.structured_outputs
        if self.shown_special_tokens:
            found["shown_special_tokens"] = self.shown_special_tokens
        return found

    def new_reader(self) -> "AnswerReader":
        """Of one completion."""
        parser = None if self.parser is None else make_parser(self.parser, max_calls=self.max_calls)
        return AnswerReader(parser, names_calls=self.choice != "named")

    def explain(self, error: FlyError, compile: Callable[[StructuredOutputs], object]) -> FlyError:
        """The same error, with the name of the schema that cannot be compiled where that is why. `compile` raises
        RequestError for such a one, and may take its time."""
        for field, schema in self._schemas():
            try:
                compile(StructuredOutputs(json=schema, disable_any_whitespace=True))
            except RequestError as why:
                return invalid(field, _without_field(why))
        return error

    def _schemas(self) -> Iterator[tuple[str, Mapping[str, Any] | bool]]:
        """Those that the answer is held to, and where they are in the body."""
        if self.structured_outputs is None:
            return
        if self.answer is not None:
            yield f"{SCHEMA}.schema", self.answer
        for tool in self.callable:
            yield f"tools[{self.tools.index(tool)}].function.parameters of {tool.name!r}", arguments_schema(tool)


class AnswerReader:
    """The text of one completion as it comes. parser: None where all of it is content. names_calls: calls are why it
    ends; OpenAI says so unless the caller has named the function."""

    def __init__(self, parser: ToolParser | None, *, names_calls: bool) -> None:
        self._parser = parser
        self._names_calls = names_calls
        self._has_calls = False

    def read(self, text: str, *, is_last: bool) -> list[Delta]:
        """What `text`, which follows what was read before, says of content and calls."""
        if self._parser is None:
            return [Delta(content=text)] if text else []
        found = self._parser.feed(text)
        if is_last:
            found += self._parser.finish()
        self._has_calls |= any(delta.index is not None for delta in found)
        return found

    def finish_reason(self, reason: str | None) -> str | None:
        """From the runtime's."""
        return "tool_calls" if reason == "stop" and self._has_calls and self._names_calls else reason


class ToolCalling:
    """How one model writes calls. parser: a name of PARSERS, None for the one that its chat template asks for. Raises
    ConfigError for an unknown name."""

    def __init__(self, parser: str | None, template: str, tokenizer: Tokenizer) -> None:
        if parser is not None:
            check_parser(parser)
        self._parser = parser or detect(template)
        added = {token.content: token.special for token in tokenizer.get_added_tokens_decoder().values()}
        markers = () if self._parser is None else PARSERS[self._parser].markers
        self._tokens = frozenset(marker for marker in markers if marker in added)
        self._special = tuple(marker for marker in markers if added.get(marker))

    def read(
        self,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        parallel_tool_calls: bool | None = None,
        response_format: Mapping[str, Any] | None = None,
        has_structured_outputs: bool = False,
    ) -> AnswerForm:
        """From the fields of a body. has_structured_outputs: the body has them, too. Raises ApiError."""
        known = read_tools(tools or ())
        choice, callable_tools = read_choice(tool_choice, known)
        answer = read_response_format(response_format)
        _check_one_form(choice, answer, has_structured_outputs)
        if choice == "none":
            return AnswerForm(answer=answer, structured_outputs=_json(answer))
        if self._parser is None:
            raise invalid(
                "tools",
                "this model's chat template names no format of calls that is known: start the server with "
                f"--tool-call-parser {' or '.join(PARSERS)}, or use tool_choice 'none'",
            )
        is_one = choice == "named" or parallel_tool_calls is False
        return AnswerForm(
            choice=choice,
            tools=known,
            callable=callable_tools,
            parser=self._parser,
            max_calls=1 if is_one else None,
            answer=answer,
            structured_outputs=self._force(choice, callable_tools, is_one=is_one, answer=answer),
            shown_special_tokens=self._special,
        )

    def _force(
        self, choice: Choice, tools: Sequence[Tool], *, is_one: bool, answer: Mapping[str, Any] | bool | None
    ) -> StructuredOutputs | None:
        if self._parser is None or (choice == "auto" and answer is None):
            return None
        form = PARSERS[self._parser]
        grammar = calls_grammar(form, tools, is_one=is_one, tokens=self._tokens, answer=answer)
        return _structured_outputs("tools", grammar=grammar)


def _json(answer: Mapping[str, Any] | bool | None) -> StructuredOutputs | None:
    if answer is None:
        return None
    if answer is ANY_OBJECT:
        return StructuredOutputs(json_object=True)
    return _structured_outputs(f"{SCHEMA}.schema", json=answer)


def _structured_outputs(field: str, **given: Any) -> StructuredOutputs:
    """Of what `field` asks for."""
    try:
        return StructuredOutputs(**given)
    except RequestError as error:
        raise invalid(field, _without_field(error)) from None


def _without_field(error: RequestError) -> str:
    return str(error).split(": ", 1)[-1]


def _check_one_form(choice: Choice, answer: Mapping[str, Any] | bool | None, has_structured_outputs: bool) -> None:
    is_forced = choice in ("required", "named")
    said = {
        "response_format": answer is not None,
        "structured_outputs": has_structured_outputs,
        "a tool_choice that forces a call": is_forced,
    }
    both = [name for name, is_said in said.items() if is_said]
    if len(both) > 1:
        raise invalid(both[0], f"cannot be combined with {both[1]}: an answer has one form: leave one of them out")
