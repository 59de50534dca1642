"""Makes a model of one rank's size talk to the other ranks while it is traced: DistCollective, TensorRT's operator for
what all ranks do together, always a sum here.

A product whose input is spread over the ranks gives each of them a part of a sum. So the sum stands right behind the
product, before its bias and whatever else the architecture does with it; of experts, behind the sum over those of a
token. It is put in where transformers' module computes, not searched for in the graph afterwards, where a product may
have any form. It knows modules; which part of a parameter a rank has is sharding.py's to know.
"""

from typing import Any

import onnx_ir as ir
import torch
from torch.onnx.ops import symbolic

from fly_build.operators import OPSET_VERSION
from fly_build.sharding import RANK_PARAMETER, Sharding
from fly_trt.engines.base import RANK_CHANNELS, RANK_OUTPUT

OPERATOR = "DistCollective"  # of no opset, but TensorRT's parser goes by the name alone
ROW_PARALLEL = ("o_proj", "down_proj")
WIDE_NORMS = ("q_norm", "k_norm")


def all_reduce(x: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """The sum over the ranks, for each of them."""
    attributes: dict[str, Any] = {
        "collective_operation": "all_reduce",
        "reduce_op": "sum",
        "root": -1,
        "nb_rank": num_ranks,
        "group_size": 0,
    }
    return symbolic(OPERATOR, (x,), attrs=attributes, dtype=x.dtype, shape=x.shape, version=OPSET_VERSION)


def add_collectives(model: Any, sharding: Sharding) -> None:
    """Changes a model of `sharding.rank_config`, in place and for good. Names and shapes of its parameters stay, and
    the parameters `sharding.rank_vectors` are added."""
    num_ranks = sharding.num_ranks
    for name, module in list(model.named_modules()):
        path, _, last = name.rpartition(".")
        if last in ROW_PARALLEL and isinstance(module, torch.nn.Linear):
            setattr(model.get_submodule(path), last, _RowParallel(module, num_ranks))
        elif last in WIDE_NORMS and sharding.has_wide_norms:
            setattr(model.get_submodule(path), last, _OverAllHeads(module, num_ranks))
        elif last == "experts":
            module.register_forward_hook(lambda module, args, output: all_reduce(output, num_ranks))
    if sharding.by_vocabulary:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            vector = torch.empty(num_ranks, dtype=module.weight.dtype)
            module.register_parameter(RANK_PARAMETER, torch.nn.Parameter(vector, requires_grad=False))
        _embed_by_vocabulary(model.get_input_embeddings(), num_ranks)
        _project_by_vocabulary(model.get_output_embeddings(), num_ranks)


def add_rank_output(graph: ir.Graph, projection: ir.Value) -> None:
    """Has a rank's graph say what its vocabulary projection, of this weight, is given: the first channels, float32
    [B, L, RANK_CHANNELS]. The ranks agree on them where all sums before were made."""
    (transpose,) = (use.node for use in projection.uses())
    (product,) = (use.node for use in transpose.outputs[0].uses())
    hidden = product.inputs[0]
    assert hidden is not None
    bounds = []
    for name, number in (("begin", 0), ("end", RANK_CHANNELS), ("axis", 2)):
        value = ir.val(f"{RANK_OUTPUT}.{name}", const_value=ir.tensor([number], ir.DataType.INT64))
        graph.register_initializer(value)
        bounds.append(value)
    first = ir.node("Slice", [hidden, *bounds])
    cast = ir.node("Cast", [first.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    graph.extend([first, cast])
    output = cast.outputs[0]
    batch, asked = graph.outputs[0].shape[:2] if graph.outputs[0].shape is not None else (None, None)
    output.name, output.type = RANK_OUTPUT, ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([batch, asked, RANK_CHANNELS])
    graph.outputs.append(output)


class _RowParallel(torch.nn.Module):
    """A linear layer whose input is spread over the ranks."""

    def __init__(self, linear: torch.nn.Linear, num_ranks: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.num_ranks = num_ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = all_reduce(torch.nn.functional.linear(x, self.weight), self.num_ranks)
        return product if self.bias is None else product + self.bias


class _OverAllHeads(torch.nn.Module):
    """The norm of all heads together (olmo2's), of which a rank has a part: the ranks sum their mean squares, one
    number a token. Each of several ranks that have the same key-value head counts it, which the mean divides out."""

    def __init__(self, norm: Any, num_ranks: int) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon
        self.num_ranks = num_ranks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = x.float()
        mean_square = all_reduce(whole.pow(2).mean(-1, keepdim=True), self.num_ranks) / self.num_ranks
        return (self.weight.float() * (whole * torch.rsqrt(mean_square + self.epsilon))).to(x.dtype)


def _embed_by_vocabulary(module: Any, num_ranks: int) -> None:
    """Each rank looks up the tokens that it has, and zeros for the others."""
    look_up, size = module.forward, module.weight.shape[0]

    def forward(ids: torch.Tensor) -> torch.Tensor:
        owner = _divide(ids, size)
        is_own = torch.nn.functional.embedding(owner, module.rank[:, None])
        return all_reduce(look_up(ids - owner * size) * is_own, num_ranks)

    module.forward = forward


def _divide(numbers: torch.Tensor, divisor: int) -> torch.Tensor:
    """Of integers that are not negative, in one operator: torch's own division is exported for negative ones too."""
    operands = numbers, torch.tensor(divisor)
    return symbolic("Div", operands, dtype=numbers.dtype, shape=numbers.shape, version=OPSET_VERSION)


def _project_by_vocabulary(module: Any, num_ranks: int) -> None:
    """Each rank puts the logits that it has at their place among zeros: a sum with zeros is exact, and TensorRT's
    parser knows no other collective. A logit that is not a number stays with its own token."""
    project = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        logits = project(x)[..., None, :]
        is_own = (module.rank > 0)[:, None]
        return all_reduce(torch.where(is_own, logits, logits.new_zeros(())).flatten(-2), num_ranks)

    module.forward = forward
