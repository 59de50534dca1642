"""What quantisation costs in accuracy: the perplexity of engines and of their checkpoint on a text.

usage: tools/perplexity.py TEXT --checkpoint CKPT [--engine DIR ...] [--weight-only] [--num-tokens 8192]
                           [--window 512] [--stride 256] [--json]

The text, a file in UTF-8, is read as one sequence of tokens, of which the first --num-tokens count. They are predicted
in windows of --window tokens that move by --stride, each after the tokenizer's own first token where it has one; every
token counts once, in the first window that has it, so that it has at least window - stride tokens before it (the first
window apart). Perplexity is exp of the mean negative log probability, in nats a token.

Each has its standard error, with windows as what was drawn: the tokens of one have much in common. Of several engines
each one but the first has its difference to the first, window by window, and the standard error of that, which is far
smaller, for what makes a window hard is hard for all.

The checkpoint runs in transformers in float32, with --weight-only also with 8-bit weights and float32 activations: each
row of each matrix, embeddings included, is rounded to 256 levels between its smallest and its largest value, which is
what weight-only int8 means in OpenVINO. Engines run as they were built; they must be built with a --max-seq-len above
the window.

examples:
  python -c "from pydoc_data.topics import topics; print(*topics.values(), sep='\\n\\n')" > python.txt
  tools/perplexity.py python.txt --checkpoint models/smollm2/target --engine engines/smollm2-int8 --weight-only
  tools/perplexity.py texts.txt --checkpoint models/smollm2/target --engine engines/before engines/after --stride 512
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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


class Estimate(NamedTuple):
    """A mean over tokens and its standard error, NaN where there is one window only."""

    value: float
    error: float


@dataclass(frozen=True)
class Losses:
    """Of one model, by window: the negative log probabilities of its tokens that count, summed up, in nats; and how
    many these are."""

    sums: list[float]
    counts: list[int]

    def mean(self) -> Estimate:
        """Of a token, in nats. The error is that of a ratio of sums over windows that were drawn independently."""
        value, count = math.fsum(self.sums) / sum(self.counts), len(self.sums)
        squares = math.fsum((loss - value * size) ** 2 for loss, size in zip(self.sums, self.counts, strict=True))
        error = math.sqrt(squares * count / (count - 1)) / sum(self.counts) if count > 1 else math.nan
        return Estimate(value, error)

    def perplexity(self) -> Estimate:
        value, error = self.mean()
        return Estimate(math.exp(value), math.exp(value) * error)

    def difference(self, other: "Losses") -> Estimate:
        """By how much the perplexity is above the other one's on the same windows, in percent of it."""
        pairs = zip(self.sums, other.sums, strict=True)
        value, error = Losses([own - others for own, others in pairs], self.counts).mean()
        return Estimate(100 * math.expm1(value), 100 * math.exp(value) * error)


def read(model: Model, parts: list[Window], say: Callable[[str], None]) -> Losses:
    """Raises FlyError for log probabilities that are not numbers."""
    losses = Losses([], [])
    for number, part in enumerate(parts, start=1):
        losses.sums.append(-math.fsum(model(part.tokens)[-part.num_new :]))
        losses.counts.append(part.num_new)
        if not math.isfinite(losses.sums[-1]):
            raise FlyError("the model's log probabilities are not numbers: check its weights, or another --dtype")
        say(f"  {number} of {len(parts)} windows, perplexity {losses.perplexity().value:.2f}")
    return losses


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


def measure(args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Losses]:
    """By name, the checkpoint and then every engine, on the same windows."""
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
        found[name] = read(transformers_model(args.checkpoint, weight_only=weight_only), parts, say)
    for engine in args.engine:
        say(str(engine))
        with LLM(engine, max_batch_size=1, speculative_config={"method": None}) as llm:
            found[str(engine)] = read(engine_model(llm), parts, say)
    return found


def as_record(args: argparse.Namespace, found: dict[str, Losses]) -> dict[str, Any]:
    """Of what `measure` found; a standard error that is not known is None."""
    first = str(args.engine[0]) if args.engine else None
    models = []
    for name, losses in found.items():
        model = {"name": name, **_numbers("perplexity", losses.perplexity())}
        if first is not None and name in map(str, args.engine[1:]) and name != first:
            model |= _numbers("percent_above_first_engine", losses.difference(found[first]))
        models.append(model)
    counts = next(iter(found.values())).counts
    return {"num_tokens": sum(counts), "num_windows": len(counts), "models": models}


def _numbers(name: str, estimate: Estimate) -> dict[str, Any]:
    return {name: estimate.value, f"{name}_error": None if math.isnan(estimate.error) else estimate.error}


def as_lines(record: dict[str, Any]) -> Iterator[str]:
    yield f"{record['num_tokens']:,} tokens in {record['num_windows']} windows; +- is a standard error"
    for model in record["models"]:
        line = f"{model['perplexity']:8.3f}{_plus_minus(model['perplexity_error'], '.3f'):10}  {model['name']}"
        if (percent := model.get("percent_above_first_engine")) is not None:
            error = _plus_minus(model["percent_above_first_engine_error"], ".2f")
            line += f": {percent:+.2f} %{error}{' %' * bool(error)} to the first engine"
        yield line


def _plus_minus(error: float | None, form: str) -> str:
    return "" if error is None else f" +- {error:{form}}"


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
        print(json.dumps(as_record(args, found), indent=2))
    else:
        print(*as_lines(as_record(args, found)), sep="\n")


if __name__ == "__main__":
    main()
