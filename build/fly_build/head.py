"""The verification head: EntropyGate and LooseWindowAccept as ONNX local functions of standard opset-24 ops.

These functions are the portable definition of the rule: TensorRT compiles them, ONNX Runtime inlines and runs them
(the gate in a form that reads the vocabulary less often). A build with the operators of plugins/cpu, or for TensorRT
with the plugin library, has nodes of the same names that are kernels. They know nothing of models, nor of which
positions of a step their logits are: the exporter appends them to any decoder that has `logits` [B, L, V], and the
caller says which token follows each of these positions and how many context tokens a row has from the first of them on.
The rule itself is written out for humans in fly_trt/verification/fly.py, which is also what they are tested against.
"""

from typing import Literal

import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
from onnxscript import script
from onnxscript.values import OnnxFunction, Opset

from fly_build.operators import OPSET_VERSION
from fly_build.step_tensors import is_past
from fly_trt.engines.base import CPU_DOMAIN
from fly_trt.engines.tensorrt_library import PLUGIN_NAMESPACE, PLUGIN_VERSION

DOMAIN = "fly"
NEXT_TOKENS = "next_tokens"  # int64 [B, L]
HEAD_INPUTS = {  # [B]
    "num_context": ir.DataType.INT64,
    "num_draft": ir.DataType.INT64,
    "entropy_threshold": ir.DataType.FLOAT,
    "use_full_entropy": ir.DataType.BOOL,
    "window": ir.DataType.INT64,
    "lookahead": ir.DataType.INT64,
}
# How TensorRT's ONNX parser finds the plugin of a node; the plugin's fields are attributes too.
PLUGIN_ATTRIBUTES = {"plugin_namespace": PLUGIN_NAMESPACE, "plugin_version": PLUGIN_VERSION}
# What the two nodes say: its type, and how many of the axes [B, L, top k] it has.
ACCEPT_OUTPUTS = {"num_accepted": (ir.DataType.INT64, 1), "next_token": (ir.DataType.INT64, 1)}
GATE_OUTPUTS = {
    "argmax": (ir.DataType.INT64, 2),
    "entropy": (ir.DataType.FLOAT, 2),
    "entropy_topk": (ir.DataType.FLOAT, 2),
    "argmax_logprob": (ir.DataType.FLOAT, 2),
    "token_logprob": (ir.DataType.FLOAT, 2),
    "top_ids": (ir.DataType.INT64, 3),
    "top_logprobs": (ir.DataType.FLOAT, 3),
}

# How the head is computed: "functions" in any engine, "lazy_functions" on ONNX Runtime's CPU provider, "operators" by
# those of plugins/cpu there, "plugins" by the kernels of TensorRT's plugin library.
HeadForm = Literal["functions", "lazy_functions", "operators", "plugins"]

# Of BlockwiseTopK: it takes ten nodes for one, which 8,192 values make up for even in a step of one token.
LARGE_VOCABULARY = 8192
BLOCK_SIZES, BEST_BLOCK_SIZE = range(32, 513), 128

op = Opset("", OPSET_VERSION)
fly = Opset(DOMAIN, 1)


@script(fly, default_opset=op)
def MostProbable(scores, probs, top_scores, top_tokens, next_tokens):
    """What both gates say alike: scores [B, L, V], their Softmax and TopK [B, L, k], next_tokens int64 [B, L] -> log
    of the scores' sum [B, L, 1], and argmax, entropy_topk, argmax_logprob, token_logprob and top_logprobs.

    The log of the sum comes from the most probable token's share: ReduceLogSumExp needs cuDNN on ONNX Runtime's CUDA
    provider, and takes ten times as long as Softmax on its CPU provider.
    """
    last = op.Constant(value_ints=[-1])
    first = op.Constant(value_int=0)
    argmax = op.Gather(top_tokens, first, axis=-1)
    best = op.Unsqueeze(argmax, last)
    log_sum = op.GatherElements(scores, best, axis=-1) - op.Log(op.GatherElements(probs, best, axis=-1))
    top_log_probs = top_scores - log_sum
    top_probs = op.Exp(top_log_probs)
    impossible = op.Constant(value_float=0.0)
    top_terms = op.Where(top_probs == impossible, impossible, top_probs * top_log_probs)
    entropy_topk = op.Neg(op.ReduceSum(top_terms, last, keepdims=0))
    argmax_logprob = op.Gather(top_log_probs, first, axis=-1)
    token_score = op.GatherElements(scores, op.Unsqueeze(next_tokens, last), axis=-1)
    token_logprob = op.Squeeze(token_score - log_sum, last)
    return log_sum, argmax, entropy_topk, argmax_logprob, token_logprob, top_log_probs


