"""Chat messages to a prompt, with the model's own template from the engine directory's tokenizer; no transformers
needed.

Templates come from the internet, so they run in Jinja's sandbox, with the functions that templates are written for.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn, TypedDict

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fly_trt.errors import EngineError, RequestError


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
    """The template of one tokenizer folder, which may have none."""

    def __init__(self, tokenizer_dir: Path) -> None:
        path = tokenizer_dir / "tokenizer_config.json"
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EngineError(f"{path}: not readable ({error}): rebuild the engine with fly-build") from None
        file = tokenizer_dir / "chat_template.jinja"
        self._source = file.read_text(encoding="utf-8") if file.is_file() else config.get("chat_template")
        self._tokens = {name: _text(value) for name, value in config.items() if name.endswith("_token") and value}
        self._template: jinja2.Template | None = None

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt's text, special tokens included; `variables` are the template's own, such as tools.

        Raises RequestError when the model has no template, or when the template refuses the messages.
        """
        if self._template is None:
            if not isinstance(self._source, str):
                raise RequestError("this model has no chat template: use generate() with a prompt")
            try:
                self._template = _environment().from_string(self._source)
            except jinja2.TemplateError as error:
                raise RequestError(f"this model's chat template is broken: {' '.join(str(error).split())}") from None
        well_formed = isinstance(messages, Sequence) and all(isinstance(m, dict) and "role" in m for m in messages)
        if not messages or not well_formed:
            raise RequestError(f"messages {messages!r}: expected a list of {{'role': ..., 'content': ...}}")
        for name in ("chat_template", "continue_final_message"):
            if name in variables:
                raise RequestError(f"{name}: not supported: the model's own template is applied to whole messages")
        # Templates may rely on these names being there.
        variables = {"tools": None, "documents": None, **self._tokens, **variables}
        try:
            return self._template.render(messages=messages, add_generation_prompt=add_generation_prompt, **variables)
        except Exception as error:  # a template can raise anything
            raise RequestError(f"the chat template refuses these messages: {' '.join(str(error).split())}") from None


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
