"""Makes float32 checkpoints of a GGUF file: the whole model as a target, and some of its layers, or layers of a file,
as a draft.

usage: tools/gguf_checkpoint.py GGUF OUT --draft-layers 0 1 2 5 | --draft-tensors FILE
                                [--extra-token TOKEN] [--libraries DIR]

OUT gets the folders target and draft. transformers reads the file, for which it needs the packages gguf and accelerate,
from --libraries where they are not installed. --extra-token is added to the tokenizer with the next free id, and to the
model it is not: published tokenizers have such tokens.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

# Of the file itself: fly-build would take the first for a quantised checkpoint.
FORGOTTEN = ("quantization_config", "_name_or_path", "_model_name_or_path")


def main() -> None:
    args = _parse()
    sys.path[:0] = [str(args.libraries)] if args.libraries else []
    import torch
    import transformers
    from safetensors.torch import load_file

    source = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    if args.extra_token:
        tokenizer.add_tokens([args.extra_token], special_tokens=True)
    settings = {name: value for name, value in model.config.to_dict().items() if name not in FORGOTTEN}
    tensors = model.state_dict()
    layers = load_file(args.draft_tensors) if args.draft_tensors else _layers(tensors, args.draft_layers)
    outer = {name: tensor for name, tensor in tensors.items() if ".layers." not in name}
    num_layers = model.config.num_hidden_layers
    kept = args.draft_layers or range(1 + max(map(_layer_of, layers)))
    for name, which, state in (("target", range(num_layers), tensors), ("draft", kept, outer | layers)):
        types = settings.get("layer_types")
        config = type(model.config).from_dict(
            settings
            | {"num_hidden_layers": len(which)}
            | ({"layer_types": [types[layer] for layer in which]} if types else {})
        )
        with torch.device("meta"):
            part = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        part.load_state_dict({key: tensor.float() for key, tensor in state.items()}, assign=True)
        part.generation_config.eos_token_id = config.eos_token_id
        part.save_pretrained(args.out / name)
        tokenizer.save_pretrained(args.out / name)


def _layers(tensors: dict[str, Any], which: list[int]) -> dict[str, Any]:
    """The tensors of these layers, numbered from 0."""
    found = {}
    for name, tensor in tensors.items():
        if ".layers." in name and _layer_of(name) in which:
            found[name.replace(f".{_layer_of(name)}.", f".{which.index(_layer_of(name))}.", 1)] = tensor
    return found


def _layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, metavar="GGUF")
    parser.add_argument("out", type=Path, metavar="OUT")
    draft = parser.add_mutually_exclusive_group(required=True)
    draft.add_argument("--draft-layers", type=int, nargs="+", metavar="N", help="layers of the target, from 0")
    draft.add_argument("--draft-tensors", type=Path, metavar="FILE", help="safetensors with all layers of the draft")
    parser.add_argument("--extra-token", metavar="TOKEN")
    parser.add_argument("--libraries", type=Path, metavar="DIR")
    return parser.parse_args()


if __name__ == "__main__":
    main()
