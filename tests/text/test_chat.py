"""Chat templates: rendered as transformers renders them, refused in one line, and kept in a sandbox."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fly_trt import LLM, EngineError, RequestError, SamplingParams
from fly_trt.text.chat import ChatTemplate

PAIR = Path(__file__).parents[1] / "assets" / "pair"
USER = {"role": "user", "content": "Spell out: 21."}
TALK = [
    {"role": "system", "content": "  You are terse.\n"},
    {"role": "user", "content": "Hi <you> & 'me'"},
    {"role": "assistant", "content": "  Hello, naïve 🙂\n\n"},
    {"role": "user", "content": "Bye"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <b>", "parameters": {"x": [1, None, True]}}}]

TEMPLATES = {
    "chatml": """{% for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "llama3": """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + eos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
""",
    "mistral": """{%- set loop_messages = messages if messages[0].role != 'system' else messages[1:] %}
{%- set system = messages[0]["content"] if messages[0].role == 'system' else '' %}
{{- bos_token }}
{%- for message in loop_messages %}
{%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
{{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif %}
{%- if message.role == "user" %}
[INST] {% if loop.first and system %}{{ system }}

{% endif %}{{ message.content }}[/INST]
{%- else %}
 {{ message.content.strip() }}{{ eos_token }}
{%- endif %}
{%- endfor %}
""",
    "qwen_tools": """{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string %}
        {%- set ns.multi_step = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- message.role ~ ':' ~ message.content | tojson(indent=1) ~ (loop.index0 == ns.last) ~ '\\n' }}
{%- endfor %}
""",
    "trim_and_lstrip": """
  {% for m in messages %}
    {# a comment #}
    {% if loop.last %}
last: {{ m.content }}
    {% else %}
{{ m.role | upper | replace("S", "$") }}: {{ m.content.split() | join("_") }}
    {% endif %}
  {% endfor %}
end
""",
    "loop_controls": """{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{{ m.role }}{% if m.role == 'assistant' %}{% break %}{% endif %}
{% endfor %}""",
    "generation_tag": """{% for m in messages %}
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}
<{{ m.role }}>{{ m.content }}
{% endif %}{% endfor %}""",
    "macro": """{% macro turn(role, s) %}<{{ role }}>{{ s | trim }}{% if role == 'user' %}!{% endif %}{% endmacro %}
{%- for m in messages %}{{ turn(m.role, m.content) }}{% endfor %}{{ documents is none }}{{ nothing is defined }}""",
    "escapes": "{{ '<b>&' }}{{ messages | tojson }}{{ messages[0].content }}{{ {'b': 1, 'a': 'ü'} | tojson }}",
}
"""After templates of real checkpoints: ChatML, Llama 3, Mistral, Qwen."""

CONVERSATIONS = {"one turn": [USER], "with a system message": TALK, "without one": TALK[1:]}


def write_tokenizer(folder: Path, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    shutil.copy(PAIR / "target" / "tokenizer.json", folder)
    known = json.loads((PAIR / "target" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(known | config))
    return folder


def outcome(render: Any) -> str:
    try:
        return render()
    except Exception:
        return "refused"


def assert_like_transformers(folder: Path, messages: list[dict], **variables: Any) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(str(folder))
    want = outcome(lambda: reference.apply_chat_template(messages, tokenize=False, **variables))
    assert outcome(lambda: ChatTemplate(folder).render(messages, **variables)) == want


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_in_transformers(
    tmp_path: Path, name: str, messages: list[dict], generation_prompt: bool
) -> None:
    folder = write_tokenizer(tmp_path, chat_template=TEMPLATES[name])
    assert_like_transformers(folder, messages, add_generation_prompt=generation_prompt)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_and_other_variables_reach_the_template(tmp_path: Path, name: str) -> None:
    folder = write_tokenizer(tmp_path, chat_template=TEMPLATES[name])
    assert_like_transformers(folder, TALK, add_generation_prompt=True, tools=TOOLS, date_string="1 May 2030")


def test_the_demo_pairs_template_renders_as_in_transformers(demo_engine: Path) -> None:
    for messages in CONVERSATIONS.values():
        assert_like_transformers(demo_engine / "tokenizer", messages, add_generation_prompt=True)
    assert ChatTemplate(demo_engine / "tokenizer").render([USER]).startswith("<|bos|>### Instruction:\nSpell out: 21.")


def test_special_tokens_that_are_objects_render_as_their_text(tmp_path: Path) -> None:
    token = {"__type": "AddedToken", "content": "<|eos|>", "lstrip": False, "normalized": False, "special": True}
    folder = write_tokenizer(tmp_path, eos_token=token, chat_template="{{ eos_token }}{{ messages[0].content }}")
    assert ChatTemplate(folder).render([USER]) == "<|eos|>Spell out: 21."
    assert_like_transformers(folder, [USER])


def test_a_special_token_that_the_model_lacks_is_nothing(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, bos_token=None, chat_template="[{{ bos_token }}]{{ bos_token is defined }}")
    assert_like_transformers(folder, [USER])


def test_a_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, chat_template="old")
    (folder / "chat_template.jinja").write_text("new")
    assert ChatTemplate(folder).render([USER]) == "new"


NAMED = {
    "default": "default{{ tools is none }}",
    "tool_use": "tools{{ tools | length }}",
    "rag": "rag{{ documents[0].text }}",
}
"""As Command R has them."""


def write_named(folder: Path, form: str, names: list[str]) -> Path:
    """A tokenizer folder with these templates, in one of the forms in which checkpoints have them."""
    templates = {name: NAMED[name] for name in names}
    if form == "list":
        return write_tokenizer(folder, chat_template=[{"name": n, "template": t} for n, t in templates.items()])
    write_tokenizer(folder, chat_template="the configuration's, which files replace")
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        file = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / file).write_text(text)
    return folder


