"""Gives a small Llama checkpoint the size, and so the cost, of a big one without changing what it computes.

usage: tools/inflate_checkpoint.py SMALL OUT [--hidden 1024 --layers 16 --heads 16 --kv-heads 4 --intermediate 4096]

The new channels of the residual stream stay zero and the new heads, neurons and layers write nothing into it, so the
logits are those of the small model; every other weight is random, so that arithmetic and quantisation have real work.
With the default shape the demo target becomes a model of 245 M parameters with the demo target's answers.
"""

import argparse

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

CHECK_TOKENS = 64
CHECK_TOLERANCE = 1e-2


def inflate(
    small: LlamaForCausalLM, hidden: int, layers: int, heads: int, kv_heads: int, inner: int
) -> LlamaForCausalLM:
    """A model of the given shape with the logits of `small`. Raises ValueError when it would be smaller anywhere."""
    old = small.config
    head_dim = old.head_dim
    group, new_group = old.num_attention_heads // old.num_key_value_heads, heads // kv_heads
    grows = (
        hidden >= old.hidden_size
        and layers >= old.num_hidden_layers
        and kv_heads >= old.num_key_value_heads
        and new_group >= group
        and inner >= old.intermediate_size
    )
    if not grows:
        raise ValueError("the new shape must not be smaller than the checkpoint's in any dimension")
    settings = old.to_dict() | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inner,
        "head_dim": head_dim,
        # The mean square runs over more channels, of which the new ones are zero.
        "rms_norm_eps": old.rms_norm_eps * old.hidden_size / hidden,
        "dtype": "float32",
    }
    big = LlamaForCausalLM(LlamaConfig(**settings)).eval()
    norm_scale = (old.hidden_size / hidden) ** 0.5
    channels = torch.arange(old.hidden_size)
    neurons = torch.arange(old.intermediate_size)
    keys = torch.arange(old.num_key_value_heads * head_dim)
    # Query head i of the small model shares keys with its group; it must do so in the big one.
    places = [(i // group) * new_group + i % group for i in range(old.num_attention_heads)]
    queries = torch.cat([torch.arange(head_dim) + place * head_dim for place in places])

    def put(target: torch.nn.Linear, source: torch.nn.Linear, rows: torch.Tensor, columns: torch.Tensor) -> None:
        target.weight[rows[:, None], columns[None]] = source.weight

    with torch.no_grad():
        embedding = big.model.embed_tokens.weight.zero_()
        embedding[:, : old.hidden_size] = small.model.embed_tokens.weight
        big.model.norm.weight[: old.hidden_size] = small.model.norm.weight * norm_scale
        for layer in big.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        for layer, source in zip(big.model.layers, small.model.layers, strict=False):
            for name in ("input_layernorm", "post_attention_layernorm"):
                getattr(layer, name).weight[: old.hidden_size] = getattr(source, name).weight * norm_scale
            put(layer.self_attn.q_proj, source.self_attn.q_proj, queries, channels)
            put(layer.self_attn.k_proj, source.self_attn.k_proj, keys, channels)
            put(layer.self_attn.v_proj, source.self_attn.v_proj, keys, channels)
            put(layer.self_attn.o_proj, source.self_attn.o_proj, channels, queries)
            put(layer.mlp.gate_proj, source.mlp.gate_proj, neurons, channels)
            put(layer.mlp.up_proj, source.mlp.up_proj, neurons, channels)
            put(layer.mlp.down_proj, source.mlp.down_proj, channels, neurons)
    return big


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small")
    parser.add_argument("out")
    for name, default in (("hidden", 1024), ("layers", 16), ("heads", 16), ("kv-heads", 4), ("intermediate", 4096)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    torch.manual_seed(0)
    small = LlamaForCausalLM.from_pretrained(args.small, dtype=torch.float32).eval()
    big = inflate(small, args.hidden, args.layers, args.heads, args.kv_heads, args.intermediate)
    tokens = torch.randint(0, small.config.vocab_size, (2, CHECK_TOKENS))
    with torch.no_grad():
        difference = (big(input_ids=tokens).logits - small(input_ids=tokens).logits).abs().max().item()
    if difference > CHECK_TOLERANCE:
        raise SystemExit(f"the logits differ by {difference:.2e}, expected at most {CHECK_TOLERANCE}")
    big.to(getattr(torch, args.dtype)).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.small).save_pretrained(args.out)
    counts = [sum(parameter.numel() for parameter in model.parameters()) / 1e6 for model in (small, big)]
    sizes = f"{counts[0]:.1f} M -> {counts[1]:.1f} M parameters"
    print(f"{args.out}: {sizes}, largest difference of a logit {difference:.1e}")


if __name__ == "__main__":
    main()
