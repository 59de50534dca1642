"""Runs steps of an engine directory's target on the emulated CUDA and prints what was seen, as JSON. A process of its
own, since that of the tests has the CPU's package of ONNX Runtime. usage: steps.py ENGINE_DIRECTORY
"""

import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import runtime

SHAPES = ((1, 1), (2, 1), (2, 8), (2, 16), (1, 40))  # (B, T); the last one is a prompt's


def main(directory: Path) -> dict[str, Any]:
    runtime.install()
    from fly_trt.engines import load_engine, onnxruntime_cuda
    from fly_trt.errors import EngineError
    from fly_trt.manifest import read_manifest

    session_options = onnxruntime_cuda.session_options
    folder = tempfile.TemporaryDirectory()

    def profiled(num_threads: int | None = None) -> Any:
        options = session_options(num_threads)
        options.enable_profiling, options.profile_file_prefix = True, f"{folder.name}/profile"
        return options

    onnxruntime_cuda.session_options = profiled
    manifest = read_manifest(directory)
    try:
        engine: Any = load_engine(directory, manifest, manifest.target, num_slots=2)
    except EngineError as error:
        return {"refused": str(error)}
    runtime.take_largest_device_copy()
    steps = []
    for batch_size, num_tokens in SHAPES:
        step = engine.step(0, batch_size, num_tokens, with_top=True)
        for row in range(batch_size):
            step.set_row(row, 0, np.arange(3, 3 + num_tokens))
        runs = []
        for _ in range(3):
            before = runtime.counters()
            engine.run(step)
            runs.append({name: number - before[name] for name, number in runtime.counters().items()})
        steps.append({"shape": (batch_size, num_tokens), "runs": runs})
    profile = json.loads(Path(engine._session.end_profiling()).read_text())
    events = [event["args"] for event in profile if event.get("cat") == "Node" and "provider" in event["args"]]
    nodes: dict[str, Counter[str]] = {}
    for event in events:
        nodes.setdefault(event["provider"], Counter())[event["op_name"]] += 1
    seen = {
        "steps": steps,
        "nodes": nodes,
        "fault": runtime.last_fault(),
        "cache_bytes": engine._caches[0].num_bytes,
        "largest_device_copy": runtime.take_largest_device_copy(),
    }
    engine.close()
    return seen | {"graphs_left": runtime.counters()["graphs"]}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