@script(fly, default_opset=op)
def EntropyGate(logits, next_tokens, top_k):
    """logits [B, L, V], next_tokens int64 [B, L], top_k int64 [1] -> five [B, L] tensors, entropies in nats, and the
    top_k most probable tokens with their log probabilities [B, L, k], the lowest id first among equals.

    A logit of -inf has no share in the entropies. A row with NaN or +inf has NaN entropies and log probabilities of its
    most probable tokens, so it never loosens, and the runtime reports it.
    """
    last = op.Constant(value_ints=[-1])
    scores = op.Cast(logits, to=1)
    probs = op.Softmax(scores, axis=-1)
    top_scores, top_tokens = op.TopK(scores, top_k, axis=-1, largest=1, sorted=1)
    log_sum, argmax, entropy_topk, argmax_logprob, token_logprob, top_log_probs = MostProbable(
        scores, probs, top_scores, top_tokens, next_tokens
    )
    impossible = op.Constant(value_float=0.0)
    terms = op.Where(probs == impossible, impossible, probs * (scores - log_sum))
    entropy = op.Neg(op.ReduceSum(terms, last, keepdims=0))
    # Beside a logit of +inf every other has -inf, which would say that it is impossible.
    best_log_prob = op.Unsqueeze(argmax_logprob, last)
    top_log_probs = op.Where(best_log_prob < op.Constant(value_float=1.0), top_log_probs, best_log_prob)
    return argmax, entropy, entropy_topk, argmax_logprob, token_logprob, top_tokens, top_log_probs


@script(fly, default_opset=op)
def BlockwiseTopK(logits, top_k, block):
    """TopK of logits [B, T, V] over the vocabulary in blocks of C; block int64 [C] is 0 .. C - 1, where C divides V and
    there are at least top_k blocks.

    ONNX Runtime's ReduceMax takes a tenth of the time of its TopK. The top_k largest values are in the top_k blocks
    with the largest maxima: what is in another block has so many before it. Those blocks are put in the vocabulary's
    order, so that the lowest id comes first among equals, as in TopK.
    """
    last = op.Constant(value_ints=[-1])
    flat = op.Constant(value_ints=[0, 0, -1])
    size = op.Shape(block)
    maxima = op.ReduceMax(op.Reshape(logits, op.Concat(flat, size, axis=0)), last, keepdims=0)
    _maxima, blocks = op.TopK(maxima, top_k, axis=-1, largest=1, sorted=1)
    in_order, _places = op.TopK(blocks, top_k, axis=-1, largest=0, sorted=1)
    candidates = op.Reshape(op.Unsqueeze(in_order * size, last) + block, flat)
    found = op.GatherElements(logits, candidates, axis=-1)
    top_scores, places = op.TopK(found, top_k, axis=-1, largest=1, sorted=1)
    return top_scores, op.GatherElements(candidates, places, axis=-1)


@script(fly, default_opset=op)
def LazyEntropyGate(logits, next_tokens, top_scores, top_tokens, use_full_entropy):
    """EntropyGate with the TopK of the logits given, but `entropy` is NaN in a step in which no row uses it;
    use_full_entropy bool [B].

    Softmax is the only operator that reads the vocabulary then.
    """
    last = op.Constant(value_ints=[-1])
    scores = op.Cast(logits, to=1)
    probs = op.Softmax(scores, axis=-1)
    log_sum, argmax, entropy_topk, argmax_logprob, token_logprob, top_log_probs = MostProbable(
        scores, probs, top_scores, top_tokens, next_tokens
    )
    impossible = op.Constant(value_float=0.0)
    is_used = op.Cast(op.ReduceMax(op.Cast(use_full_entropy, to=6), keepdims=0), to=9)
    if is_used:
        terms = op.Where(probs == impossible, impossible, probs * (scores - log_sum))
        entropy = op.Neg(op.ReduceSum(terms, last, keepdims=0))
    else:
        entropy = entropy_topk + op.Constant(value_float=float("nan"))
    return argmax, entropy, entropy_topk, argmax_logprob, token_logprob, top_tokens, top_log_probs