@pytest.mark.parametrize("form", ["list", "files"])
@pytest.mark.parametrize("names", [["default", "tool_use", "rag"], ["default", "rag"], ["tool_use", "rag"]])
def test_one_of_several_templates_is_chosen_as_in_transformers(tmp_path: Path, form: str, names: list[str]) -> None:
    folder = write_named(tmp_path, form, names)
    documents = [{"title": "t", "text": "x"}]
    for variables in ({}, {"tools": TOOLS}, {"tools": []}, {"chat_template": "rag", "documents": documents}):
        assert_like_transformers(folder, [USER], **variables)
    assert_like_transformers(folder, [USER], tools=TOOLS, chat_template="rag", documents=documents)
    if "tool_use" in names:
        assert ChatTemplate(folder).render([USER], tools=TOOLS) == "tools1"
    assert ChatTemplate(folder).render([USER], chat_template="rag", documents=documents) == "ragx"


def test_templates_as_transformers_saves_them_are_found(tmp_path: Path) -> None:
    known = PreTrainedTokenizerFast.from_pretrained(str(write_named(tmp_path / "list", "list", list(NAMED))))
    known.save_pretrained(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "additional_chat_templates" / "tool_use.jinja").is_file()
    assert ChatTemplate(tmp_path / "saved").render([USER], tools=TOOLS) == "tools1"
    assert ChatTemplate(tmp_path / "saved").render([USER]) == "defaultTrue"


def test_a_template_that_is_not_there_is_refused_with_the_names_that_are(tmp_path: Path) -> None:
    named = ChatTemplate(write_named(tmp_path / "named", "files", ["tool_use", "rag"]))
    with pytest.raises(RequestError, match="no default chat template: choose one with chat_template, of rag, tool_use"):
        named.render([USER])
    with pytest.raises(RequestError, match="chat_template 'x': expected the name of one of the model's own, rag, tool"):
        named.render([USER], chat_template="x")
    with pytest.raises(RequestError, match=r"chat_template '\{\{ 1 \}\}': expected the name of one of the"):
        ChatTemplate(write_tokenizer(tmp_path / "one")).render([USER], chat_template="{{ 1 }}")


@pytest.mark.parametrize("name", [["x"], {}, 7, b"default"])
def test_a_template_name_of_another_type_is_refused(tmp_path: Path, name: Any) -> None:
    with pytest.raises(RequestError) as raised:
        ChatTemplate(write_tokenizer(tmp_path)).render([USER], chat_template=name)
    assert str(raised.value) == f"chat_template {name!r}: expected the name of one of the model's own, default"


def test_a_text_that_is_no_name_and_messages_that_are_none_are_not_repeated_whole(tmp_path: Path) -> None:
    template = ChatTemplate(write_tokenizer(tmp_path))
    with pytest.raises(RequestError) as raised:
        template.render([USER], chat_template="{{ messages }}" * 100)
    start = "chat_template '{{ messages }}{{ messages }}"
    assert str(raised.value).startswith(start)
    assert str(raised.value).endswith("...: expected the name of one of the model's own, default")
    assert len(str(raised.value)) < 200
    wrong: Any = [USER] * 100 + [None]
    with pytest.raises(RequestError) as raised:
        template.render(wrong)
    assert str(raised.value).startswith("messages [{'role': 'user', 'content'")
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("chat_template", [7, ["x"], [{"name": "default"}], [{"name": "a", "template": None}]])
def test_a_configuration_with_something_else_for_a_template_is_named(tmp_path: Path, chat_template: Any) -> None:
    with pytest.raises(EngineError, match=r"tokenizer_config\.json: chat_template is neither a text nor a list of"):
        ChatTemplate(write_tokenizer(tmp_path, chat_template=chat_template))


def find_weather(city: str) -> str:
    """Finds it."""
    return city


