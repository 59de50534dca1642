"""tools/check_tensorrt_llm.py, on small trees with one thing of each kind in them."""

import ast
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import check_tensorrt_llm
from check_tensorrt_llm import NoTreeError, Tree, check
from fly_trt.integrations.tensorrt_llm.names import NAMES, Name

ROOT = Path(__file__).parents[2]
WORKERS = """
from .base import Shared as Base

try:
    import fast
except ImportError:
    class Fallback:
        pass


class Worker(Base):
    limit: int = 3

    def __init__(self, mapping, *, size=1):
        self.seed = 0

    def accept(self, logits, draft_tokens):
        return logits

    async def wait(self, timeout, **options):
        pass


class Modes:
    ONE = 1


def run(first, second=2):
    pass
"""
BASE = """
class Root:
    kept: int = 0
    other: str = Field(default="", validation_alias=AliasChoices("older", "oldest"))


class Shared(Root):
    own: bool = False

    def inherited(self, value):
        pass
"""
BINDINGS = """
void bind(nb::module_& m)
{
    nb::enum_<Kind>(m, "Kind").value("kFIRST", Kind::kFIRST).value("kSECOND", Kind::kSECOND);
    nb::class_<Plain>(m, "Plain")
        .def(nb::init<int, float>(), nb::arg("tokens"), nb::arg_v("share", 0.5F, "half"))
        .def_prop_ro("tokens", [](Plain const& self) { auto copy = self.tokens(); return copy; })
        .def("send", &Plain::send, nb::arg("request_id"));
    nb::class_<Named> named(m, "Named");
    named
        // What "comes; next" is (not code
        .def("__init__", [](Named* self, int size) { new (self) Named(size); }, nb::arg("size"));
    auto later = nb::class_<Later>(m, "Later");
    named.def_rw("rate", &Named::rate)
        .def("cancel", &Named::cancel, nb::arg("id"));
    later.def(nb::init<>()).def_rw("share", &Later::share);
}
"""
FILES = {
    "tensorrt_llm/version.py": '__version__ = "1.2.1"\n',
    "tensorrt_llm/spec/workers.py": WORKERS,
    "tensorrt_llm/spec/base.py": BASE,
    "tensorrt_llm/__init__.py": "from .spec.workers import Worker\n",
    "cpp/tensorrt_llm/nanobind/executor/request.cpp": BINDINGS,
    "cpp/tensorrt_llm/layout.h": 'auto constexpr kLast = "last_token_ids"; // and more\n',
}
PYTHON, BOUND = "tensorrt_llm/spec/workers.py", "cpp/tensorrt_llm/nanobind/executor/request.cpp"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write(tmp_path, FILES)


def outcome(root: Path, file: str, name: str, parameters: Sequence[str] = (), **fields: Any) -> str:
    (finding,) = check(Tree(root), [Name("executor", file, name, tuple(parameters), **fields)])
    return finding.outcome


@pytest.mark.parametrize(
    ("file", "name", "parameters"),
    [
        (PYTHON, "", []),
        (PYTHON, "Worker", ["mapping", "size"]),
        (PYTHON, "Worker.accept", ["draft_tokens"]),
        (PYTHON, "Worker.limit", []),
        (PYTHON, "Worker.seed", []),
        (PYTHON, "Worker.inherited", ["value"]),
        (PYTHON, "Worker.kept", []),
        (PYTHON, "Worker.wait", ["timeout"]),
        (PYTHON, "Fallback", []),
        (PYTHON, "Modes.ONE", []),
        (PYTHON, "run", ["second"]),
        ("tensorrt_llm/spec/base.py", "Shared", ["kept", "oldest", "own"]),
        ("tensorrt_llm/__init__.py", "Worker.accept", ["logits"]),
        (BOUND, "Kind.kSECOND", []),
        (BOUND, "Plain", ["tokens", "share"]),
        (BOUND, "Plain.tokens", []),
        (BOUND, "Plain.send", ["request_id"]),
        (BOUND, "Named", ["size"]),
        (BOUND, "Named.rate", []),
        (BOUND, "Named.cancel", ["id"]),
        (BOUND, "Later.share", []),
        ("cpp/tensorrt_llm/layout.h", "last_token_ids", []),
    ],
)
def test_what_is_there_is_found(file: str, name: str, parameters: list[str], tree: Path) -> None:
    assert outcome(tree, file, name, parameters) == "ok"


