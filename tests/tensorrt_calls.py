"""Which names of TensorRT's API a source file uses, by reading it: attributes and calls on what comes from the module.

What a variable holds is taken from its name (`HOLDS`) and from what TensorRT's own documentation says that a call
returns, so that new code is looked at as soon as it is written.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Variables and attributes, a leading underscore aside, and the class of what they hold in all files that are read.
HOLDS = {
    "attention": "IAttention",
    "builder": "Builder",
    "cache": "ITimingCache",
    "collective": "IDistCollectiveLayer",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "layer": "ILayer",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "profile": "IOptimizationProfile",
    "registry": "IPluginRegistry",
    "runtime": "Runtime",
    "timings": "ITimingCache",
}
# What only TensorRT-RTX has; the code asks which of the two it is.
ONLY_RTX = {
    "ComputeCapability",
    "DynamicShapesKernelSpecializationStrategy",
    "IBuilderConfig.num_compute_capabilities",
    "IBuilderConfig.set_compute_capability",
    "IRuntimeCache",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
SIGNATURE = re.compile(r"^(?:\d+\. )?(\w+)\((.*)\) -> (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Use:
    """`owner` is a class, or "" for the module itself; `call` is None where the name is only read; `is_unbound` where
    it is read of the class instead of an object."""

    owner: str
    name: str
    call: ast.Call | None
    line: int
    is_unbound: bool = False

    def __str__(self) -> str:
        return f"{self.owner or 'trt'}.{self.name} (line {self.line})"


def uses(source: str, module: dict[str, Any], holds: dict[str, str] = HOLDS) -> list[Use]:
    """Of the module that tensorrt_modules.describe described. `holds` as HOLDS."""
    reader = _Reader(module, holds)
    reader.visit(ast.parse(source))
    return reader.found


def problem(use: Use, module: dict[str, Any]) -> str | None:
    """What the module would say to it: that it has no such name, or takes other arguments."""
    if not use.owner:
        if use.name in module["others"] or use.name == "__version__":
            return None
        if use.name not in module["classes"]:
            return f"{use}: no such name"
        documentation = module["classes"][use.name].get("__init__", {}).get("doc", "")
        return _check_call(use, documentation, "__init__")
    members = module["classes"].get(use.owner)
    if members is None:
        return f"{use}: no such class"
    if use.name not in members:
        return f"{use}: no such member"
    return _check_call(use, members[use.name]["doc"], use.name)


def _check_call(use: Use, documentation: str, name: str) -> str | None:
    if use.call is None or any(isinstance(argument, ast.Starred) for argument in use.call.args):
        return None
    keywords = {keyword.arg for keyword in use.call.keywords}
    number = len(use.call.args) + (0 if use.is_unbound else 1)  # with self
    for arguments in signatures(documentation, name):
        names = [argument.arg for argument in arguments.args]
        if arguments.vararg is not None:
            return None
        required = names[: len(names) - len(arguments.defaults)]
        if number <= len(names) and keywords <= {*names[number:]} and {*required[number:]} <= keywords:
            return None
    return f"{use}: takes other arguments: {documentation.splitlines()[0] if documentation else 'not documented'}"


def signatures(documentation: str, name: str) -> Iterator[ast.arguments]:
    """The parameters of a method, of every overload that pybind11 wrote down."""
    for found, parameters, _ in SIGNATURE.findall(documentation):
        if found == name and parameters.startswith("self"):
            plain = re.sub("<[^>]*>", "None", parameters).replace("::", ".")
            definition = ast.parse(f"def f({plain}): ...").body[0]
            assert isinstance(definition, ast.FunctionDef)
            yield definition.args


def _returned(documentation: str, name: str) -> str | None:
    """The class of what a call returns."""
    returned = {result.split(".")[-1].strip() for found, _, result in SIGNATURE.findall(documentation) if found == name}
    return returned.pop() if len(returned) == 1 else None


class _Reader(ast.NodeVisitor):
    def __init__(self, module: dict[str, Any], holds: dict[str, str]) -> None:
        self.module, self.holds, self.found = module, holds, list[Use]()
        self._calls: dict[ast.expr, ast.Call] = {}

    def visit_Call(self, node: ast.Call) -> None:
        self._calls[node.func] = node
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        owner = self._class_of(node.value)
        if owner is not None:
            is_unbound = isinstance(node.value, ast.Attribute) and self._class_of(node.value.value) == ""
            self.found.append(Use(owner, node.attr, self._calls.get(node), node.lineno, is_unbound))
        self.generic_visit(node)

    def _class_of(self, node: ast.expr) -> str | None:
        """ "" for the module itself, None for what is not TensorRT's."""
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Attribute):
                return None
            owner = self._class_of(node.func.value)
            if owner == "":
                return node.func.attr if node.func.attr in self.module["classes"] else None
            member = self.module["classes"].get(owner, {}).get(node.func.attr, {})
            returned = _returned(member.get("doc", ""), node.func.attr)
            return returned if returned in self.module["classes"] else None
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        if name == "trt":
            return ""
        if isinstance(node, ast.Attribute) and self._class_of(node.value) == "":
            return name if name in self.module["classes"] else None
        return self.holds.get(name.lstrip("_"))