@pytest.mark.parametrize(
    ("tools", "got"),
    [
        ([find_weather], "the function find_weather"),
        ([TOOLS[0], "x"], "str"),
        ("tools", "str"),
        (TOOLS[0], "dict"),
        ([None], "NoneType"),
        ([*TOOLS, None], "NoneType"),
        (0, "int"),
    ],
)
def test_tools_that_are_no_schemas_are_refused_with_what_makes_one(tmp_path: Path, tools: Any, got: str) -> None:
    with pytest.raises(RequestError) as raised:
        ChatTemplate(write_tokenizer(tmp_path)).render([USER], tools=tools)
    assert f"tools: {got}, expected a list of JSON schemas such as" in str(raised.value)
    assert "transformers.utils.get_json_schema makes one of a function" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_generation_prompt_is_added_unless_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, chat_template="{% if add_generation_prompt %}go{% endif %}")
    assert ChatTemplate(folder).render([USER]) == "go"
    assert ChatTemplate(folder).render([USER], add_generation_prompt=False) == ""


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must\n  alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.no_such() }}", "no_such"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[0]['content'] | int | log }}", "log"),
        ("{{ strftime_now(5) }}", "strftime"),
        ("{{ messages | tojson(default=strftime_now) }}", "unexpected keyword argument 'default'"),
        ("{{ raise_exception('half: \\ud83d') }}", "half: \\ud83d"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{% no_such_tag %}", "no_such_tag"),
    ],
)
def test_what_a_template_raises_is_one_line_about_these_messages(tmp_path: Path, template: str, message: str) -> None:
    folder = write_tokenizer(tmp_path, chat_template=template)
    with pytest.raises(RequestError, match="chat template") as raised:
        ChatTemplate(folder).render([USER])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ messages.__class__() }}",
        "{{ (''|attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{{ ''.format.__self__.__class__.__base__ }}",
        "{{ messages.append({'role': 'system', 'content': 'x'}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ lipsum.__globals__['os'].getcwd() }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, attack: str) -> None:
    folder = write_tokenizer(tmp_path, chat_template=attack)
    messages = [dict(USER)]
    with pytest.raises(RequestError, match="unsafe"):
        ChatTemplate(folder).render(messages)
    assert messages == [USER]


@pytest.mark.parametrize("attribute", ["messages.__class__", "raise_exception.__globals__", "strftime_now.__code__"])
def test_an_internal_attribute_is_nothing_to_a_template(tmp_path: Path, attribute: str) -> None:
    folder = write_tokenizer(tmp_path, chat_template=f"[{{{{ {attribute} }}}}]")
    assert ChatTemplate(folder).render([USER]) == "[]"


@pytest.mark.parametrize("messages", [[], "hello", [{"content": "x"}], ["hello"], [USER, None], {"role": "user"}])
def test_what_is_no_conversation_is_refused_with_the_form_expected(tmp_path: Path, messages: Any) -> None:
    folder = write_tokenizer(tmp_path)
    with pytest.raises(RequestError, match=r"expected a list of \{'role': \.\.\., 'content': \.\.\.\}"):
        ChatTemplate(folder).render(messages)


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, chat_template=None)
    with pytest.raises(RequestError, match=r"no chat template: use generate\(\) with a prompt"):
        ChatTemplate(folder).render([USER])


def test_a_broken_configuration_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(EngineError, match=r"tokenizer_config\.json: not readable"):
        ChatTemplate(tmp_path)


def test_one_conversation_or_many_are_answered_like_their_prompts(demo_engine: Path) -> None:
    other = {"role": "user", "content": "Spell out: 7, 40, 13."}
    texts = [f"### Instruction:\n{message['content']}\n### Response:\n" for message in (USER, other)]
    params = SamplingParams(max_tokens=24)
    with LLM(demo_engine) as llm:
        want = llm.generate(texts, params)
        many = llm.chat([[USER], [other]], params)
        (one,) = llm.chat([USER], params)
        each = llm.chat([[USER], [other]], [SamplingParams(max_tokens=2), SamplingParams(max_tokens=3)])
        (raw,) = llm.chat([USER], params, add_generation_prompt=False)
    assert [o.outputs[0].text for o in many] == [o.outputs[0].text for o in want]
    assert [o.prompt_token_ids for o in many] == [o.prompt_token_ids for o in want], "one BOS, as without a template"
    assert one.prompt_token_ids == many[0].prompt_token_ids
    assert one.prompt_token_ids.count(0) == 1
    assert one.outputs[0].token_ids == many[0].outputs[0].token_ids
    assert [len(o.outputs[0].token_ids) for o in each] == [2, 3]
    assert raw.finished


def test_a_wrong_conversation_is_refused_before_anything_runs(demo_engine: Path) -> None:
    with LLM(demo_engine) as llm:
        with pytest.raises(RequestError, match="expected a list of"):
            llm.chat([])
        with pytest.raises(RequestError, match="expected a list of"):
            llm.chat([[USER], []])
        assert llm.metrics()["fly_trt:prompt_tokens_total"] == 0
