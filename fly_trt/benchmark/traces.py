"""How the tokens of a benchmark came to be, as lines for fly-inspect: of each prompt by each mode."""

import json
from collections.abc import Iterator

from fly_trt.benchmark.measure import Benchmark
from fly_trt.inspection.document import new_document
from fly_trt.inspection.records import request_record
from fly_trt.text.token_text import TokenReader


def trace_lines(benchmark: Benchmark) -> Iterator[str]:
    """A document a line, prompt by prompt, so that what was made of the same prompt stands together."""
    reader = TokenReader(benchmark.engines.tokenizer)
    for number in range(len(benchmark.prompts)):
        for mode, outputs in benchmark.traced.items():
            (completion,) = outputs[number].outputs
            name, group = f"prompt {number + 1}, {mode}", f"prompt {number + 1}"
            record = request_record(reader, outputs[number], completion, source="fly-bench", name=name, group=group)
            yield json.dumps(new_document([record])) + "\n"