@pytest.mark.parametrize(
    ("file", "name", "parameters"),
    [
        ("tensorrt_llm/spec/gone.py", "", []),
        (PYTHON, "Gone", []),
        (PYTHON, "Worker", ["tokens"]),
        (PYTHON, "Worker.gone", []),
        (PYTHON, "Worker.accept", ["targets"]),
        (PYTHON, "Modes.TWO", []),
        (PYTHON, "run", ["third"]),
        (PYTHON, "run.inner", []),
        ("tensorrt_llm/spec/base.py", "Shared", ["limit"]),
        ("tensorrt_llm/__init__.py", "Worker.refuse", []),
        (BOUND, "Kind.kTHIRD", []),
        (BOUND, "Plain", ["size"]),
        (BOUND, "Plain.rate", []),
        (BOUND, "Plain.send", ["id"]),
        (BOUND, "Named.send", []),
        (BOUND, "Named", ["tokens"]),
        (BOUND, "Later.rate", []),
        ("cpp/tensorrt_llm/layout.h", "last_token", []),
    ],
)
def test_what_is_not_there_is_broken(file: str, name: str, parameters: list[str], tree: Path) -> None:
    assert outcome(tree, file, name, parameters) == "broken"


def test_a_whole_signature_has_no_more_and_no_other_order(tree: Path) -> None:
    assert outcome(tree, PYTHON, "Worker.accept", ["self", "logits", "draft_tokens"], is_whole=True) == "ok"
    assert outcome(tree, PYTHON, "Worker.accept", ["self", "draft_tokens", "logits"], is_whole=True) == "broken"
    assert outcome(tree, PYTHON, "Worker.accept", ["self", "logits"], is_whole=True) == "broken"


def test_what_only_other_keywords_take_is_said(tree: Path) -> None:
    assert outcome(tree, PYTHON, "Worker.wait", ["timeout", "unknown"]) == "taken by **kwargs"


def test_an_installed_package_has_stubs_in_place_of_bindings(tmp_path: Path) -> None:
    files = {name: text for name, text in FILES.items() if not name.startswith("cpp/")}
    stub = "class Plain:\n    def send(self, request_id: int) -> None: ...\n"
    write(tmp_path, files | {"tensorrt_llm/bindings/executor.pyi": stub})
    assert outcome(tmp_path, BOUND, "Plain.send", ["request_id"]) == "ok"
    assert outcome(tmp_path, BOUND, "Plain.receive") == "broken"
    assert outcome(tmp_path, "cpp/tensorrt_llm/layout.h", "last_token_ids") == "not in this tree"


def test_names_of_another_release_are_left_alone(tree: Path) -> None:
    gone = Name("build", "tensorrt_llm/gone.py", "", releases=("1.2",))
    assert [finding.outcome for finding in check(Tree(tree), [gone])] == ["broken"]
    (tree / "tensorrt_llm/version.py").write_text('__version__ = "1.3.0rc9"\n')
    assert check(Tree(tree), [gone]) == []


@pytest.mark.parametrize(
    ("version", "said"), [("1.1.0", "TensorRT-LLM 1.1.0, expected 1.2 or later"), (None, "has no")]
)
def test_a_folder_that_is_none_is_refused(
    version: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if version is not None:
        write(tmp_path, {"tensorrt_llm/version.py": f'__version__ = "{version}"\n'})
    with pytest.raises(NoTreeError, match=said):
        Tree(tmp_path)
    assert check_tensorrt_llm.main([str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_the_command_names_what_broke(
    tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [
        Name("build", PYTHON, "run", ("first",), sureness="unverified"),
        Name("build", PYTHON, "Worker.accept", ("targets",)),
        Name("executor", PYTHON, "Gone"),
    ]
    monkeypatch.setattr(check_tensorrt_llm, "NAMES", names)
    assert check_tensorrt_llm.main([str(tree)]) == 1
    printed = capsys.readouterr().out
    assert "TensorRT-LLM 1.2.1" in printed
    assert f"broken: build: {PYTHON}: Worker.accept: has no targets: it takes self, logits, draft_tokens" in printed
    assert "3 names: 1 ok, 2 broken" in printed
    assert "1 of them were unverified until now" in printed
    assert check_tensorrt_llm.main([str(tree), "--part", "build", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [finding["outcome"] for finding in record["findings"]] == ["ok", "broken"]


def test_each_name_is_in_the_table_once_and_says_where_it_was_read() -> None:
    keys = [(name.file, name.name, name.parameters, name.releases, name.part) for name in NAMES]
    assert len(set(keys)) == len(keys)
    for name in NAMES:
        assert name.sureness == "unverified" or name.read_at, dataclasses.asdict(name)


def test_what_is_imported_of_it_is_in_the_table() -> None:
    imported = {
        (node.module.replace(".", "/"), alias.name)
        for folder in (ROOT / "fly_trt", ROOT / "build" / "fly_build")
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tensorrt_llm"
        for alias in node.names
    }
    assert imported
    for module, wanted in imported:  # which the package may have from a module of its own
        assert any(name.file.startswith(module) and name.name.split(".")[0] == wanted for name in NAMES), wanted
