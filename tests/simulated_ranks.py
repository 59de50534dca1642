"""A simulated node: this process has its GPUs, and so have the processes of the ranks that it starts."""

import atexit
import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from fly_trt.engines.base import RANK_CHANNELS, RANK_OUTPUT
from fly_trt.manifest import MANIFEST_NAME, ModelEngine, hash_directory, read_manifest, write_manifest
from simulated_cuda import Error, SimulatedCuda
from simulated_nccl import FOLDER
from simulated_tensorrt import deserialise, install, serialise

NUM_DEVICES = 8
BROKEN = (
    "FLY_TRT_SIMULATED_BROKEN"  # {"device": ..., "call": ..., "after": ..., "error": ...}: what fails on one device
)


def install_node(patch: pytest.MonkeyPatch, folder: Path, library: str = "tensorrt_rtx") -> SimulatedCuda:
    """For a test; its ranks meet in `folder`, where they also leave what went wrong on their GPUs."""
    node = Path(__file__).parent / "simulated_node"
    paths = [str(node), str(node.parent), str(node.parent.parent)]
    patch.setenv("PYTHONPATH", os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]))
    patch.setenv(FOLDER, str(folder))
    cuda = install(patch, library)
    cuda.num_devices = NUM_DEVICES
    return cuda


def faults_of_ranks(folder: Path) -> list[str]:
    return [path.read_text() for path in folder.glob("*.faults")]


def rank_processes(parent: int | None = None) -> list[int]:
    """Those that process `parent`, or this one, has started, zombies included, whoever their parent is now."""
    started_by, found = str(parent or os.getpid()).encode(), []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_child = path.joinpath("stat").read_text().rpartition(")")[2].split()[1] == started_by.decode()
            arguments = path.joinpath("cmdline").read_bytes().split(b"\0")
            is_rank = b"fly_trt.engines.rank_process" in arguments and arguments[-2] == started_by
            if is_rank or (is_child and arguments == [b""]):
                found.append(int(path.name))
    return found


def install_in_process() -> None:
    """For a process that a test starts, from its beginning to its end."""
    cuda = install(pytest.MonkeyPatch())
    cuda.num_devices = NUM_DEVICES
    if broken := os.environ.get(BROKEN):
        _break(cuda, **json.loads(broken))

    def tell() -> None:
        if len(cuda.used_devices) > 1:
            cuda.faults.append(f"contexts on devices {sorted(cuda.used_devices)}, a process has one GPU")
        if cuda.faults:
            Path(os.environ[FOLDER], f"{os.getpid()}.faults").write_text("\n".join(cuda.faults))

    atexit.register(tell)


def _break(cuda: SimulatedCuda, device: int, call: str, after: int, error: str = "cudaErrorIllegalAddress") -> None:
    """The call fails on that device once it was made so many times."""

    class Refused(dict):
        def get(self, name: str, default: object = None) -> object:
            is_due = name == call and cuda.thread.device == device and cuda.calls[call] > after
            return Error[error] if is_due else default

    cuda.refused = Refused()


def shard(built: Path, output: Path, *, target: int, draft: int) -> Path:
    """The engine directory `built` of the demo pair with as many ranks as are asked for: the plans of one rank cut into
    those of several, as fly-build would make them."""
    manifest = read_manifest(built)
    shutil.copytree(built, output, ignore=shutil.ignore_patterns("*.plan", MANIFEST_NAME))
    models = {}
    for role, num_ranks in (("target", target), ("draft", draft)):
        model = getattr(manifest, role)
        plan = (built / model.model).read_bytes()
        names = [f"{role}/model.plan" if num_ranks == 1 else f"{role}/rank{rank}.plan" for rank in range(num_ranks)]
        for rank, name in enumerate(names):
            (output / name).write_bytes(plan if num_ranks == 1 else _shard_plan(plan, model, rank, num_ranks))
        models[role] = model.model_copy(update={"model": names[0], "other_ranks": names[1:]})
    write_manifest(manifest.model_copy(update={**models, "files": hash_directory(output)}), output)
    return output


