"""Holds all names, keywords and signatures of TensorRT-LLM that fly-trt uses against a source tree or an installed one.

It reads text and imports nothing of TensorRT-LLM, so that it needs no GPU. Run it before an upgrade:

    python tools/check_tensorrt_llm.py ~/src/TensorRT-LLM
    python tools/check_tensorrt_llm.py $(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')

The status is 0 where nothing is broken, 1 where something is, and 2 for a folder that is no TensorRT-LLM.
"""

import argparse
import ast
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from fly_trt.integrations.tensorrt_llm.names import NAMES, Name, Part

Outcome = Literal["ok", "taken by **kwargs", "not in this tree", "broken"]
VERSION_FILE = "tensorrt_llm/version.py"
# Only in a source tree. Of an installed package the first has its place in a stub file, which the build writes.
BINDINGS = re.compile(r"cpp/tensorrt_llm/(?:nanobind|pybind)/(\w+)/")
STUBS = ("tensorrt_llm/bindings/{0}.pyi", "tensorrt_llm/bindings/{0}/__init__.pyi")
COMMENTS = re.compile(r"//[^\n]*|/\*.*?\*/|'[^'\n]'", re.DOTALL)  # and characters, which may be a quote
SOURCES_ALONE = ("cpp/", "triton_backend/", "examples/", "docs/", "tests/")


class NoTreeError(Exception):
    """The folder is not a TensorRT-LLM that can be checked."""


@dataclass(frozen=True, slots=True)
class Finding:
    name: Name
    outcome: Outcome
    said: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """A definition. parameters: None where it has none that the text shows; takes_any: it has **kwargs."""

    parameters: tuple[str, ...] | None = None
    takes_any: bool = False


