"""How the tokens of an answer came to be: saved as one JSON document, and shown as one page that needs nothing else.

outputs = llm.generate(prompts, SamplingParams(speculation_trace=True))
save_trace(outputs, "trace.json", llm.tokenizer)
write_page(read_traces("trace.json"), "trace.html")
"""

from fly_trt.inspection.page import write_page
from fly_trt.inspection.records import save_trace
from fly_trt.inspection.sources import read_traces

__all__ = ["read_traces", "save_trace", "write_page"]