@script(fly, default_opset=op)
def LooseWindowAccept(
    next_tokens,
    argmax,
    entropy,
    entropy_topk,
    num_context,
    num_draft,
    entropy_threshold,
    use_full_entropy,
    window,
    lookahead,
    stop_token_ids,
):
    """Per-position tensors [B, L], per-row tensors [B], stop_token_ids int64 [N] -> num_accepted, next_token int64 [B].

    Position t predicts token t + 1; the drafts of a row are predicted at positions num_context - 1 onwards. Positions
    and num_context begin where the logits do.
    """
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    axis0 = op.Constant(value_ints=[0])
    axis1 = op.Constant(value_ints=[1])
    length = op.Squeeze(op.Shape(argmax, start=1, end=2), axis0)
    position = op.Unsqueeze(op.Range(zero, length, one), axis0)
    begin = op.Unsqueeze(num_context, axis1) - one
    end = begin + op.Unsqueeze(num_draft, axis1)
    is_draft = op.And(position >= begin, position < end)
    mismatch = op.And(is_draft, op.Not(op.Equal(next_tokens, argmax)))

    full = op.Unsqueeze(use_full_entropy, axis1)
    gate = op.Where(full, entropy, entropy_topk)
    uncertain = gate >= op.Unsqueeze(entropy_threshold, axis1)
    ahead = op.Unsqueeze(lookahead, axis1)
    num_mismatches = op.CumSum(op.Cast(mismatch, to=7), one)
    # Not length - 1: where there is a GPU that is a number of the host, to be copied in every step.
    last_position = op.Gather(position, op.Constant(value_int=-1), axis=1)
    last_ahead = op.Min(position + ahead, last_position)
    agrees_ahead = op.Equal(op.GatherElements(num_mismatches, last_ahead, axis=1), num_mismatches)
    has_room = (position + op.Max(op.Unsqueeze(window, axis1), ahead)) < end
    last_axis = op.Constant(value_ints=[-1])
    tokens = op.Concat(op.Unsqueeze(next_tokens, last_axis), op.Unsqueeze(argmax, last_axis), axis=-1)
    is_stop = op.Equal(op.Unsqueeze(tokens, last_axis), stop_token_ids)
    # Counted in float32: ONNX Runtime adds integers on a GPU with cuDNN, which nothing else here needs.
    num_stops = op.ReduceSum(op.Cast(is_stop, to=1), op.Constant(value_ints=[2, 3]), keepdims=0)
    may_loosen = op.And(uncertain, num_stops < op.Constant(value_float=1.0))
    loosened = op.And(op.And(mismatch, may_loosen), op.And(agrees_ahead, has_room))

    rejected = op.And(mismatch, op.Not(loosened))
    num_rejected = op.CumSum(op.Cast(rejected, to=7), one)
    accepted = op.And(is_draft, op.Equal(num_rejected, zero))
    num_accepted = op.Cast(op.ReduceSum(op.Cast(accepted, to=1), axis1, keepdims=0), to=7)
    stop_position = begin + op.Unsqueeze(num_accepted, axis1)
    next_token = op.Squeeze(op.GatherElements(argmax, stop_position, axis=1), axis1)
    return num_accepted, next_token