class Tree:
    """A source tree, or the folder in which the package is installed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        path = root / VERSION_FILE
        if not path.is_file():
            raise NoTreeError(f"{root}: has no {VERSION_FILE}: expected a source tree of TensorRT-LLM or site-packages")
        version = re.search(r"__version__\s*=\s*[\"']([^\"']+)", path.read_text(encoding="utf-8"))
        if version is None:
            raise NoTreeError(f"{path}: says no __version__")
        self.version = version[1]
        numbers = re.match(r"(\d+)\.(\d+)", self.version)
        if numbers is None or (int(numbers[1]), int(numbers[2])) < (1, 2):
            raise NoTreeError(f"{root}: TensorRT-LLM {self.version}, expected 1.2 or later")
        self.release = "1.2" if (int(numbers[1]), int(numbers[2])) == (1, 2) else "main"

    def find(self, file: str) -> Path | None:
        """The file itself, or the stub file that an installed package has in its place."""
        if (path := self.root / file).is_file():
            return path
        if (binding := BINDINGS.match(file)) is None:
            return None
        stubs = (self.root / stub.format(binding[1]) for stub in STUBS)
        return next((stub for stub in stubs if stub.is_file()), None)

    @property
    def is_installed(self) -> bool:
        return not (self.root / "cpp").is_dir()


def check(tree: Tree, names: Iterable[Name]) -> list[Finding]:
    return [_check(tree, name) for name in names if tree.release in name.releases]


def _check(tree: Tree, name: Name) -> Finding:
    path = tree.find(name.file)
    if path is None:
        if tree.is_installed and name.file.startswith(SOURCES_ALONE):
            return Finding(name, "not in this tree", "an installed package does not have it")
        return Finding(name, "broken", "no such file")
    if not name.name:
        return Finding(name, "ok")
    found = _definition(tree, path, name.name)
    if found is None:
        return Finding(name, "broken", "no such name in it")
    return _check_parameters(name, found)


def _check_parameters(name: Name, found: Found) -> Finding:
    if not name.parameters:
        return Finding(name, "ok")
    if found.parameters is None:
        return Finding(name, "broken", "takes no parameters")
    if name.is_whole:
        if found.parameters == name.parameters:
            return Finding(name, "ok")
        return Finding(
            name, "broken", f"takes ({', '.join(found.parameters)}), expected ({', '.join(name.parameters)})"
        )
    missing = [parameter for parameter in name.parameters if parameter not in found.parameters]
    if not missing:
        return Finding(name, "ok")
    if found.takes_any:
        return Finding(name, "taken by **kwargs", ", ".join(missing))
    return Finding(name, "broken", f"has no {', '.join(missing)}: it takes {', '.join(found.parameters) or 'nothing'}")


def _definition(tree: Tree, path: Path, name: str) -> Found | None:
    if path.suffix in (".py", ".pyi"):
        return _PythonFile.read(tree, path).find(name)
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix in (".cpp", ".h"):
        text = COMMENTS.sub(" ", text)
    if path.suffix == ".cpp" and (blocks := list(_bound_blocks(text, name.partition(".")[0]))):
        return _bound(blocks, name.partition(".")[2])
    last = name.rpartition(".")[2]
    return Found() if re.search(rf"(?<![\w-]){re.escape(last)}(?![\w-])", text) else None


class _PythonFile:
    """What a module defines, as its text says."""

    def __init__(self, tree: Tree, path: Path) -> None:
        self._tree, self._path = tree, path
        self._body = list(_flat(ast.parse(path.read_text(encoding="utf-8")).body))

    @staticmethod
    @cache
    def read(tree: Tree, path: Path) -> "_PythonFile":
        return _PythonFile(tree, path)

    def find(self, dotted: str) -> Found | None:
        first, _, rest = dotted.partition(".")
        node = _named(self._body, first)
        if node is None:
            return self._imported(first, rest)
        if isinstance(node, ast.ClassDef):
            return self._member(node, rest) if rest else self._made_by(node)
        if rest:
            return None
        return _signature(node) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else Found()

    def _imported(self, name: str, rest: str) -> Found | None:
        """A name that another module of the tree defines."""
        for node in self._body:
            if not isinstance(node, ast.ImportFrom):
                continue
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    path = self._module(node)
                    dotted = f"{alias.name}.{rest}" if rest else alias.name
                    return Found() if path is None else _PythonFile.read(self._tree, path).find(dotted)
        return None

    def _module(self, node: ast.ImportFrom) -> Path | None:
        parts = (node.module or "").split(".") if node.module else []
        folder = self._tree.root if node.level == 0 else self._path.parents[node.level - 1]
        base = folder.joinpath(*parts)
        candidates = (base.with_suffix(".py"), base / "__init__.py")
        return next((path for path in candidates if path.is_file() and path != self._path), None)

    def _member(self, node: ast.ClassDef, dotted: str) -> Found | None:
        first, _, rest = dotted.partition(".")
        member = _named(_flat(node.body), first)
        if isinstance(member, ast.ClassDef):
            return self._member(member, rest) if rest else self._made_by(member)
        if rest:
            return None
        if isinstance(member, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return _signature(member)
        if member is not None or first in _set_on_self(node):
            return Found()
        found = (self.find(f"{base}.{dotted}") for base in _bases(node))
        return next((each for each in found if each is not None), None)

    def _made_by(self, node: ast.ClassDef) -> Found:
        """A class, as a call of it: its __init__, or the fields of a dataclass or a pydantic model."""
        if isinstance(made := _named(_flat(node.body), "__init__"), ast.FunctionDef):
            return _signature(made)
        fields: list[str] = []
        takes_any = False
        for base in _bases(node):
            inherited = self.find(base)
            fields += (inherited and inherited.parameters) or ()
            takes_any |= bool(inherited and inherited.takes_any)
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields += [statement.target.id, *_aliases(statement.value)]
        return Found(tuple(fields), takes_any)


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, also those that are under a condition."""
    for statement in body:
        yield statement
        if isinstance(statement, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(statement, part, []))
            for handler in getattr(statement, "handlers", []):
                yield from _flat(handler.body)


def _named(body: Iterable[ast.stmt], name: str) -> ast.stmt | None:
    """What defines the name; the last definition is the one that counts."""
    found = None
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found = node if node.name == name else found
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found = node if any(isinstance(each, ast.Name) and each.id == name for each in targets) else found
    return found


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> Found:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return Found(tuple(argument.arg for argument in named), arguments.kwarg is not None)