def _shard_plan(plan: bytes, model: ModelEngine, rank: int, num_ranks: int) -> bytes:
    onnx_model, library, profiles = deserialise(plan)
    sharded = onnx.load_model_from_string(onnx_model)
    graph = sharded.graph
    kv_heads = model.num_kv_heads
    size = model.head_dim
    for tensor in graph.initializer:
        name = tensor.name.removesuffix(".weight")
        kind = name.rpartition(".")[2]
        weight = onnx.numpy_helper.to_array(tensor)
        if kind == "q_proj":
            weight = _query_heads(weight, kv_heads, size, rank, num_ranks)
        elif kind == "o_proj":
            weight = _query_heads(weight.T, kv_heads, size, rank, num_ranks).T
        elif kind in ("k_proj", "v_proj"):
            heads = weight.reshape(len(weight), kv_heads, size)
            weight = heads[:, _kv_heads(kv_heads, rank, num_ranks)].reshape(len(weight), -1)
        elif kind in ("gate_proj", "up_proj"):
            weight = np.split(weight, num_ranks, axis=1)[rank]
        elif kind == "down_proj":
            weight = np.split(weight, num_ranks, axis=0)[rank]
        else:
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(weight), tensor.name))
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.name.startswith(("past_", "present_")):
            value.type.tensor_type.shape.dim[1].dim_value = max(1, kv_heads // num_ranks)
    projection = next(node for node in graph.node if node.output[0] == "logits")
    hidden = _rank_output(projection.input[0])
    nodes = [*_with_collectives(graph.node, num_ranks), *hidden]
    shape = ["B", "L", RANK_CHANNELS]
    graph.output.append(onnx.helper.make_tensor_value_info(RANK_OUTPUT, onnx.TensorProto.FLOAT, shape))
    del graph.node[:]
    graph.node.extend(nodes)
    return serialise(sharded.SerializeToString(), library, profiles)


def _rank_output(hidden: str) -> list[onnx.NodeProto]:
    constants = [
        onnx.helper.make_node("Constant", [], [f"rank.{name}"], value_ints=[number])
        for name, number in (("begin", 0), ("end", RANK_CHANNELS), ("axis", 2))
    ]
    bounds = [node.output[0] for node in constants]
    return [*constants, onnx.helper.make_node("Slice", [hidden, *bounds], [RANK_OUTPUT])]


def _kv_heads(kv_heads: int, rank: int, num_ranks: int) -> slice:
    """A rank's; several ranks have the same one where there are fewer."""
    count = max(1, kv_heads // num_ranks)
    begin = rank * kv_heads // num_ranks
    return slice(begin, begin + count)


def _query_heads(weight: np.ndarray, kv_heads: int, size: int, rank: int, num_ranks: int) -> np.ndarray:
    """[hidden, heads x size]: those that belong to the rank's KV heads. Where ranks share a KV head, each has its part
    of them, filled up with heads of zeros."""
    groups = weight.reshape(len(weight), kv_heads, -1, size)[:, _kv_heads(kv_heads, rank, num_ranks)]
    sharing = max(1, num_ranks // kv_heads)
    per_rank = -(-groups.shape[2] // sharing)
    padded = np.zeros((*groups.shape[:2], per_rank * sharing, size), weight.dtype)
    padded[:, :, : groups.shape[2]] = groups
    begin = rank % sharing * per_rank
    return padded[:, :, begin : begin + per_rank].reshape(len(weight), -1)


def _with_collectives(nodes: object, num_ranks: int) -> Iterator[onnx.NodeProto]:
    """A sum over the ranks behind each product of which every rank has a part."""
    for node in nodes:
        is_partial = node.op_type == "MatMul" and node.input[1].endswith(("o_proj.weight", "down_proj.weight"))
        if not is_partial:
            yield node
            continue
        result = node.output[0]
        node.output[0] = f"{result}.partial"
        yield node
        yield onnx.helper.make_node(
            "DistCollective",
            [node.output[0]],
            [result],
            collective_operation="all_reduce",
            reduce_op="sum",
            root=-1,
            nb_rank=num_ranks,
        )