def append_head(
    model: ir.Model, entropy_top_k: int, stop_token_ids: list[int], *, form: HeadForm = "functions"
) -> None:
    """Adds the head's inputs, nodes, functions and outputs to a decoder graph with `logits` [B, L, V], in place. Its
    inputs, after those of the decoder but the cache, are NEXT_TOKENS and HEAD_INPUTS.

    `stop_token_ids` (end-of-sequence and end-of-turn tokens) are never loosened; -1 stands for "none". For plugins the
    functions are left out: where no plugin library is loaded TensorRT would compile them in silence. So they are for
    operators.
    """
    graph = model.graph
    domain = CPU_DOMAIN if form == "operators" else DOMAIN
    graph.opset_imports[domain] = 1
    use_plugins, is_lazy, has_kernels = form == "plugins", form == "lazy_functions", form in ("operators", "plugins")
    if not has_kernels:
        _add_functions(model, LazyEntropyGate if is_lazy else EntropyGate, LooseWindowAccept)

    def constant(name: str, values: list[int]) -> ir.Value:
        value = ir.Value(name=name, const_value=ir.tensor(values, dtype=ir.DataType.INT64, name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(values)])
        graph.register_initializer(value)
        return value

    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    batch, asked = logits.shape[0], logits.shape[1]
    next_tokens = ir.Value(name=NEXT_TOKENS, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([batch, asked]))
    head_inputs = {
        name: ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape([batch]))
        for name, dtype in HEAD_INPUTS.items()
    }
    is_of_step = [not is_past(value) for value in graph.inputs]
    position = len(is_of_step) - is_of_step[::-1].index(True)
    for offset, value in enumerate((next_tokens, *head_inputs.values())):
        graph.inputs.insert(position + offset, value)

    stop_tokens = constant("fly.stop_token_ids", stop_token_ids or [-1])
    gate_inputs, top = [logits, next_tokens], []
    if not has_kernels:
        gate_inputs.append(constant("fly.entropy_top_k", [entropy_top_k]))
    if is_lazy:
        top_inputs, block_size = [logits, gate_inputs.pop()], _block_size(logits.shape[2], entropy_top_k)
        if block_size is not None:
            _add_functions(model, BlockwiseTopK)
            top_inputs.append(constant("fly.block", list(range(block_size))))
            top.append(ir.node("BlockwiseTopK", top_inputs, domain=DOMAIN, num_outputs=2))
        else:
            top.append(ir.node("TopK", top_inputs, num_outputs=2))
        gate_inputs += [*top[0].outputs, head_inputs["use_full_entropy"]]
    gate = ir.node(
        "LazyEntropyGate" if is_lazy else "EntropyGate",
        gate_inputs,
        (PLUGIN_ATTRIBUTES if use_plugins else {}) | ({"top_k": entropy_top_k} if has_kernels else {}),
        domain=domain,
        num_outputs=len(GATE_OUTPUTS),
    )
    argmax, entropy, entropy_topk, *_ = gate.outputs
    row_inputs, casts = head_inputs, []
    if use_plugins:  # TensorRT hands plugins no bool
        casts = [ir.node("Cast", [head_inputs["use_full_entropy"]], {"to": int(ir.DataType.INT32)})]
        row_inputs = head_inputs | {"use_full_entropy": casts[0].outputs[0]}
    accept = ir.node(
        "LooseWindowAccept",
        [next_tokens, argmax, entropy, entropy_topk, *row_inputs.values(), stop_tokens],
        PLUGIN_ATTRIBUTES if use_plugins else {},
        domain=domain,
        num_outputs=len(ACCEPT_OUTPUTS),
    )
    graph.extend([*top, gate, *casts, accept])
    outputs = ACCEPT_OUTPUTS | GATE_OUTPUTS
    for at, (value, name) in enumerate(zip([*accept.outputs, *gate.outputs], outputs, strict=True)):
        dtype, rank = outputs[name]
        value.name, value.type = name, ir.TensorType(dtype)
        value.shape = ir.Shape([batch, asked, entropy_top_k][:rank])
        graph.outputs.insert(at, value)


def _block_size(vocab_size: int, top_k: int) -> int | None:
    """Of the blocks that BlockwiseTopK cuts a vocabulary into; None where it has no advantage or no such blocks."""
    if vocab_size < LARGE_VOCABULARY:
        return None
    sizes = [size for size in BLOCK_SIZES if vocab_size % size == 0 and vocab_size // size >= top_k]
    return min(sizes, key=lambda size: abs(size - BEST_BLOCK_SIZE), default=None)


def _add_functions(model: ir.Model, *functions: OnnxFunction) -> None:
    """What they share becomes a part of each."""
    protos = [function.to_function_proto() for function in (*functions, MostProbable)]
    *own, shared = map(ir.serde.deserialize_function, protos)
    for value in (output for node in shared for output in node.outputs):
        value.name = f"{shared.name}.{value.name}"  # the pass does not look at names in branches
    holder = ir.Model(
        ir.Graph([], [], nodes=[], opset_imports=model.opset_imports),
        ir_version=model.ir_version,
        functions=[*own, shared],
    )
    ir_passes.InlinePass(criteria=lambda function: function is shared)(holder)
    for function in own:
        function.opset_imports.pop(DOMAIN, None)
        for node in function:
            node.name = f"{function.name}.{node.name}"  # TensorRT wants names that are unique in the whole network
        model.functions[function.identifier()] = function
