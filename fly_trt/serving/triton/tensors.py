"""The tensors that clients send and get: names, types and shapes, declared once for config.pbtxt and for the model.

Names and shapes are those of TensorRT-LLM's Triton repository (its ensemble and tensorrt_llm_bls models), so that its
clients work; min_length and random_seed are what older releases of it called min_tokens and seed. The settings of
acceptance and drafting have the names that they have in Python.
"""

from dataclasses import dataclass

from fly_trt.params import request_settings


@dataclass(frozen=True)
class TensorSpec:
    """`dims` without the batch dimension, which is always 1; -1 is any length."""

    name: str
    data_type: str
    dims: tuple[int, ...] = (1,)

    @property
    def is_list(self) -> bool:
        return self.dims != (1,)


TYPES = {str: "TYPE_STRING", float: "TYPE_FP32", int: "TYPE_INT32"}
INPUTS = (
    TensorSpec("text_input", "TYPE_STRING"),
    TensorSpec("input_ids", "TYPE_INT32", (-1,)),
    TensorSpec("max_tokens", "TYPE_INT32"),
    TensorSpec("min_tokens", "TYPE_INT32"),
    TensorSpec("min_length", "TYPE_INT32"),
    TensorSpec("stream", "TYPE_BOOL"),
    TensorSpec("stop_words", "TYPE_STRING", (-1,)),
    TensorSpec("bad_words", "TYPE_STRING", (-1,)),
    TensorSpec("end_id", "TYPE_INT32"),
    TensorSpec("pad_id", "TYPE_INT32"),
    TensorSpec("temperature", "TYPE_FP32"),
    TensorSpec("top_k", "TYPE_INT32"),
    TensorSpec("top_p", "TYPE_FP32"),
    TensorSpec("min_p", "TYPE_FP32"),
    TensorSpec("seed", "TYPE_UINT64"),
    TensorSpec("random_seed", "TYPE_UINT64"),
    TensorSpec("repetition_penalty", "TYPE_FP32"),
    TensorSpec("presence_penalty", "TYPE_FP32"),
    TensorSpec("frequency_penalty", "TYPE_FP32"),
    TensorSpec("beam_width", "TYPE_INT32"),
    TensorSpec("num_return_sequences", "TYPE_INT32"),
    TensorSpec("return_log_probs", "TYPE_BOOL"),
    TensorSpec("exclude_input_in_output", "TYPE_BOOL"),
    TensorSpec("num_draft_tokens", "TYPE_INT32"),
    TensorSpec("guided_decoding_guide_type", "TYPE_STRING"),
    TensorSpec("guided_decoding_guide", "TYPE_STRING"),
    *(
        TensorSpec(name, TYPES[declared.kind], (-1,) if declared.is_list else (1,))
        for name, declared in request_settings().items()
    ),
)
"""All are optional to the server: a prompt is text_input or input_ids."""

OUTPUTS = (
    TensorSpec("text_output", "TYPE_STRING", (-1,)),
    TensorSpec("output_ids", "TYPE_INT32", (-1, -1)),
    TensorSpec("sequence_length", "TYPE_INT32", (-1,)),
    TensorSpec("cum_log_probs", "TYPE_FP32", (-1,)),
    TensorSpec("output_log_probs", "TYPE_FP32", (-1, -1)),
    TensorSpec("finish_reason", "TYPE_STRING", (-1,)),
    TensorSpec("num_input_tokens", "TYPE_INT32"),
    TensorSpec("num_output_tokens", "TYPE_INT32"),
    TensorSpec("acceptance_rate", "TYPE_FP32"),
    TensorSpec("total_draft_tokens", "TYPE_INT32"),
    TensorSpec("total_accepted_draft_tokens", "TYPE_INT32"),
    TensorSpec("total_loosened_tokens", "TYPE_INT32"),
    TensorSpec("exact_because", "TYPE_STRING", (-1,)),
    TensorSpec("total_saved_tokens", "TYPE_INT32"),
    TensorSpec("total_refused_loosenings", "TYPE_INT32"),
    TensorSpec("guards", "TYPE_STRING"),
)
