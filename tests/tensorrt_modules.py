"""What the two TensorRT modules offer, without a GPU: their classes, members and signatures, as JSON.

tensorrt_rtx is a whole library. Of full TensorRT only the bindings can be installed from PyPI; they are imported here
over libraries that define the functions they link to and do nothing, so what they say of names and parameters is real
and nothing can be built or run with them.
"""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MODULES = {"tensorrt_rtx": "tensorrt_rtx", "tensorrt": "tensorrt_bindings"}
BINDINGS_LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
LINKED = """
void* createInferBuilder_INTERNAL(void* logger, int version) { return 0; }
void* createInferRefitter_INTERNAL(void* engine, void* logger, int version) { return 0; }
void* createInferRuntime_INTERNAL(void* logger, int version) { return 0; }
void* getBuilderPluginRegistry(int capability) { return 0; }
void* getPluginRegistry(void) { return 0; }
int getInferLibVersion(void) { return 110400; }
void* createNvOnnxParser_INTERNAL(void* network, void* logger, int version) { return 0; }
void* createNvOnnxParserRefitter_INTERNAL(void* refitter, void* logger, int version) { return 0; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void* logger, const char* name) { return 0; }
"""
DESCRIBE = """
import importlib, json, sys

def members(owner):
    found = {}
    for name in dir(owner):
        if not name.startswith("__") or name == "__init__":
            member = getattr(owner, name)
            number = int(member) if isinstance(member, owner) and hasattr(member, "__int__") else None
            found[name] = {"doc": getattr(member, "__doc__", None) or "", "number": number}
    return found

module = importlib.import_module(sys.argv[1])
found = {name: value for name, value in vars(module).items() if isinstance(value, type)}
nested = {f"{name}.{inner}": value for name, owner in found.items() for inner, value in vars(owner).items()
          if isinstance(value, type)}
classes = {name: members(value) for name, value in (found | nested).items()}
others = {name: getattr(value, "__doc__", None) or "" for name, value in vars(module).items() if name not in classes}
print(json.dumps({"version": module.__version__, "classes": classes, "others": others}))
"""


@functools.cache
def describe(name: str) -> dict[str, Any]:
    """Of `tensorrt` or `tensorrt_rtx`: `version`, `classes` (name -> member -> doc, and number where it is of an
    enumeration) and `others` (name -> doc)."""
    with tempfile.TemporaryDirectory() as folder:
        if name == "tensorrt":
            _make_libraries(Path(folder))
        environment = os.environ | {"LD_LIBRARY_PATH": folder}
        command = [sys.executable, "-c", DESCRIBE, MODULES[name]]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    described: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return described


def _make_libraries(folder: Path) -> None:
    source = folder / "linked.c"
    source.write_text(LINKED)
    for library in BINDINGS_LIBRARIES:
        soname = f"lib{library}.so.11"
        command = ["gcc", "-shared", "-fPIC", "-o", folder / soname, f"-Wl,-soname,{soname}", source]
        subprocess.run([str(part) for part in command], check=True)
