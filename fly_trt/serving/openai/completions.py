"""/v1/completions: prompts as text or tokens, completed."""

import time
from typing import Any

from fly_trt.params import RequestOutputKind, SamplingParams
from fly_trt.serving.openai.pool import PooledEngine
from fly_trt.serving.openai.protocol import CompletionRequest


async def complete(llm: PooledEngine, body: CompletionRequest, request_id: str, model: str) -> dict[str, Any]:
    params = SamplingParams(
        max_tokens=body.max_tokens or 16,
        temperature=1.0 if body.temperature is None else body.temperature,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    async for output in llm.generate(body.prompt, params, request_id):
        completion = output.outputs[0]
    return {
        "id": request_id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "text": completion.text, "finish_reason": completion.finish_reason, "logprobs": None}],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": output.metrics.num_output_tokens,
            "total_tokens": len(output.prompt_token_ids) + output.metrics.num_output_tokens,
        },
    }