def _bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).partition("[")[0] for base in node.bases]


def _set_on_self(node: ast.ClassDef) -> set[str]:
    attributes = (
        each for each in ast.walk(node) if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
    )
    return {each.attr for each in attributes if isinstance(each.value, ast.Name) and each.value.id == "self"}


def _aliases(value: ast.expr | None) -> Iterator[str]:
    """Other names of a pydantic field."""
    if isinstance(value, ast.Call):
        for keyword in value.keywords:
            if keyword.arg in ("alias", "validation_alias"):
                texts = (each.value for each in ast.walk(keyword.value) if isinstance(each, ast.Constant))
                yield from (text for text in texts if isinstance(text, str))


def _bound_blocks(text: str, class_name: str) -> Iterator[str]:
    """The statements in which C++ binds this class or enumeration for Python."""
    declared = rf"(?:(\w+)\s*=\s*\w+::)?(?:class_|enum_)<[^;]*?>\s*(\w*)\s*\(\s*\w+,\s*\"{re.escape(class_name)}\""
    for start in re.finditer(declared, text):
        yield text[start.start() : _end(text, start.start(), ";")]
        if variable := start[1] or start[2]:
            for more in re.finditer(rf"\b{variable}\s*\.\w+\(", text):
                yield text[more.start() : _end(text, more.start(), ";")]


def _bound(blocks: list[str], member: str) -> Found | None:
    block = "\n".join(blocks)
    if not member:  # a call of the class
        calls = list(_calls(block, r"\.def\(\s*(?:nb|py)::init")) + list(_calls(block, r"\.def\(\s*\"__init__\""))
        return Found(_arguments(calls)) if calls else Found()
    pattern = rf"\.(?:def|def_\w+|value)\(\s*\"{re.escape(member)}\""
    calls = list(_calls(block, pattern))
    return Found(_arguments(calls)) if calls else None


def _calls(block: str, pattern: str) -> Iterator[str]:
    for match in re.finditer(pattern, block):
        opening = block.index("(", match.start())
        yield block[match.start() : _end(block, opening + 1, ")")]


def _arguments(calls: list[str]) -> tuple[str, ...]:
    names = (name for call in calls for name in re.findall(r"(?:nb|py)::arg(?:_v)?\(\s*\"(\w+)\"", call))
    return tuple(dict.fromkeys(names))


def _end(text: str, start: int, closing: str) -> int:
    """Behind the character that closes what is open at `start`, outside of brackets and strings."""
    depth, position, quoted = 0, start, False
    while position < len(text):
        character = text[position]
        if character == '"' and text[position - 1] != "\\":
            quoted = not quoted
        elif not quoted:
            if depth == 0 and character == closing:
                return position + 1
            depth += (character in "({[") - (character in ")}]")
        position += 1
    return position


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tree", type=Path, metavar="TREE", help="a source tree, or the folder of the installed package")
    parser.add_argument("--part", choices=get_args(Part), action="append", help="only names of this part, repeatable")
    parser.add_argument("--json", action="store_true", help="all findings, on stdout")
    options = parser.parse_args(arguments)
    try:
        tree = Tree(options.tree.expanduser())
    except NoTreeError as error:
        print(error, file=sys.stderr)
        return 2
    findings = check(tree, [name for name in NAMES if not options.part or name.part in options.part])
    if options.json:
        print(json.dumps({"version": tree.version, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        _print(tree, findings)
    return 1 if any(finding.outcome == "broken" for finding in findings) else 0


def _print(tree: Tree, findings: list[Finding]) -> None:
    print(f"TensorRT-LLM {tree.version} in {tree.root}, held against the names of {tree.release}")
    for finding in findings:
        if finding.outcome != "ok":
            name = finding.name
            print(f"{finding.outcome}: {name.part}: {name.file}: {name.name or 'the file'}: {finding.said}")
    counts = Counter(finding.outcome for finding in findings)
    print(f"{len(findings)} names: " + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    if unsure := sum(f.name.sureness == "unverified" and f.outcome == "ok" for f in findings):
        print(f"{unsure} of them were unverified until now")


if __name__ == "__main__":
    sys.exit(main())
