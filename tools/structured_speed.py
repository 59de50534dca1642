"""What structured output costs and brings: tokens/s with a grammar and without, with forced tokens as drafts or not.

usage: tools/structured_speed.py ENGINE_DIR [--in-flight 1,8] [--rounds 3] [--max-tokens 160] [--method multi_level]

The same prompts are answered freely, in JSON by a schema, and in JSON by the schema where what the grammar forces is
not drafted; with drafts of --method, and plainly, without any. Modes take turns round by round; figures are medians
with their range. `tokens / step` counts the target's steps of a request: each brings one token that was not drafted.
All modes are exact, so that the answers in JSON are the same ones: the program checks that.
"""

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from fly_trt import LLM, AcceptanceParams, RequestOutput, SamplingParams
from fly_trt.grammar import GrammarMatcher, StructuredOutputs
from fly_trt.tokens import NO_TOKENS, IntArray


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


_SHORT = {"type": "string", "maxLength": 24}
_CITIES = {"enum": ["Berlin", "Lisbon", "Nairobi", "Osaka", "Toronto"]}
_ADDRESS = _object(street_name=_SHORT, city=_CITIES, postal_code={"type": "string", "pattern": "^[0-9]{5}$"})
_LINE = _object(
    product_name=_SHORT,
    quantity={"type": "integer", "minimum": 1, "maximum": 99},
    unit_price_in_cents={"type": "integer", "minimum": 0, "maximum": 99_999},
)
SCHEMAS: dict[str, dict[str, Any]] = {
    "Write down a customer of a bookshop as JSON.": _object(
        first_name=_SHORT, last_name=_SHORT, date_of_birth={"type": "string", "format": "date"}, address=_ADDRESS
    ),
    "Write down an order of two products as JSON.": _object(
        order_number={"type": "integer", "minimum": 1, "maximum": 99_999},
        order_lines={"type": "array", "items": _LINE, "minItems": 2, "maxItems": 2},
        is_paid={"type": "boolean"},
        shipping_method={"enum": ["standard", "express", "pickup"]},
    ),
    "What is the weather like in Lisbon? Call the function.": _object(
        name={"const": "get_current_weather"},
        arguments=_object(city=_CITIES, unit={"enum": ["celsius", "fahrenheit"]}, include_forecast={"type": "boolean"}),
    ),
    "Report the temperature of a freezer as an event.": _object(
        schema={"const": "iglu:com.example/temperature_reading/jsonschema/1-0-0"},
        data=_object(
            sensor_identifier={"type": "string", "pattern": "^[A-F0-9]{8}$"},
            temperature_in_celsius={"type": "integer", "minimum": -80, "maximum": 60},
            battery_level_in_percent={"type": "integer", "minimum": 0, "maximum": 100},
            alarm={"enum": ["none", "door_open", "power_failure"]},
        ),
    ),
}  # fmt: skip
NUM_REQUESTS = 8
EXACT = AcceptanceParams(acceptance="exact")


@dataclass
class Mode:
    """One line of the table, and what its rounds came to."""

    name: str
    llm: LLM
    has_grammar: bool
    drafts_forced: bool = True
    speeds: list[float] = field(default_factory=list)
    outputs: list[RequestOutput] = field(default_factory=list)

    def run(self, in_flight: int, max_tokens: int) -> None:
        prompts = [*SCHEMAS] * (NUM_REQUESTS // len(SCHEMAS))
        params = [self._params(prompt, max_tokens) for prompt in prompts]
        with nullcontext() if self.drafts_forced else without_forced_drafts():
            started = time.perf_counter()
            self.outputs = []
            for first in range(0, len(prompts), in_flight):
                some = slice(first, first + in_flight)
                self.outputs += self.llm.generate(prompts[some], params[some], use_tqdm=False)
            seconds = time.perf_counter() - started
        self.speeds.append(sum(output.metrics.num_output_tokens for output in self.outputs) / seconds)

    def row(self) -> list[str]:
        total = [output.metrics for output in self.outputs]
        num_tokens = sum(metrics.num_output_tokens for metrics in total)
        num_steps = num_tokens - sum(metrics.num_accepted_tokens for metrics in total)
        num_forced = sum(metrics.num_accepted_tokens_by_source.get("grammar", 0) for metrics in total)
        speed = f"{statistics.median(self.speeds):.1f} ({min(self.speeds):.1f} to {max(self.speeds):.1f})"
        return [self.name, speed, f"{num_tokens / num_steps:.2f}", f"{100 * num_forced / num_tokens:.0f}"]

    def _params(self, prompt: str, max_tokens: int) -> SamplingParams:
        if not self.has_grammar:
            return SamplingParams(max_tokens=max_tokens, acceptance=EXACT, ignore_eos=True)
        wanted = StructuredOutputs(json=SCHEMAS[prompt], disable_any_whitespace=True)
        return SamplingParams(max_tokens=max_tokens, acceptance=EXACT, structured_outputs=wanted)


@contextmanager
def without_forced_drafts() -> Iterator[None]:
    """Grammars say only what is allowed."""
    forced, follow = GrammarMatcher.forced, GrammarMatcher.follow

    def silent_follow(grammar: GrammarMatcher, *tokens: IntArray) -> tuple[int, IntArray]:
        return follow(grammar, *tokens)[0], NO_TOKENS

    GrammarMatcher.forced = lambda grammar, output: NO_TOKENS  # type: ignore[method-assign]
    GrammarMatcher.follow = silent_follow  # type: ignore[method-assign]
    try:
        yield
    finally:
        GrammarMatcher.forced, GrammarMatcher.follow = forced, follow  # type: ignore[method-assign]


def check_same(modes: Sequence[Mode]) -> None:
    """Raises where two modes with a grammar differ in a token."""
    answers = {
        mode.name: [output.outputs[0].token_ids for output in mode.outputs] for mode in modes if mode.has_grammar
    }
    if any(tokens != next(iter(answers.values())) for tokens in answers.values()):
        raise SystemExit(f"the answers differ between {', '.join(answers)}: they are exact and must not")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine_dir")
    parser.add_argument("--in-flight", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=160)
    parser.add_argument("--method", default="multi_level")
    args = parser.parse_args(arguments)
    speculative, plain = ({"method": method} for method in (args.method, None))
    with (
        LLM(args.engine_dir, speculative_config=speculative) as drafting,
        LLM(args.engine_dir, speculative_config=plain) as decoding,
    ):
        for in_flight in map(int, args.in_flight.split(",")):
            modes = [
                Mode("plain, free", decoding, has_grammar=False),
                Mode("plain, JSON", decoding, has_grammar=True),
                Mode(f"{args.method}, free", drafting, has_grammar=False),
                Mode(f"{args.method}, JSON, nothing forced", drafting, has_grammar=True, drafts_forced=False),
                Mode(f"{args.method}, JSON", drafting, has_grammar=True),
            ]
            for mode in modes:
                mode.run(in_flight, args.max_tokens)  # grammars are compiled, shapes bound, costs measured
                mode.speeds.clear()
            for _ in range(args.rounds):
                for mode in modes:
                    mode.run(in_flight, args.max_tokens)
            check_same(modes)
            print(f"{in_flight} in flight")
            head = ["", "tokens/s", "tokens / step", "forced, %"]
            for row in [head, *(mode.row() for mode in modes)]:
                print(f"  {row[0]:50} {row[1]:28} {row[2]:>14} {row[3]:>10}", flush=True)


if __name__ == "__main__":
    main()
