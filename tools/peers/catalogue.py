"""Which peers there are, what they offer, and what they are made of. A peer's worker says how it is run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

# First and pinned: what depends on it must not pull another build of it.
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Peer:
    """modes: in the order of the table. forms: precision to the format that `convert` makes for it. requirements:
    installed one group after the other; none for what runs in this environment. unwanted: removed afterwards.
    convert(checkpoint, form, output): arguments of the peer's python; None for a peer that reads the checkpoint."""

    name: str
    worker: str
    modes: tuple[str, ...]
    forms: Mapping[str, str]
    requirements: tuple[tuple[str, ...], ...] = ()
    unwanted: tuple[str, ...] = ()
    convert: Callable[[str, str, str], list[str]] | None = field(default=None, repr=False)


def _convert_for_openvino(checkpoint: str, form: str, output: str) -> list[str]:
    program = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", checkpoint]
    return [*program, "--task", "text-generation-with-past", "--weight-format", form, output]


def _convert_for_onnxruntime(checkpoint: str, form: str, output: str) -> list[str]:
    program = ["-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", output]
    return [*program, "-p", form, "-e", "cpu", "-c", f"{output}/cache"]


FLY = "fly-trt"
PEERS = {
    peer.name: peer
    for peer in (
        Peer(FLY, "fly_worker", modes=("fly", "speculative", "plain", "prompt-lookup"), forms={}),
        Peer(
            "transformers",
            "transformers_worker",
            modes=("plain", "speculative", "speculative-default", "prompt-lookup"),
            forms={"float32": "", "bfloat16": ""},
            requirements=((TORCH,), (TORCH, "transformers>=5.20,<6")),
        ),
        Peer(
            "openvino-genai",
            "openvino_worker",
            modes=("plain", "speculative", "prompt-lookup"),
            forms={"float32": "fp32", "bfloat16": "fp32", "int8": "int8"},
            requirements=((TORCH,), (TORCH, "openvino-genai>=2026.4,<2027", "optimum-intel[openvino]>=2.2,<3")),
            # optimum-intel asks for it; text models do without, and its wheel does not load beside torch for CPUs.
            unwanted=("torchvision",),
            convert=_convert_for_openvino,
        ),
        Peer(
            "onnxruntime-genai",
            "onnxruntime_worker",
            modes=("plain", "speculative", "prompt-lookup"),
            forms={"float32": "fp32", "int8": "int8", "int4": "int4"},
            requirements=(
                (TORCH,),
                (TORCH, "onnxruntime-genai>=0.18,<0.19", "transformers>=5.20,<6", "onnx>=1.20,<2", "onnx-ir>=1.1,<2"),
            ),
            convert=_convert_for_onnxruntime,
        ),
    )
}
