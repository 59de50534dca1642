"""Loads the plugin library into the plugin registry of the installed TensorRT and makes both plugins from Python.

    python plugins/check/registry.py build/libfly_plugins.so

Needs no GPU. TensorRT for RTX serves where TensorRT is not installed: it has the same registry, but runs no plugins.
Prints one JSON object; run it in a process of its own, because a library cannot be unloaded while its plugins live.
"""

import importlib
import json
import sys
from typing import Any

import numpy as np

NAMESPACE, VERSION = "fly", "2"
NAMES = ("EntropyGate", "LooseWindowAccept")


def import_tensorrt() -> Any:
    """The installed TensorRT's module, or TensorRT for RTX's."""
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise SystemExit("no TensorRT for Python: pip install tensorrt, or tensorrt-rtx where there is no GPU")


def probe(trt: Any, library: str) -> dict[str, Any]:
    """What the registry says of the library: its creators, their fields, and the plugins that they make."""
    registry = trt.get_plugin_registry()
    if registry.load_library(library) is None:
        raise SystemExit(f"{library}: the plugin registry could not load it")
    creators = {name: registry.get_creator(name, VERSION, NAMESPACE) for name in NAMES}

    def make(name: str, **fields: np.ndarray) -> str | None:
        types = {"int32": trt.PluginFieldType.INT32, "int64": trt.PluginFieldType.INT64}
        values = [trt.PluginField(key, value, types[value.dtype.name]) for key, value in fields.items()]
        plugin = creators[name].create_plugin("layer", trt.PluginFieldCollection(values), trt.TensorRTPhase.BUILD)
        if plugin is None:
            return None
        core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
        return f"{core.plugin_namespace}::{core.plugin_name} {core.plugin_version}"

    return {
        "tensorrt": f"{trt.__name__} {trt.__version__}",
        "creators": sorted(c.name for c in registry.all_creators if c.plugin_namespace == NAMESPACE),
        "fields": {name: [field.name for field in creator.field_names] for name, creator in creators.items()},
        "plugins": {
            "EntropyGate": make("EntropyGate"),
            "EntropyGate, top_k int32": make("EntropyGate", top_k=np.array([2], dtype=np.int32)),
            "EntropyGate, top_k int64": make("EntropyGate", top_k=np.array([8], dtype=np.int64)),
            "EntropyGate, top_k 9": make("EntropyGate", top_k=np.array([9], dtype=np.int32)),
            "LooseWindowAccept": make("LooseWindowAccept"),
        },
    }


if __name__ == "__main__":
    print(json.dumps(probe(import_tensorrt(), sys.argv[1]), indent=2))
