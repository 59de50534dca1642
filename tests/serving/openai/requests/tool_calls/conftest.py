"""The demo pair with chat templates that know tools, in the manner of Hermes and of Llama 3. It was not trained on
them: what it says of tools, a grammar has it say."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer

HERMES_TEMPLATE = """
{%- if tools %}### Tools within <tool_call></tool_call>:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{% endif %}
{%- for m in messages %}
{%- if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>
{% elif m.role == 'assistant' %}{{ m.content }}
{%- for call in m.tool_calls %}{% set call = call.function %}
<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>{% endfor %}
{% else %}### Instruction:
{{ m.content }}
### Response:
{% endif %}{% endfor %}"""

LLAMA_TEMPLATE = """{{ bos_token }}
{%- if tools %}Environment: ipython
Answer with {"name": function name, "parameters": dictionary of argument name and its value}.
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}
{%- for m in messages %}
{%- if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = m.tool_calls[0].function %}{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}
{% elif m.role == 'tool' %}ipython: {{ m.content | tojson }}
{% else %}### Instruction:
{{ m.content }}
### Response:
{% endif %}{% endfor %}"""


def with_template(engine: Path, folder: Path, template: str, tokens: list[AddedToken]) -> Path:
    """The same engine with another template and more tokens; its embedding table has rows to spare."""
    shutil.copytree(engine, folder, copy_function=os.link)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    tokenizer.add_tokens(tokens)
    manifest = json.loads((folder / "fly.json").read_text(encoding="utf-8"))
    texts = {"tokenizer/chat_template.jinja": template, "tokenizer/tokenizer.json": tokenizer.to_str()}
    for name, text in texts.items():
        replace(folder / name, text)
        manifest["files"][name]["size"] = len(text.encode())
    replace(folder / "fly.json", json.dumps(manifest))
    return folder


def replace(path: Path, text: str) -> None:
    """Not the file that it is linked to."""
    path.unlink()
    path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="session")
def hermes_engine(demo_engine: Path, tmp_path_factory: Any) -> Path:
    """Its markers are tokens, and no special ones, as Qwen's."""
    tokens = [AddedToken(marker, normalized=False) for marker in ("<tool_call>", "</tool_call>")]
    return with_template(demo_engine, tmp_path_factory.mktemp("hermes") / "demo", HERMES_TEMPLATE, tokens)


@pytest.fixture(scope="session")
def llama_engine(demo_engine: Path, tmp_path_factory: Any) -> Path:
    """Its marker is a special token, as Llama 3's."""
    tokens = [AddedToken(marker, normalized=False, special=True) for marker in ("<|python_tag|>", "<|other|>")]
    return with_template(demo_engine, tmp_path_factory.mktemp("llama") / "demo", LLAMA_TEMPLATE, tokens)
