"""Gives the traced graph its weights: as they are, in half precision, or quantised in the form that the kernels read.

Every initializer is lazy: it is computed from the checkpoint's tensor when the file is written and dropped right
after, so the peak is the checkpoint plus the tensors in flight.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import onnx_ir as ir
import torch

from fly_build.graph_edits import DTYPES, GraphEdits, Linear, find_linears
from fly_build.linear_form import Kernels, Source
from fly_build.linear_forms import FORMS, STORED_FORMS
from fly_build.quantization import Array
from fly_build.quantized_weight import QuantizedWeight
from fly_build.tensors import OUTPUT_NAME, Parameter, Tensors, place_of
from fly_trt.errors import CheckpointError
from fly_trt.manifest import Dtype, Quantization


@dataclass
class WeightWriter:
    """Turns the parameters of one traced graph into initializers, in place.

    `dtype` is how unquantised weights are stored, `compute_dtype` what the graph was traced in: float32 for ONNX
    Runtime on a CPU, which has no bfloat16 arithmetic and emulates float16. `output_name` is the parameter of the
    vocabulary projection. Where the checkpoint has quantised weights they are taken as they are, and so is the rest;
    otherwise all linear layers are quantised as `quantization` says. Parameters whose tensors share their memory are
    stored once. `prepare(name, tensor)` gives what is to be stored of a parameter, when it is stored.
    """

    graph: ir.Graph
    tensors: Tensors
    dtype: Dtype
    quantization: Quantization
    output_name: str = OUTPUT_NAME
    compute_dtype: Dtype = "float32"
    kernels: Kernels = "cpu"
    prepare: Callable[[str, Parameter], Parameter] = lambda name, tensor: tensor
    _shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._edits = GraphEdits(self.graph, self.compute_dtype)

    def attach(self, parameters: dict[str, ir.Value]) -> None:
        self._shapes = {name: _static_shape(value) for name, value in parameters.items()}
        parameters = self._share_tied(parameters)
        linears = [linear for name, value in parameters.items() for linear in find_linears(name, value)]
        for linear in self._place_quantised(linears):
            if len(parameters[linear.name].uses()) == 1:
                self._store_transposed(linear)
        for name, value in parameters.items():
            if value.uses():
                self._store(name, value)

    def _share_tied(self, parameters: dict[str, ir.Value]) -> dict[str, ir.Value]:
        """The parameters with those that are tied as one, under the first name."""
        first: dict[int, str] = {}
        distinct = {}
        for name, value in parameters.items():
            shared = first.setdefault(place_of(self.tensors[name]), name)
            if shared == name:
                distinct[name] = value
            else:
                ir.convenience.replace_all_uses_with(value, distinct[shared])
                self.output_name = shared if name == self.output_name else self.output_name
        return distinct

    def _place_quantised(self, linears: list[Linear]) -> list[Linear]:
        """Those that are left, which stay as they are."""
        if any(isinstance(tensor, QuantizedWeight) for tensor in self.tensors.values()):
            form, weights = STORED_FORMS[self.kernels], [self._quantised(linear.name) for linear in linears]
        elif self.quantization == "none":
            return linears
        else:
            form = FORMS[self.kernels, self.quantization]
            weights = [
                form.quantize(self._source(linear.name), self.compute_dtype, is_output=linear.name == self.output_name)
                for linear in linears
            ]
        layers = list(zip(linears, weights, strict=True))
        form.place(self._edits, [(linear, weight) for linear, weight in layers if weight is not None])
        return [linear for linear, weight in layers if weight is None]

    def _store(self, name: str, value: ir.Value) -> None:
        """The parameter as it is; where the graph computes in another dtype a Cast follows it, or follows the Gather
        that picks rows of it."""
        _, stored = DTYPES[self.dtype]
        if isinstance(self.tensors[name], QuantizedWeight):
            raise CheckpointError(f"{name}: is quantised, and the weight of no linear layer: only those can be")
        initializer = self._edits.initializer(
            name, stored, self._shapes[name], lambda: self._as_stored(self._read(name))
        )
        for node, index in list(value.uses()):
            if stored == self._edits.computed:
                node.replace_input_with(index, initializer)
            elif node.op_type == "Gather":
                node.replace_input_with(index, initializer)
                self._cast_after(node)
            else:
                node.replace_input_with(index, self._cast_before(node, initializer))

    def _store_transposed(self, linear: Linear) -> None:
        _, stored = DTYPES[self.dtype]
        name = linear.name
        shape = self._shapes[name][::-1]
        initializer = self._edits.initializer(name, stored, shape, lambda: self._as_stored(self._read(name).t()))
        value = initializer if stored == self._edits.computed else self._cast_before(linear.matmul, initializer)
        linear.matmul.replace_input_with(1, value)
        self.graph.remove(linear.transpose, safe=True)

    def _source(self, name: str) -> Source:
        columns, rows = self._shapes[name]
        return Source(name, (columns, rows), lambda: self._read(name))

    def _quantised(self, name: str) -> QuantizedWeight | None:
        """A weight of the checkpoint. What is read of it is what `prepare` gives when it is read."""
        if not isinstance(self.tensors[name], QuantizedWeight):
            return None
        now = self._prepared(name)
        assert now.shape == self._shapes[name], name

        def later(part: str) -> Callable[[], Array] | None:
            return None if getattr(now, part) is None else lambda: getattr(self._prepared(name), part)()

        parts: dict[str, Any] = {part: later(part) for part in ("codes", "scales", "zero_points", "input_factors")}
        return replace(now, name=name, **parts)

    def _prepared(self, name: str) -> QuantizedWeight:
        weight = self.prepare(name, self.tensors[name])
        assert isinstance(weight, QuantizedWeight)
        return weight

    def _read(self, name: str) -> torch.Tensor:
        tensor = self.prepare(name, self.tensors[name])
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _cast_before(self, node: ir.Node, value: ir.Value) -> ir.Value:
        return self._edits.insert(node, "Cast", [value], to=int(self._edits.computed))

    def _cast_after(self, node: ir.Node) -> None:
        output = node.outputs[0]
        cast = ir.node("Cast", [output], {"to": int(self._edits.computed)})
        ir.convenience.replace_all_uses_with(output, cast.outputs[0])
        cast.replace_input_with(0, output)
        cast.outputs[0].shape, cast.outputs[0].type = output.shape, output.type
        output.type = None
        self.graph.insert_after(node, cast)

    def _as_stored(self, tensor: torch.Tensor) -> Array:
        dtype, _ = DTYPES[self.dtype]
        converted = tensor.to(dtype).contiguous()
        if dtype == torch.bfloat16:
            return converted.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return converted.numpy()


def _static_shape(parameter: ir.Value) -> tuple[int, ...]:
    assert parameter.shape is not None
    return tuple(size for size in parameter.shape if isinstance(size, int))
