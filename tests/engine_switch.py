"""What a test does to the engine of a model that a server runs: by a file that the test makes and removes."""

from pathlib import Path

PATCH = """

from pathlib import Path
from fly_trt.engines.onnxruntime import OnnxRuntimeEngine

def patch(run, switch):
    import time
    def patched(engine, step):
        if switch.exists():
            {deed}
        run(engine, step)
    OnnxRuntimeEngine.run = patched

patch(OnnxRuntimeEngine.run, Path({switch!r}))
"""
SLOW = "time.sleep(0.05)"  # a request for many tokens runs until somebody ends it, on any machine
BROKEN = "raise RuntimeError('the device is lost')"


def add_switch(model_dir: Path, switch: Path, deed: str) -> None:
    """Has every step of the model do the deed first, as long as there is a file `switch`."""
    with (model_dir / "1" / "model.py").open("a", encoding="utf-8") as model:
        model.write(PATCH.format(deed=deed, switch=str(switch)))
