"""Grammars are compiled once and kept within bounds, and what cannot be compiled is refused in one line."""

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tokenizers import Tokenizer, models

from fly_trt import ConfigError, RequestError, StructuredOutputs
from fly_trt.grammar import GrammarCompiler, compiler
from grammar_tokenizers import DEMO_TOKENIZER, demo, letters_of, tokenizer_of


@pytest.fixture
def grammars() -> GrammarCompiler:
    return GrammarCompiler(tokenizer_of("byte level"), 896)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was compiled, in order."""
    texts: list[str] = []
    source = compiler._source
    monkeypatch.setattr(compiler, "_source", lambda wanted: (texts.append(wanted.text), source(wanted))[1])
    return texts


def test_what_is_asked_for_again_is_not_compiled_again(grammars: GrammarCompiler, compiled: list[str]) -> None:
    asked = StructuredOutputs(regex="a+")
    assert not grammars.is_ready(asked)
    assert grammars.compile(asked) is grammars.compile(StructuredOutputs(regex="a+"))
    assert grammars.is_ready(asked)
    assert compiled == ["a+"]


def test_many_threads_that_ask_at_once_compile_each_grammar_once(
    grammars: GrammarCompiler, compiled: list[str]
) -> None:
    together = threading.Barrier(16)

    def ask(i: int) -> object:
        together.wait()
        return grammars.compile(StructuredOutputs(regex=f"a{{{i % 2 + 1}}}"))

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(ask, range(16)))
    assert len(set(map(id, results))) == 2
    assert sorted(compiled) == ["a{1}", "a{2}"]


def test_threads_that_wait_for_a_grammar_that_fails_all_get_its_error(grammars: GrammarCompiler) -> None:
    together = threading.Barrier(8)

    def ask(_: int) -> str:
        together.wait()
        with pytest.raises(RequestError) as raised:
            grammars.compile(StructuredOutputs(regex="(a"))
        return str(raised.value)

    with ThreadPoolExecutor(8) as pool:
        (message,) = set(pool.map(ask, range(8)))
    assert message.startswith("structured_outputs.regex: ")
    assert not grammars.is_ready(StructuredOutputs(regex="(a"))


def test_an_interrupted_compilation_is_taken_over_by_who_waits(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, entered, release = StructuredOutputs(regex="b+"), threading.Event(), threading.Event()
    source = compiler._source

    def interrupted(wanted: StructuredOutputs) -> str:
        if not entered.is_set():
            entered.set()
            release.wait(60)
            raise KeyboardInterrupt
        return source(wanted)

    monkeypatch.setattr(compiler, "_source", interrupted)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(grammars.compile, asked)
        entered.wait(60)
        second = pool.submit(grammars.compile, asked)
        release.set()
        assert isinstance(first.exception(60), KeyboardInterrupt)
        assert second.result(60) is grammars.compile(asked)


def test_the_grammars_that_were_asked_for_last_are_kept_within_a_number_and_a_size(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "MAX_CACHED", 3)
    asked = [StructuredOutputs(regex="a" * (i + 1)) for i in range(5)]
    for one in asked[:3]:
        grammars.compile(one)
    grammars.compile(asked[0])
    grammars.compile(asked[3])
    assert [grammars.is_ready(one) for one in asked] == [True, False, True, True, False]
    monkeypatch.setattr(compiler, "MAX_CACHED_CHARACTERS", 9)
    grammars.compile(asked[4])
    assert [grammars.is_ready(one) for one in asked] == [False, False, False, True, True]
    monkeypatch.setattr(compiler, "MAX_CACHED_CHARACTERS", 2)
    grammars.compile(StructuredOutputs(regex="b" * 40))
    assert grammars.is_ready(StructuredOutputs(regex="b" * 40)), "the one that is asked for is kept"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"json": {"uniqueItems": True}}, 'structured_outputs.json: .*Unimplemented keys: ["uniqueItems"]'),
        ({"json": {"not": {"type": "string"}}}, 'structured_outputs.json: .*Unimplemented keys: ["not"]'),
        ({"json": {"if": {}, "then": {}}}, 'structured_outputs.json: .*Unimplemented keys: ["if", "then"]'),
        ({"json": {"type": "strin"}}, "structured_outputs.json: .*Invalid type: strin"),
        ({"json": {"type": "string", "format": "hallo"}}, "structured_outputs.json: .*Unknown format: hallo"),
        ({"json": {"type": "string", "pattern": "(?=a)"}}, "structured_outputs.json: .*look-around"),
        ({"json": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}, "structured_outputs.json: .*oneOf"),
        ({"json": {"minItems": 3, "maxItems": 2, "type": "array"}}, "structured_outputs.json: "),
        ({"json": {"$ref": "#/$defs/a"}}, "structured_outputs.json: "),
        ({"json": {"$ref": "#"}}, "structured_outputs.json: no text has this form"),
        ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, "structured_outputs.json: "),
        ({"regex": "("}, "structured_outputs.regex: "),
        ({"regex": r"\bfoo\b"}, "structured_outputs.regex: .*lookarounds not supported"),
        ({"regex": "[a&&b]"}, "structured_outputs.regex: no text has this form"),
        ({"grammar": "start: x"}, "structured_outputs.grammar: "),
        ({"grammar": "hello"}, "structured_outputs.grammar: "),
        ({"grammar": 'root ::= "a'}, "structured_outputs.grammar: "),
        ({"grammar": 'start: "a"\n' + "# " + "long " * 2000 + "\nx: ("}, "structured_outputs.grammar: "),
        (
            {"grammar": 'start: %json {"x-guidance": {"lenient": true}, "uniqueItems": true}'},
            'structured_outputs.grammar: .*Unimplemented keys: ["uniqueItems"]: it would not be enforced: leave it out',
        ),
        ({"json": {}, "whitespace_pattern": "("}, "structured_outputs.json: "),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_one_line(grammars: GrammarCompiler, asked: dict, message: str) -> None:
    with pytest.raises(RequestError) as raised:
        grammars.compile(StructuredOutputs(**asked))
    start, _, rest = message.partition(".*")
    text = str(raised.value)
    assert text.startswith(start)
    assert rest in text
    assert "\n" not in text
    assert len(text) < 450


def test_a_remote_reference_is_not_fetched(grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    for url in ("http://localhost:9/schema.json", "https://example.com/schema", "file:///etc/hosts"):
        with pytest.raises(RequestError, match=r"structured_outputs\.json: .*does not fetch"):
            grammars.compile(StructuredOutputs(json={"$ref": url}))


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(4000)} | {"a4000": {}}, "$ref": "#/$defs/a0"},
        {
            "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}]} for i in range(1600)} | {"a1600": {}},
            "$ref": "#/$defs/a0",
        },
    ],
)
def test_a_long_chain_of_references_does_not_end_the_process(schema: dict) -> None:
    """llguidance follows it by recursion, and where a stack ends no exception can be caught."""
    program = (
        "import json, sys\nfrom tokenizers import Tokenizer\nfrom fly_trt import StructuredOutputs\n"
        "from fly_trt.grammar import GrammarCompiler\n"
        "grammars = GrammarCompiler(Tokenizer.from_file(sys.argv[1]), 896)\n"
        "grammars.compile(StructuredOutputs(json=json.load(sys.stdin)))\nprint('compiled')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(DEMO_TOKENIZER)],
        input=json.dumps(schema),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "compiled"), done.stderr[-500:]


def test_a_tokenizer_that_cannot_be_read_is_a_setting_that_cannot_work() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(ConfigError, match=r"structured_outputs: llguidance cannot read this tokenizer \(.*\)"):
        GrammarCompiler(words, 2).compile(StructuredOutputs(regex="a"))


def test_without_llguidance_the_error_names_the_extra(
    grammars: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=r"structured_outputs: needs llguidance: pip install 'fly-trt\[structured\]'"):
        grammars.compile(StructuredOutputs(regex="a"))


def test_importing_the_package_loads_no_grammar_library() -> None:
    program = "import fly_trt, sys; fly_trt.LLM, fly_trt.StructuredOutputs; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "False"


def test_the_tokenizer_is_read_once_and_only_when_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = compiler.make_vocabulary
    monkeypatch.setattr(compiler, "make_vocabulary", lambda *given: (made.append(1), make(*given))[1])
    grammars = GrammarCompiler(letters_of(20), 20)
    assert made == []
    for regex in ("A", "B"):
        grammars.compile(StructuredOutputs(regex=regex))
    assert made == [1]


def test_the_tokenizer_itself_stays_as_it_is() -> None:
    tokenizer = demo()
    before = tokenizer.to_str()
    GrammarCompiler(tokenizer, 896).compile(StructuredOutputs(regex="a"))
    assert tokenizer.to_str() == before
