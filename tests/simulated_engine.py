"""The demo pair built for TensorRT as far as that goes without its builder, with plans that the simulated GPU runs, and
for ONNX Runtime's CUDA provider; and what the tests of the engines of a GPU do with it.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest

import traced_once
from fly_build.tensorrt_builder import EngineBuilder
from fly_trt.engines import Engine, load_engine
from fly_trt.engines.base import Step
from fly_trt.manifest import LayerSummary, TensorRTPlan, read_manifest
from simulated_tensorrt import VERSION, install, serialise

PAIR = Path(__file__).parent / "assets" / "pair"
LIBRARY = "tensorrt_rtx"
MAX_SEQ_LEN = 300
LONGEST = 100  # tokens of a step
LONGEST_ROW = 24  # tokens of a row in a step of several: the drafts and 8 more
LIMITS = {"max_batch_size": 6, "max_seq_len": MAX_SEQ_LEN, "max_draft_len": 16, "max_num_tokens": LONGEST}
TOKENS = np.random.default_rng(0).integers(2, 880, LONGEST)


def build(output: Path, **flags: Any) -> Path:
    """The demo pair in float32, for TensorRT-RTX: all that fly-build does, but for the compilation."""
    pair = {"target": str(PAIR / "target"), "draft": str(PAIR / "draft")}
    settings = {"backend": "tensorrt", "tensorrt_library": LIBRARY, "dtype": "float32", **LIMITS, **flags}
    with pytest.MonkeyPatch.context() as patch:
        install(patch)
        patch.setattr(EngineBuilder, "build", _compile)
        traced_once.build(output, **pair | settings)
    return output


def build_for_onnxruntime(output: Path, **flags: Any) -> Path:
    """The demo pair for ONNX Runtime's CUDA provider, in float32 unless `flags` say otherwise."""
    # The costs of the engines that it is compared with: what is accepted may depend on them.
    costs = {"draft_token_cost": 0.12, "verification_token_cost": 0.06}
    settings = {"device": "cuda", "dtype": "float32", "speculative": costs, **LIMITS, "max_batch_size": 8, **flags}
    traced_once.build(output, target=str(PAIR / "target"), draft=str(PAIR / "draft"), **settings)
    return output


def _compile(builder: EngineBuilder, onnx_path: Path, *_: Any) -> tuple[bytes, TensorRTPlan]:
    sizes = builder.sizes
    limits = [(least, most) for least, _, most in sizes.profiles()]
    record = TensorRTPlan(
        library=LIBRARY,
        version=VERSION,
        compute_capability="8.0",
        cache_tokens=sizes.cache_tokens,
        max_row_tokens=sizes.max_row_tokens,
        head="functions",
        plugin_library=None,
        layers=LayerSummary(total=1, native_attention=0, decomposed_attention=1, kv_cache_update=2, plugin=0),
    )
    return serialise(onnx.load(onnx_path).SerializeToString(), LIBRARY, limits), record


def load(
    built: Path, *, num_slots: int = 3, folder: Path | None = None, top_tokens: bool = True, **changes: Any
) -> Engine:
    """The draft of the engine directory `built`. `changes` are made to its record in the manifest, or to the record of
    its plan, and `top_tokens` is what the manifest says of the head; `folder` is where changed files lie."""
    manifest = read_manifest(built)
    head = manifest.head.model_copy(update={"top_tokens": top_tokens})
    model = manifest.draft
    of_plan = {name: changes.pop(name) for name in list(changes) if name in TensorRTPlan.model_fields}
    plan = model.tensorrt and model.tensorrt.model_copy(update=of_plan)
    changed = model.model_copy(update={"tensorrt": plan, **changes})
    files = manifest.files | {changed.model: manifest.files[model.model]}
    return load_engine(
        folder or built, manifest.model_copy(update={"head": head, "files": files}), changed, num_slots=num_slots
    )


def run(engine: Engine, cached: int, tokens: npt.ArrayLike, slot: int = 0, *, with_logits: bool = True) -> Step:
    tokens = np.asarray(tokens)
    step = engine.step(slot, 1, len(tokens), with_logits=with_logits)
    step.set_row(0, cached, tokens)
    engine.run(step)
    return step


def logits(engine: Engine, cached: int, tokens: npt.ArrayLike, slot: int = 0) -> npt.NDArray[np.float32]:
    """Memory that nobody wrote reads as NaN, so every logit must be a number."""
    return numbers(run(engine, cached, tokens, slot).logits[0])


def numbers(found: npt.NDArray[Any]) -> npt.NDArray[Any]:
    assert np.isfinite(found).all()
    return found.copy()


def same(got: npt.NDArray[Any], want: npt.NDArray[Any], atol: float = 1e-4) -> None:
    np.testing.assert_allclose(numbers(got), want, atol=atol)
