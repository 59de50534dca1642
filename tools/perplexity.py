"""What quantisation costs in accuracy: the perplexity of engines and of their checkpoint on a text.

usage: tools/perplexity.py TEXT --checkpoint CKPT [--engine DIR ...] [--weight-only] [--num-tokens 8192]
                           [--window 512] [--stride 256] [--json]

The text, a file in UTF-8, is read as one sequence of tokens, of which the first --num-tokens count. They are predicted
in windows of --window tokens that move by --stride, each after the tokenizer's own first token where it has one; every
token counts once, in the first window that has it, so that it has at least window - stride tokens before it (the first
window apart). Perplexity is exp of the mean negative log probability, in nats a token.

The checkpoint runs in transformers in float32, with --weight-only also with 8-bit weights and float32 activations: each
row of each matrix, embeddings included, is rounded to 256 levels between its smallest and its largest value, which is
what weight-only int8 means in OpenVINO. Engines run as they were built; they must be built with a --max-seq-len above
the window.

examples:
  python -c "from pydoc_data.topics import topics; print(*topics.values(), sep='\\n\\n')" > python.txt
  tools/perplexity.py python.txt --checkpoint models/smollm2/target --engine engines/smollm2-int8 --weight-only
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fly_trt import LLM, ConfigError, FlyError, SamplingParams

# float [len(tokens) - 1]: the log probability of each token but the first, given those before it.
Model = Callable[[list[int]], list[float]]


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads at once; the last `num_new` of them count."""

    tokens: list[int]
    num_new: int


def windows(tokens: list[int], size: int, stride: int, prefix: list[int]) -> Iterator[Window]:
    """Every token counts once, but for the first one where there is no prefix, before which there is nothing."""
    counted = 0 if prefix else 1
    for start in range(0, len(tokens), stride):
        end = min(start + size, len(tokens))
        if end > counted:
            yield Window([*prefix, *tokens[start:end]], end - counted)
            counted = end


def perplexity(model: Model, parts: list[Window], say: Callable[[str], None]) -> float:
    """Of the tokens of all windows that count. Raises FlyError for log probabilities that are not numbers."""
    total, count = 0.0, 0
    for number, part in enumerate(parts, start=1):
        total -= math.fsum(model(part.tokens)[-part.num_new :])
        count += part.num_new
        say(f"  {number} of {len(parts)} windows, perplexity {math.exp(total / count):.2f}")
    if not math.isfinite(total):
        raise FlyError("the model's log probabilities are not numbers: check its weights, or another --dtype")
    return math.exp(total / count)


def transformers_model(checkpoint: Path, *, weight_only: bool) -> Model:
    """The checkpoint in float32, its weights in 8 bits with `weight_only`."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    if weight_only:
        with torch.no_grad():
            for parameter in model.parameters():  # what is tied is one parameter
                if parameter.ndim == 2:
                    parameter.copy_(round_rows(parameter))

    def logprobs(tokens: list[int]) -> list[float]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            return (-torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")).tolist()

    return logprobs


def round_rows(weight: Any) -> Any:
    """weight [N, K] (torch) with each row rounded to 256 levels from its smallest to its largest value and zero."""
    low = weight.amin(dim=1, keepdim=True).clamp(max=0)
    step = ((weight.amax(dim=1, keepdim=True).clamp(min=0) - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return (((weight / step).round() + zero).clamp(0, 255) - zero) * step


def engine_model(llm: LLM) -> Model:
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)

    def logprobs(tokens: list[int]) -> list[float]:
        found = llm.generate({"prompt_token_ids": tokens}, params)[0].prompt_logprobs
        assert found is not None
        return [entry[token].logprob for token, entry in zip(tokens[1:], found[1:], strict=True) if entry is not None]

    return logprobs


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, float]:
    """By name, the perplexity of the checkpoint and of every engine."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.checkpoint)
    prefix = tokenizer("")["input_ids"]
    text = args.text.read_text(encoding="utf-8-sig")
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"][: args.num_tokens]
    parts = list(windows(tokens, args.window, args.stride, prefix))
    if not parts:
        raise ConfigError(f"{args.text}: {len(tokens)} tokens, expected at least 2: give a longer text")
    say(f"{args.text}: {len(tokens)} tokens, {len(parts)} windows of {args.window} that move by {args.stride}")
    found = {}
    for weight_only in (False, True) if args.weight_only else (False,):
        name = f"{args.checkpoint}, {'8-bit weights' if weight_only else 'float32'}"
        say(name)
        found[name] = perplexity(transformers_model(args.checkpoint, weight_only=weight_only), parts, say)
    for engine in args.engine:
        say(str(engine))
        with LLM(engine, max_batch_size=1, speculative_config={"method": None}) as llm:
            found[str(engine)] = perplexity(engine_model(llm), parts, say)
    return found


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="CKPT", help="whose tokenizer is used")
    parser.add_argument("--engine", type=Path, nargs="+", default=[], metavar="DIR")
    parser.add_argument("--weight-only", action="store_true")
    parser.add_argument("--num-tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name, least in (("num_tokens", 2), ("window", 2), ("stride", 1)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least {least}")
    if args.stride > args.window:
        parser.error(f"--stride {args.stride}: expected at most --window {args.window}, or tokens are left out")
    if not (args.checkpoint / "config.json").is_file():
        parser.error(f"{args.checkpoint}: has no config.json: expected the folder of a checkpoint")
    return args


def main() -> None:
    args = _parse()
    try:
        found = measure(args, lambda line: print(line, file=sys.stderr, flush=True))
    except (FlyError, OSError, UnicodeDecodeError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{value:8.3f}  {name}")


if __name__ == "__main__":
    main()
