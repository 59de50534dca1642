"""Chat messages to a prompt, with the model's own template from the engine directory's tokenizer; no transformers
needed.

Templates come from the internet, so they run in Jinja's sandbox, with the functions that templates are written for.
"""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fly_trt.errors import EngineError, RequestError, one_line

TOOL = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'

SHORT = 80  # characters of a wrong value that an error repeats


class ChatMessage(TypedDict):
    role: str
    content: str


class _GenerationTag(Extension):
    """{% generation %} marks the assistant's tokens for training; for a prompt it is only its content."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """The templates of one tokenizer folder, which may have none, one, or several by name. Which one is used follows
    transformers: the one that is asked for, "tool_use" where there are tools and it exists, else "default"."""

    def __init__(self, tokenizer_dir: Path) -> None:
        path = tokenizer_dir / "tokenizer_config.json"
        config = _read(path, json.loads)
        self._sources = _template_files(tokenizer_dir) or _configured(path, config.get("chat_template"))
        self._tokens = {name: _text(value) for name, value in config.items() if name.endswith("_token") and value}
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        /,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        tools: Sequence[dict[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt's text, special tokens included; `variables` are the template's own, such as documents.

        chat_template: the name of one of the model's templates. tools: JSON schemas. Raises RequestError when the model
        has no template or none of that name, or when the template refuses the messages.
        """
        well_formed = isinstance(messages, Sequence) and all(isinstance(m, dict) and "role" in m for m in messages)
        if not messages or not well_formed:
            raise RequestError(f"messages {_short(messages)}: expected a list of {{'role': ..., 'content': ...}}")
        if "continue_final_message" in variables:
            raise RequestError("continue_final_message: not supported: the template is applied to whole messages")
        _check_tools(tools)
        template = self._template(self._name(chat_template, has_tools=tools is not None))
        # Templates may rely on these names being there.
        variables = {"documents": None, **self._tokens, **variables, "tools": tools}
        try:
            # As one mapping: a variable may have the name of an argument.
            return template.render({**variables, "messages": messages, "add_generation_prompt": add_generation_prompt})
        except Exception as error:  # a template can raise anything
            raise RequestError(f"the chat template refuses these messages: {one_line(error)}") from None

    def source(self, *, has_tools: bool) -> str:
        """The text of the template that messages are rendered with by default; "" where there is none."""
        try:
            return self._sources[self._name(None, has_tools=has_tools)]
        except RequestError:
            return ""

    def _name(self, asked: str | None, *, has_tools: bool) -> str:
        if not self._sources:
            raise RequestError("this model has no chat template: use generate() with a prompt")
        names = ", ".join(sorted(self._sources))
        if asked is not None:
            if not isinstance(asked, str) or asked not in self._sources:
                raise RequestError(
                    f"chat_template {_short(asked)}: expected the name of one of the model's own, {names}"
                )
            return asked
        if has_tools and "tool_use" in self._sources:
            return "tool_use"
        if "default" not in self._sources:
            raise RequestError(f"this model has no default chat template: choose one with chat_template, of {names}")
        return "default"

    def _template(self, name: str) -> jinja2.Template:
        if name not in self._compiled:
            try:
                self._compiled[name] = _environment().from_string(self._sources[name])
            except Exception as error:  # besides Jinja's own, what compiling the code that it makes can raise
                raise RequestError(f"this model's chat template is broken: {one_line(error)}") from None
        return self._compiled[name]


def _template_files(tokenizer_dir: Path) -> dict[str, str]:
    """Templates by name; a file wins over the configuration."""
    files = {path.stem: path for path in (tokenizer_dir / "additional_chat_templates").glob("*.jinja")}
    if (default := tokenizer_dir / "chat_template.jinja").is_file():
        files["default"] = default
    return {name: _read(path, str) for name, path in files.items()}


def _configured(path: Path, chat_template: Any) -> dict[str, str]:
    if chat_template in (None, [], {}):
        return {}
    if isinstance(chat_template, str):
        return {"default": chat_template}
    try:
        is_named = isinstance(chat_template, dict)
        found = dict(chat_template) if is_named else {entry["name"]: entry["template"] for entry in chat_template}
    except (TypeError, KeyError):
        found = {}
    if not found or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise EngineError(
            f"{path}: chat_template is neither a text nor a list of {{'name': ..., 'template': ...}}: mend the "
            "checkpoint's and rebuild the engine"
        )
    return found


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: not readable ({error}): rebuild the engine with fly-build") from None


def _check_tools(tools: Any) -> None:
    if tools is None:
        return
    is_list = isinstance(tools, Sequence) and not isinstance(tools, str)
    wrong = [tool for tool in tools if not isinstance(tool, dict)] if is_list else [tools]
    if wrong:
        raise RequestError(
            f"tools: {_kind(wrong[0])}, expected a list of JSON schemas such as {TOOL}: "
            "transformers.utils.get_json_schema makes one of a function"
        )


def _kind(value: Any) -> str:
    return f"the function {value.__name__}" if callable(value) and hasattr(value, "__name__") else type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHORT else f"{text[:SHORT]}..."


def _text(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _environment() -> jinja2.Environment:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment
