"""What `tensorrt_llm.bindings.executor` is told and answers, without TensorRT-LLM: settings, requests, results.

Names, keywords and their order are those of cpp/tensorrt_llm/nanobind/executor/{request,executorConfig,bindings}.cpp;
simulated_executor.py says of which versions, and has what computes them. Unknown or missing keywords are TypeErrors.
"""

import enum
import types
from typing import Any

import numpy as np

ModelType = enum.Enum("ModelType", ["DECODER_ONLY", "ENCODER_ONLY", "ENCODER_DECODER"])
CommunicationType = enum.Enum("CommunicationType", ["MPI"])
CommunicationMode = enum.Enum("CommunicationMode", ["LEADER", "ORCHESTRATOR"])
FinishReason = enum.Enum(
    "FinishReason", ["NOT_FINISHED", "END_ID", "STOP_WORDS", "LENGTH", "TIMED_OUT", "CANCELLED"], start=0
)


def check_all(is_right: bool, what: str) -> None:
    """TLLM_CHECK, as Python sees it."""
    if not is_right:
        raise RuntimeError(f"[TensorRT-LLM][ERROR] Assertion failed: {what}")


class SamplingConfig:
    """nanobind/executor/request.cpp; the checks are cpp/tensorrt_llm/executor/samplingConfig.cpp."""

    def __init__(
        self,
        beam_width: int = 1,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        top_p_min: float | None = None,
        top_p_reset_ids: int | None = None,
        top_p_decay: float | None = None,
        seed: int | None = None,
        temperature: float | None = None,
        min_tokens: int | None = None,
        beam_search_diversity_rate: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        length_penalty: float | None = None,
        early_stopping: int | None = None,
        no_repeat_ngram_size: int | None = None,
        num_return_sequences: int | None = None,
        min_p: float | None = None,
        beam_width_array: list[int] | None = None,
    ) -> None:
        check_all(beam_width == 1, "one beam")
        check_all(top_k is None or top_k >= 0, "topK >= 0")
        check_all(top_p is None or 0 < top_p <= 1, "0 < topP <= 1")
        check_all(temperature is None or temperature >= 0, "temperature >= 0")
        check_all(min_p is None or 0 <= min_p <= 1, "0 <= minP <= 1")
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 1 << 64):
            raise TypeError("seed: an unsigned number of 64 bits")
        self.top_k, self.top_p, self.temperature, self.min_p, self.seed = top_k, top_p, temperature, min_p, seed

    def sample(self, logits: np.ndarray, random_numbers: np.random.Generator) -> int:
        if self.top_k == 1 or (not self.top_k and not self.top_p):
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / (self.temperature or 1.0)
        probabilities = np.exp(scaled - scaled.max())
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        kept = order[: self.top_k] if self.top_k else order
        before = np.cumsum(probabilities[kept]) - probabilities[kept]
        kept = kept[before < (self.top_p or 1.0)]
        kept = kept[probabilities[kept] >= (self.min_p or 0.0) * probabilities.max()]
        left = probabilities[kept] / probabilities[kept].sum()
        return int(kept[min(np.searchsorted(np.cumsum(left), random_numbers.random(), "right"), len(kept) - 1)])


class OutputConfig:
    """nanobind/executor/request.cpp."""

    def __init__(
        self,
        return_log_probs: bool = False,
        return_context_logits: bool = False,
        return_generation_logits: bool = False,
        exclude_input_from_output: bool = False,
        return_encoder_output: bool = False,
        return_perf_metrics: bool = False,
        additional_model_outputs: list[Any] | None = None,
    ) -> None:
        unused = return_log_probs, return_context_logits, return_generation_logits, additional_model_outputs
        assert not any(unused), "not simulated"
        self.exclude_input_from_output = exclude_input_from_output
        self.return_perf_metrics = return_perf_metrics


class ExternalDraftTokensConfig:
    """nanobind/executor/request.cpp."""

    def __init__(
        self,
        tokens: list[int],
        logits: Any = None,
        acceptance_threshold: float | None = None,
        fast_logits: bool | None = None,
    ) -> None:
        _check_tokens(tokens)
        check_all(len(tokens) > 0, "!mTokens.empty()")
        assert (logits, acceptance_threshold, fast_logits) == (None, None, None), "not simulated"
        self.tokens = tokens


class Request:
    """nanobind/executor/request.cpp: the keywords that are known there; those that are not UNUSED are computed."""

    UNUSED = frozenset(
        """pad_id position_ids bad_words stop_words embedding_bias prompt_tuning_config multimodal_input
        multimodal_embedding mrope_config lora_config lookahead_config kv_cache_retention_config
        logits_post_processor_name logits_post_processor encoder_input_token_ids client_id return_all_generated_tokens
        priority type context_phase_params encoder_input_features encoder_output_length cross_attention_mask
        num_return_sequences eagle_config skip_cross_attn_blocks guided_decoding_params language_adapter_uid
        allotted_time_ms""".split()  # noqa: SIM905
    )

    def __init__(
        self,
        input_token_ids: list[int],
        max_tokens: int,
        *,
        streaming: bool = False,
        sampling_config: SamplingConfig | None = None,
        output_config: OutputConfig | None = None,
        end_id: int | None = None,
        external_draft_tokens_config: ExternalDraftTokensConfig | None = None,
        **others: Any,
    ) -> None:
        assert not others.keys() & self.UNUSED, f"{sorted(others)}: not simulated"
        if others:
            raise TypeError(f"__init__(): incompatible function arguments: {sorted(others)}")
        _check_tokens(input_token_ids)
        check_all(len(input_token_ids) > 0, "!mInputTokenIds.empty()")
        check_all(isinstance(max_tokens, int) and max_tokens > 0, "mMaxNewTokens > 0")
        self.input_token_ids = input_token_ids
        self.max_tokens = max_tokens
        self.streaming = streaming
        self.sampling_config = sampling_config or SamplingConfig()
        self.output_config = output_config or OutputConfig()
        self.end_id = end_id
        self.external_draft_tokens_config = external_draft_tokens_config


def _check_tokens(tokens: Any) -> None:
    if not (isinstance(tokens, list) and all(type(token) is int for token in tokens)):
        raise TypeError("incompatible function arguments: a list of int")


class KvCacheConfig:
    """nanobind/executor/executorConfig.cpp."""

    def __init__(
        self,
        enable_block_reuse: bool = True,
        max_tokens: int | None = None,
        max_attention_window: list[int] | None = None,
        sink_token_length: int | None = None,
        free_gpu_memory_fraction: float | None = None,
        host_cache_size: int | None = None,
        onboard_blocks: bool = True,
        cross_kv_cache_fraction: float | None = None,
        secondary_offload_min_priority: int | None = None,
        event_buffer_max_size: int = 0,
        *,
        enable_partial_reuse: bool = True,
        copy_on_partial_reuse: bool = True,
        use_uvm: bool = False,
        runtime_defaults: Any = None,
    ) -> None:
        check_all(free_gpu_memory_fraction is None or 0 < free_gpu_memory_fraction < 1, "a fraction")
        self.enable_block_reuse, self.max_tokens = enable_block_reuse, max_tokens


class OrchestratorConfig:
    """nanobind/executor/executorConfig.cpp."""

    def __init__(
        self,
        is_orchestrator: bool = True,
        worker_executable_path: str = "",
        orch_leader_comm: Any = None,
        spawn_processes: bool = True,
    ) -> None:
        self.is_orchestrator, self.spawn_processes = is_orchestrator, spawn_processes
        self.worker_executable_path = worker_executable_path


class ParallelConfig:
    """nanobind/executor/executorConfig.cpp."""

    def __init__(
        self,
        communication_type: CommunicationType = CommunicationType.MPI,
        communication_mode: CommunicationMode = CommunicationMode.LEADER,
        device_ids: list[int] | None = None,
        participant_ids: list[int] | None = None,
        orchestrator_config: OrchestratorConfig | None = None,
        num_nodes: int | None = None,
    ) -> None:
        self.communication_mode, self.device_ids = communication_mode, device_ids
        self.participant_ids, self.orchestrator_config = participant_ids, orchestrator_config


class ExecutorConfig:
    """nanobind/executor/executorConfig.cpp."""

    def __init__(
        self,
        max_beam_width: int = 1,
        scheduler_config: Any = None,
        kv_cache_config: KvCacheConfig | None = None,
        enable_chunked_context: bool = False,
        normalize_log_probs: bool = True,
        iter_stats_max_iterations: int = 1000,
        request_stats_max_iterations: int = 0,
        batching_type: Any = None,
        max_batch_size: int | None = None,
        max_num_tokens: int | None = None,
        parallel_config: ParallelConfig | None = None,
    ) -> None:
        assert (scheduler_config, batching_type, enable_chunked_context) == (None, None, False), "not simulated"
        self.kv_cache_config = kv_cache_config or KvCacheConfig()
        self.iter_stats_max_iterations = iter_stats_max_iterations
        self.max_batch_size, self.parallel_config = max_batch_size, parallel_config


class Result(types.SimpleNamespace):
    """nanobind/executor/request.cpp; what was not asked for is None, as its optional fields are."""


class Response:
    """nanobind/executor/request.cpp; the other half of it cannot be had."""

    def __init__(self, request_id: int, *, result: Result | None = None, error_msg: str | None = None) -> None:
        self.request_id = request_id
        self.client_id = None
        self._result, self._error = result, error_msg

    def has_error(self) -> bool:
        return self._error is not None

    @property
    def error_msg(self) -> str:
        check_all(self._error is not None, "hasError()")
        return str(self._error)

    @property
    def result(self) -> Result:
        check_all(self._error is None, "!hasError()")
        assert self._result is not None
        return self._result
