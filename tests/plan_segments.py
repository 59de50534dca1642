"""The graph of a simulated plan, computed by ONNX Runtime piece by piece: between two pieces the ranks sum.

ONNX Runtime has no DistCollective, so that a graph is cut behind each of them. A graph without any is one piece.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from fly_trt.engines.onnxruntime import session_options

SILENT_BELOW_ERROR = 3
# ONNX Runtime makes MatMulNBits of a DequantizeLinear and a MatMul, and would round the activations to 8 bits.
EXACT_PRODUCTS = ("session.qdq_matmulnbits_accuracy_level", "1")
COLLECTIVE = "DistCollective"
ELEMENTS = {"float": 1, "int64": 7, "bool": 9, "float16": 10, "bfloat16": 16}  # of onnx.TensorProto
Sum = Callable[[np.ndarray, int], None]
"""Sums an array in place over that many ranks."""


@dataclass
class Summed:
    """The value `name` of that many ranks makes `result`; `type` and `shape` as ONNX Runtime describes values."""

    source: str
    name: str
    num_ranks: int
    type: str
    shape: list[Any]


@dataclass
class Segment:
    """A piece, and what is summed behind it."""

    session: ort.InferenceSession
    sums: list[Summed]


class SegmentedPlan:
    """`inputs` and `outputs` are those of the whole graph, by name, as ONNX Runtime describes them."""

    def __init__(self, segments: list[Segment], inputs: Iterable[str], outputs: Iterable[str]) -> None:
        self.segments = segments
        found = {value.name: value for segment in segments for value in segment.session.get_inputs()}
        self.inputs = {name: found[name] for name in inputs}
        found |= {value.name: value for segment in segments for value in segment.session.get_outputs()}
        found |= {value.name: value for segment in segments for value in segment.sums}
        self.outputs = {name: found[name] for name in outputs}
        self.num_ranks = max([1, *(summed.num_ranks for segment in self.segments for summed in segment.sums)])

    def run(self, values: dict[str, ort.OrtValue], sum_up: Sum | None) -> None:
        """values: of all inputs, and of all outputs the memory that they are written to."""
        values = dict(values)
        for segment in self.segments:
            binding = segment.session.io_binding()
            for value in segment.session.get_inputs():
                binding.bind_ortvalue_input(value.name, values[value.name])
            names = [value.name for value in segment.session.get_outputs()]
            for name in names:
                if name in self.outputs:
                    binding.bind_ortvalue_output(name, values[name])
                else:
                    binding.bind_output(name, "cpu")
            segment.session.run_with_iobinding(binding)
            values |= dict(zip(names, binding.get_outputs(), strict=True))
            for summed in segment.sums:
                array = values[summed.source].numpy().copy()
                assert sum_up is not None
                sum_up(array, summed.num_ranks)
                if summed.name in self.outputs:
                    values[summed.name].update_inplace(array)
                else:
                    values[summed.name] = ort.OrtValue.ortvalue_from_numpy(array)


@functools.cache
def segmented(onnx_model: bytes) -> SegmentedPlan:
    model = onnx.load_model_from_string(onnx_model)
    names = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
    return SegmentedPlan(list(_segments(model)), *names)


def whole(session: ort.InferenceSession) -> SegmentedPlan:
    """A graph that is one piece."""
    names = ([value.name for value in values] for values in (session.get_inputs(), session.get_outputs()))
    return SegmentedPlan([Segment(session, [])], *names)


def _segments(model: onnx.ModelProto) -> Iterator[Segment]:
    graph = model.graph
    placed = list(zip(graph.node, _places(graph), strict=True))
    weights = {tensor.name: tensor for tensor in graph.initializer}
    known = {value.name: value for value in graph.input}
    wanted = {value.name: value for value in graph.output}
    uses = [(place, set(_reads(node))) for node, place in placed]
    for index in range(1 + max(place for _, place in placed)):
        here = [node for node, place in placed if place == index]
        nodes = [node for node in here if node.op_type != COLLECTIVE]
        collectives = [node for node in here if node.op_type == COLLECTIVE]
        read = [name for node in nodes for name in _reads(node)]
        made = [name for node in nodes for name in node.output if name]
        later = {name for at, names in uses if at > index for name in names}
        summed = {name for node in collectives for name in node.input}
        inputs = [known[name] for name in dict.fromkeys(read) if name in known]
        outputs = [
            wanted.get(name, onnx.ValueInfoProto(name=name))
            for name in made
            if name in wanted or name in later or name in summed
        ]
        kept = [weights[name] for name in dict.fromkeys(read) if name in weights]
        part = onnx.ModelProto()
        part.CopyFrom(model)
        part.graph.CopyFrom(onnx.helper.make_graph(nodes, f"segment {index}", inputs, outputs, kept))
        options = session_options()
        options.log_severity_level = SILENT_BELOW_ERROR
        options.add_session_config_entry(*EXACT_PRODUCTS)
        session = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for value in session.get_outputs():
            known[value.name] = _value_info(value.name, value.type)
        sums = []
        for node in collectives:
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            if (attributes["collective_operation"], attributes["reduce_op"]) != (b"all_reduce", b"sum"):
                raise NotImplementedError(f"{node.name}: {attributes}")
            source, name = node.input[0], node.output[0]
            kind = next(value.type for value in session.get_outputs() if value.name == source)
            dims = wanted[name].type.tensor_type.shape.dim if name in wanted else []
            shape = [dim.dim_param or dim.dim_value for dim in dims]
            sums.append(Summed(source, name, int(attributes["nb_rank"]), kind, shape))
            known[name] = _value_info(name, kind)
        yield Segment(session, sums)


def _value_info(name: str, kind: str) -> onnx.ValueInfoProto:
    element = ELEMENTS[kind.removeprefix("tensor(").removesuffix(")")]
    return onnx.helper.make_tensor_value_info(name, element, None)


def _places(graph: onnx.GraphProto) -> list[int]:
    """The segment of each node: behind all collectives that it depends on, and a collective is the last of its own."""
    made_in: dict[str, int] = {}
    places = []
    for node in graph.node:
        at = max((made_in.get(name, 0) for name in _reads(node)), default=0)
        places.append(at)
        for name in node.output:
            made_in[name] = at + (node.op_type == COLLECTIVE)
    return places


def _reads(node: Any) -> Iterator[str]:
    """The names that a node uses, those of its branches included."""
    yield from filter(None, node.input)
    for attribute in node.attribute:
        if attribute.HasField("g"):
            for inner in attribute.g.node:
                yield from _reads(inner)
