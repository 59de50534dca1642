"""Loads the plugin library into the plugin registry of the installed TensorRT and makes its plugins from Python.

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
NAMES = ("EntropyGate", "LooseWindowAccept", "PackedLooseAccept")
PACKED_FIELDS = {
    "entropy_threshold": np.array([0.3], dtype=np.float32),
    "use_full_entropy": np.array([0], dtype=np.int32),
    "entropy_top_k": np.array([3], dtype=np.int32),
    "window": np.array([6], dtype=np.int32),
    "lookahead": np.array([5], dtype=np.int32),
    "vocab_size": np.array([128_256], dtype=np.int32),
    "stop_token_ids": np.array([128_001, 128_008, 128_009], dtype=np.int32),
}


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
        kinds = trt.PluginFieldType
        types = {"int32": kinds.INT32, "int64": kinds.INT64, "float32": kinds.FLOAT32, "float64": kinds.FLOAT64}
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
            "PackedLooseAccept": make("PackedLooseAccept"),
            "PackedLooseAccept, as fly-build makes it": make("PackedLooseAccept", **PACKED_FIELDS),
            "PackedLooseAccept, entropy_threshold -1": make("PackedLooseAccept", entropy_threshold=np.array([-1.0])),
        },
    }


if __name__ == "__main__":
    print(json.dumps(probe(import_tensorrt(), sys.argv[1]), indent=2))
