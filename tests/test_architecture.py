"""The house: which room may use which, and who writes what."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fly_trt"
# From the ground up, as the architecture page has them. Rooms of one floor do not know each other.
FLOORS = (
    ("errors", "tokens", "files"),
    ("checks", "outputs", "manifest"),
    ("text", "settings"),
    ("verification", "grammar"),
    ("engines",),
    ("drafting",),
    ("acceptance",),
    ("params",),
    ("runtime",),
    ("integrations",),
    ("service",),
    ("llm", "async_llm"),
    ("inspection",),
    ("serving", "benchmark"),
    ("tuning",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What fly_build may use of fly_trt: never what runs a request.
ROOMS_OF_THE_BUILD = {
    "errors",
    "checks",
    "files",
    "manifest",
    "acceptance",
    "params",
    "engines",
    "verification",
    "tokens",
    "cli",
}
# Of the room that reaches into another library, what says how that is set and what its names are.
MODULES_OF_THE_BUILD = {
    f"fly_trt.integrations.tensorrt_llm{module}" for module in ("", ".environment", ".modes", ".names")
} | {"fly_trt.integrations"}
# These alone may load torch: they run in the processes of a library that has it.
MODULES_WITH_TORCH = {"fly_trt.integrations.tensorrt_llm.acceptance"}
MAX_LINES = 420


def modules(folder: Path) -> dict[str, Path]:
    """By dotted name, as seen from the folder's parent."""
    paths = sorted(folder.rglob("*.py"))
    return {
        ".".join(path.relative_to(folder.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


def imports(path: Path) -> Iterator[str]:
    """All of them: at the top, inside functions, and for type checkers. Of `from a import b` both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def known_module(name: str, known: dict[str, Path]) -> str | None:
    """The module that an imported name is, or is defined in."""
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name or None


def room(module: str) -> str:
    return module.split(".")[1]


RUNTIME_MODULES = {name: path for name, path in modules(PACKAGE).items() if name != "fly_trt"}


@pytest.mark.parametrize("module", RUNTIME_MODULES)
def test_no_arrow_points_up(module: str) -> None:
    for name in imports(RUNTIME_MODULES[module]):
        used = known_module(name, RUNTIME_MODULES)
        assert not name.startswith("fly_build"), f"{module} uses {name}"
        if used is None or room(used) == room(module):
            continue
        assert FLOOR_OF[room(used)] < FLOOR_OF[room(module)], f"{module} uses {used}, which is not below it"


@pytest.mark.parametrize("package", [PACKAGE, ROOT / "build" / "fly_build"], ids=lambda package: package.name)
def test_no_module_reaches_itself(package: Path) -> None:
    known = {name: path for name, path in modules(package).items() if name != package.name}
    graph = {
        module: {used for name in imports(path) if (used := known_module(name, known)) not in (None, module)}
        for module, path in known.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)  # raises where there is a circle


def test_the_build_uses_nothing_that_serves() -> None:
    for module, path in modules(ROOT / "build" / "fly_build").items():
        used = {known_module(name, RUNTIME_MODULES) for name in imports(path)} - {None}
        rooms = {room(name) for name in used if name and name not in MODULES_OF_THE_BUILD}
        assert rooms <= ROOMS_OF_THE_BUILD, module


@pytest.mark.parametrize("module", RUNTIME_MODULES)
def test_the_runtime_loads_neither_torch_nor_transformers(module: str) -> None:
    libraries = {name.partition(".")[0] for name in imports(RUNTIME_MODULES[module])}
    assert "transformers" not in libraries
    assert "torch" not in libraries or module in MODULES_WITH_TORCH


def test_the_architecture_page_shows_every_room_and_every_module() -> None:
    page = (PACKAGE / "README.md").read_text(encoding="utf-8")
    for module, path in RUNTIME_MODULES.items():
        name = path.name if path.name != "__init__.py" else f"{path.parent.name}/"
        assert f"{name}" in page, f"{module}: {name} is not on the page"


def test_no_file_is_long() -> None:
    for path in (*modules(PACKAGE).values(), *modules(ROOT / "build" / "fly_build").values()):
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        assert num_lines <= MAX_LINES, f"{path.relative_to(ROOT)}: {num_lines} lines"


@pytest.mark.parametrize(("attribute", "writer"), [("num_cached", "hold"), ("state", "enter")])
def test_what_a_request_is_at_is_written_in_one_place(attribute: str, writer: str) -> None:
    writers = set()
    for path in (PACKAGE / "runtime").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                targets = [node for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                if any(node.attr == attribute and isinstance(node.ctx, ast.Store) for node in targets):
                    writers.add((path.name, function.name))
    assert writers == {("request.py", writer)}
