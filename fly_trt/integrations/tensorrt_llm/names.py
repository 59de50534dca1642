"""Every name, keyword and signature of TensorRT-LLM that is used here, and where it was read.

The code beside this table imports nothing that is not in it, and `tools/check_tensorrt_llm.py` holds it against a
source tree or an installed package: what a user's upgrade broke is then one command away. It knows text alone.
"""

from dataclasses import dataclass
from typing import Literal

# The module that has the base class of one-model workers, into which FLy is put, and that class's method.
INTERFACE = "tensorrt_llm._torch.speculative.interface"
WORKER = "SpecWorkerBase"
METHOD = "_sample_and_accept_draft_tokens_base"

Part = Literal["acceptance", "llm_api", "serve", "build", "executor", "plugin"]
Sureness = Literal["read", "unverified"]


@dataclass(frozen=True, slots=True)
class Name:
    """A function, class, field, attribute, enumerator or network tensor that `part` of the integration uses.

    file: its path in the source tree, also where an installed package has it elsewhere (bindings). name: dotted, as in
    "SpecWorkerBase._sample_tokens_for_batch"; "" is the file alone. parameters: those that are passed, by name, or with
    `is_whole` all that there are, in this order and with `self`. releases: where it must be: "1.2", "main" or both.
    read_at: the version, or commit, of the text that was read. sureness: "unverified" where no text of a release that
    needs it could be opened.
    """

    part: Part
    file: str
    name: str
    parameters: tuple[str, ...] = ()
    is_whole: bool = False
    releases: tuple[str, ...] = ("1.2", "main")
    read_at: str = ""
    sureness: Sureness = "read"


_INTERFACE_FILE = f"{INTERFACE.replace('.', '/')}.py"
# Two texts: of about January 2026, near 1.2.0, and of mid 2026, on the way to 1.3. Beside neither a version.py.
_NEAR_1_2 = "main, January 2026"
_NEAR_1_3 = "main, mid 2026"
_BOTH = f"{_NEAR_1_2}; {_NEAR_1_3}"
ACCEPTANCE: tuple[Name, ...] = (
    Name(
        "acceptance",
        _INTERFACE_FILE,
        f"{WORKER}.{METHOD}",
        ("self", "logits", "draft_tokens", "num_contexts", "batch_size", "spec_metadata"),
        is_whole=True,
        read_at=_BOTH,
    ),
    Name("acceptance", _INTERFACE_FILE, f"{WORKER}.force_num_accepted_tokens", read_at=_BOTH),
    Name("acceptance", _INTERFACE_FILE, "SpecMetadata.is_spec_dec_tree", read_at=_BOTH),
    Name("acceptance", _INTERFACE_FILE, "SpecMetadata.use_rejection_sampling", releases=("main",), read_at=_NEAR_1_3),
    Name("acceptance", "tensorrt_llm/version.py", "__version__", read_at="1.0.0rc4, 1.3.0rc20"),
)
# Texts without a version.py beside them, told apart by what they have: of the 1.2 line, October to December 2025, and
# of main in mid 2026.
_LLM_1_2 = "main, about November 2025"
_LLM_MAIN = "main, mid 2026"
_LLM_BOTH = f"{_LLM_1_2}; {_LLM_MAIN}"


def _llm(file: str, name: str, *parameters: str, read_at: str = _LLM_BOTH) -> Name:
    return Name("llm_api", f"tensorrt_llm/{file}", name, parameters, read_at=read_at)


def _llm_read_of_1_2(file: str, name: str, *parameters: str) -> tuple[Name, Name]:
    """Read in the 1.2 line alone."""
    path = f"tensorrt_llm/{file}"
    return (
        Name("llm_api", path, name, parameters, releases=("1.2",), read_at=_LLM_1_2),
        Name("llm_api", path, name, parameters, releases=("main",), sureness="unverified"),
    )


LLM_API: tuple[Name, ...] = (
    _llm("version.py", "__version__", read_at="1.0.0rc4, 1.3.0rc20"),
    _llm("llmapi/llm.py", "LLM", "model", "revision", "tensor_parallel_size", "dtype"),
    _llm("llmapi/llm.py", "LLM.generate_async", "inputs", "sampling_params", "streaming"),
    _llm("llmapi/llm.py", "LLM.shutdown"),
    _llm("llmapi/llm.py", "LLM._executor"),
    _llm("llmapi/llm_args.py", "update_llm_args_with_extra_dict", "llm_args", "llm_args_dict", "extra_llm_api_options"),
    _llm("llmapi/llm_args.py", "TorchLlmArgs", "stream_interval", "kv_cache_config", "speculative_config"),
    _llm("llmapi/llm_args.py", "TorchLlmArgs", "max_batch_size", "max_seq_len", "max_num_tokens"),
    _llm("llmapi/llm_args.py", "TorchLlmArgs", "gather_generation_logits"),
    _llm("llmapi/llm_args.py", "KvCacheConfig", "enable_block_reuse"),
    _llm("executor/utils.py", "RequestError"),
    *_llm_read_of_1_2(
        "sampling_params.py",
        "SamplingParams",
        *("max_tokens", "end_id", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "detokenize"),
        *("temperature", "top_k", "top_p"),
    ),
    *_llm_read_of_1_2("executor/executor.py", "GenerationExecutor.is_shutdown"),
    *_llm_read_of_1_2("executor/executor.py", "GenerationExecutor._error_queue"),
    *_llm_read_of_1_2("executor/result.py", "GenerationResult.__aiter__"),
    *_llm_read_of_1_2("executor/result.py", "GenerationResult.abort"),
    *_llm_read_of_1_2("executor/result.py", "GenerationResult.finished"),
    *_llm_read_of_1_2("executor/result.py", "GenerationResult.outputs"),
    *_llm_read_of_1_2("executor/result.py", "GenerationResult.cached_tokens"),
    *_llm_read_of_1_2("executor/result.py", "CompletionOutput.token_ids_diff"),
    *_llm_read_of_1_2("executor/result.py", "CompletionOutput.finish_reason"),
    *_llm_read_of_1_2("executor/result.py", "CompletionOutput.stop_reason"),
    *_llm_read_of_1_2("llmapi/utils.py", "enable_worker_single_process_for_tp1"),
)
# Keys of the YAML are fields of classes that forbid all others. Of 1.2 two texts were read, which lie around it.
_LLM_ARGS = "tensorrt_llm/llmapi/llm_args.py"
_READ_ARGS = "1.2: texts of about 2025-11 and 2026-02; main: commit 00043967"
_READ_MAIN_ARGS = "commit 00043967"


def _fields(owner: str, *names: str, releases: tuple[str, ...] = ("1.2", "main"), read_at: str = "") -> list[Name]:
    """Keys of the YAML that are fields of one class."""
    read_at = read_at or _READ_ARGS
    return [Name("serve", _LLM_ARGS, f"{owner}.{name}", releases=releases, read_at=read_at) for name in names]


SERVE: tuple[Name, ...] = (
    *_fields("BaseLlmArgs", "model", "revision", "dtype", "tensor_parallel_size", "kv_cache_config"),
    *_fields("BaseLlmArgs", "enable_chunked_prefill", releases=("main",), read_at=_READ_MAIN_ARGS),
    *_fields("BaseLlmArgs", "speculative_config", "max_batch_size", "max_seq_len", "max_num_tokens"),
    *_fields("TorchLlmArgs", "cuda_graph_config", "attn_backend"),
    *_fields("KvCacheConfig", "enable_block_reuse", "free_gpu_memory_fraction", "dtype"),
    *_fields("CudaGraphConfig", "max_batch_size", "enable_padding", releases=("1.2",), read_at="text of about 2025-11"),
    *_fields("BaseCudaGraphConfig", "max_batch_size", "enable_padding", releases=("main",), read_at=_READ_MAIN_ARGS),
    *_fields("DecodingBaseConfig", "max_draft_len"),
    # Main, and the later text around 1.2, take the older key as an alias.
    *_fields("DecodingBaseConfig", "speculative_model_dir", releases=("1.2",), read_at="text of about 2025-11"),
    *_fields("DecodingBaseConfig", "speculative_model", releases=("main",), read_at=_READ_MAIN_ARGS),
    *_fields("MTPDecodingConfig", "num_nextn_predict_layers", releases=("1.2",)),
    # Of decoding_type, whose values are in modes.py.
    *_fields("EagleDecodingConfig", "decoding_type"),
    *_fields("MTPDecodingConfig", "decoding_type"),
    *_fields("Eagle3DecodingConfig", "decoding_type", releases=("main",), read_at=_READ_MAIN_ARGS),
    *_fields("DraftTargetDecodingConfig", "decoding_type", releases=("main",), read_at=_READ_MAIN_ARGS),
    *_fields("PARDDecodingConfig", "decoding_type", releases=("main",), read_at=_READ_MAIN_ARGS),
    *_fields("DFlashDecodingConfig", "decoding_type", releases=("main",), read_at=_READ_MAIN_ARGS),
    *_fields("SADecodingConfig", "decoding_type", releases=("main",), read_at=_READ_MAIN_ARGS),
    # Its flag is --extra_llm_api_options, of which --config is a newer name.
    Name(
        "serve",
        "tensorrt_llm/commands/serve.py",
        "serve",
        ("model", "extra_llm_api_options"),
        read_at="commit 00209af1, between 1.2 and 1.3",
    ),
    # Reads the YAML that LLM_CONFIG_PATH names, where the path may be absolute, with `triton_config` in it.
    Name(
        "serve",
        "triton_backend/all_models/llmapi/tensorrt_llm/1/model.py",
        "get_model_config",
        ("filename",),
        read_at="commit 044a90d2",
    ),
)
# Texts around 1.2, since none of the release itself could be opened; all of this is gone from main.
_READ_BUILDER = "a text of 2025, after 1.0"


def _build(file: str, name: str, *parameters: str, read_at: str, sureness: Sureness = "read") -> Name:
    return Name("build", f"tensorrt_llm/{file}", name, parameters, False, ("1.2",), read_at, sureness)


BUILD: tuple[Name, ...] = (
    _build("builder.py", "build", "model", "build_config", read_at=_READ_BUILDER),
    _build(
        "builder.py",
        "BuildConfig",
        "max_input_len",
        "max_seq_len",
        "max_batch_size",
        "max_num_tokens",
        "max_beam_width",
        "max_draft_len",
        "speculative_decoding_mode",
        "gather_context_logits",
        "strongly_typed",
        "plugin_config",
        read_at=_READ_BUILDER,
    ),
    _build("builder.py", "Engine.save", "engine_dir", read_at="nv-auto-deploy, commit 47cb03ab"),
    _build("mapping.py", "Mapping", "world_size", "rank", "tp_size", read_at="its calls in llm_args.py, 2026-02"),
    _build("models/__init__.py", "MODEL_MAP", read_at="commit 02267d3d"),
    # Of every class in MODEL_MAP that is built; read for Llama, which is also Mistral's, Mixtral's and Granite's.
    _build(
        "models/llama/model.py",
        "LLaMAForCausalLM.from_hugging_face",
        "hf_model_or_dir",
        "dtype",
        "mapping",
        "quant_config",
        read_at="Ataraksia, commit a451bf93",
    ),
    _build("models/llama/model.py", "LLaMAForCausalLM.default_plugin_config", read_at="Ataraksia, commit a451bf93"),
    _build(
        "models/modeling_utils.py",
        "PretrainedConfig",
        "use_parallel_embedding",
        "embedding_sharding_dim",
        read_at=_READ_BUILDER,
    ),
    _build(
        "models/modeling_utils.py",
        "QuantConfig",
        "quant_algo",
        "kv_cache_quant_algo",
        "group_size",
        "has_zero_point",
        "pre_quant_scale",
        "exclude_modules",
        read_at=_READ_BUILDER,
    ),
    _build("models/modeling_utils.py", "SpeculativeDecodingMode.DRAFT_TOKENS_EXTERNAL", read_at=_READ_BUILDER),
    _build("quantization/mode.py", "QuantAlgo", read_at="imported in builder.py", sureness="unverified"),
    _build("models/modeling_utils.py", "DecoderModelForCausalLM.forward", read_at=_READ_BUILDER),
    _build("_common.py", "default_trtnet", read_at="commit 0fccc5b9"),
    _build("network.py", "Network.trt_network", read_at="commit 138f96d4"),
    _build("graph_rewriting.py", "Layer.TRT_LAYER_TYPE_TO_LAYER", read_at="commit 138f96d4, and a text before it"),
    _build("plugin/plugin.py", "PluginConfig.remove_input_padding", read_at="commit 035b99e0; " + _READ_BUILDER),
    _build("plugin/plugin.py", "PluginConfig.paged_kv_cache", read_at="commit 035b99e0; " + _READ_BUILDER),
    _build("plugin/plugin.py", "PluginConfig.use_paged_context_fmha", read_at="commit 035b99e0; " + _READ_BUILDER),
)
_BINDINGS = "cpp/tensorrt_llm/nanobind/executor"
_CPP_TESTS = "tests/unittest/bindings/test_executor_bindings.py"
# Text of about 1.1 (2025), whose keywords 1.2.0rc2's own tests of the bindings (_CPP_TESTS) use too.
_READ_REQUEST = "commit 008b2b8d"
_READ_EXECUTOR = "1.2.0rc5 (commit f0c873f5)"
_READ_LOOP = "1.2.0rc2 (commit b35ac1b6)"


def _executor(file: str, name: str, *parameters: str, read_at: str) -> Name:
    return Name("executor", f"{_BINDINGS}/{file}", name, parameters, releases=("1.2",), read_at=read_at)


def _text(file: str, name: str, read_at: str = _READ_LOOP) -> Name:
    return Name("executor", file, name, releases=("1.2",), read_at=read_at)


EXECUTOR: tuple[Name, ...] = (
    _executor("executor.cpp", "Executor", "model_path", "model_type", "executor_config", read_at=_READ_EXECUTOR),
    _executor("executor.cpp", "Executor.enqueue_requests", "requests", read_at=_READ_EXECUTOR),
    _executor("executor.cpp", "Executor.await_responses", "timeout", read_at=_READ_EXECUTOR),
    _executor("executor.cpp", "Executor.cancel_request", "id", read_at=_READ_EXECUTOR),
    _executor("executor.cpp", "Executor.get_latest_iteration_stats", read_at=_READ_EXECUTOR),
    _executor("executor.cpp", "Executor.shutdown", read_at=_READ_EXECUTOR),
    _executor("bindings.cpp", "ModelType.DECODER_ONLY", read_at="commit 01315fdb"),
    _executor("bindings.cpp", "CommunicationType.MPI", read_at="commit 01315fdb"),
    _executor("bindings.cpp", "CommunicationMode.ORCHESTRATOR", read_at="commit 01315fdb"),
    _executor("bindings.cpp", "IterationStats.kv_cache_stats", read_at="commit 01315fdb"),
    _executor("bindings.cpp", "KvCacheStats.max_num_blocks", read_at="commit 01315fdb"),
    _executor("bindings.cpp", "KvCacheStats.used_num_blocks", read_at="commit 01315fdb"),
    _executor("bindings.cpp", "KvCacheStats.tokens_per_block", read_at="commit 01315fdb"),
    _executor(
        "executorConfig.cpp",
        "ExecutorConfig",
        "max_beam_width",
        "kv_cache_config",
        "iter_stats_max_iterations",
        "max_batch_size",
        "parallel_config",
        read_at=_READ_REQUEST,
    ),
    _executor(
        "executorConfig.cpp",
        "KvCacheConfig",
        "enable_block_reuse",
        "max_tokens",
        "free_gpu_memory_fraction",
        read_at=_READ_REQUEST,
    ),
    _executor(
        "executorConfig.cpp",
        "ParallelConfig",
        "communication_type",
        "communication_mode",
        "device_ids",
        "orchestrator_config",
        read_at=_READ_REQUEST,
    ),
    _executor(
        "executorConfig.cpp",
        "OrchestratorConfig",
        "is_orchestrator",
        "worker_executable_path",
        "spawn_processes",
        read_at=_READ_REQUEST,
    ),
    _executor("request.cpp", "SamplingConfig", "top_k", "top_p", "seed", "temperature", "min_p", read_at=_READ_REQUEST),
    _executor("request.cpp", "OutputConfig", "exclude_input_from_output", "return_perf_metrics", read_at=_READ_REQUEST),
    _executor("request.cpp", "ExternalDraftTokensConfig", "tokens", read_at=_READ_REQUEST),
    _executor(
        "request.cpp",
        "Request",
        "input_token_ids",
        "max_tokens",
        "streaming",
        "sampling_config",
        "output_config",
        "external_draft_tokens_config",
        read_at=_READ_REQUEST,
    ),
    _executor("request.cpp", "Response.request_id", read_at=_READ_REQUEST),
    _executor("request.cpp", "Response.has_error", read_at=_READ_REQUEST),
    _executor("request.cpp", "Response.error_msg", read_at=_READ_REQUEST),
    _executor("request.cpp", "Response.result", read_at=_READ_REQUEST),
    _executor("request.cpp", "Result.is_final", read_at=_READ_REQUEST),
    _executor("request.cpp", "Result.output_token_ids", read_at=_READ_REQUEST),
    _executor("request.cpp", "Result.finish_reasons", read_at=_READ_REQUEST),
    _executor("request.cpp", "Result.request_perf_metrics", read_at=_READ_REQUEST),
    _executor("request.cpp", "RequestPerfMetrics.kv_cache_metrics", read_at=_READ_REQUEST),
    _executor("request.cpp", "KvCacheMetrics.num_reused_blocks", read_at=_READ_REQUEST),
    _executor("request.cpp", "FinishReason.CANCELLED", read_at=_READ_REQUEST),
    _executor("request.cpp", "FinishReason.TIMED_OUT", read_at=_READ_REQUEST),
    # What the loop counts on, beside names: the texts that say it.
    _text(_CPP_TESTS, ""),
    # A request with draft tokens ends after one step, and one stands iff it is the token sampled there.
    _text("cpp/tensorrt_llm/batch_manager/trtGptModelInflightBatching.cpp", "updateRequests"),
    _text(
        "cpp/tensorrt_llm/kernels/speculativeDecoding/externalDraftTokensKernels.cu",
        "acceptDraftTokensKernel",
        read_at="a text of 1.x",
    ),
    # Blocks become reusable from the next step.
    _text("cpp/include/tensorrt_llm/batch_manager/kvCacheManager.h", "storeContextBlocks", read_at="a text of 1.x"),
    # Waiting returns at once, with nothing, when the executor has ended; workers are spawned, one for each rank.
    _text("cpp/tensorrt_llm/executor/executorImpl.cpp", "awaitResponses"),
    _text("cpp/tensorrt_llm/executor/executorImpl.cpp", "initializeOrchestrator"),
    # The worker registers no other plugins, and setup.py packs it as bin/executorWorker.
    _text("cpp/tensorrt_llm/executor_worker/executorWorker.cpp", "initTrtLlmPlugins", read_at="commit 06c0e9b1"),
    _text("setup.py", "", read_at="a text of 1.x"),
)
# What PackedLooseAccept takes for given of a step: which rows there are, what last_token_ids and context_lengths count,
# that both are in device memory, and that a request with drafts ends with its step. The versions of
# most commits are not known.
_BUFFERS = "cpp/tensorrt_llm/batch_manager/runtimeBuffers.cpp"
_LOOP = "cpp/tensorrt_llm/batch_manager/trtGptModelInflightBatching.cpp"
_INPUTS = "tensorrt_llm/models/generation_mixin.py"
PLUGIN: tuple[Name, ...] = (
    *(
        Name("plugin", _BUFFERS, name, releases=("1.2",), read_at="092a5a15 and 2a9abd95", sureness="unverified")
        for name in (
            "RuntimeBuffers.setFromInputs",
            "RuntimeBuffers.setBufferSizes",
            "RuntimeBuffers.prepareBuffersForCudaGraph",
            "kInputIdsTensorName",
            "kLastTokenIdsTensorName",
            "kContextLengthsTensorName",
            "contextLengthsDevice",
            "lastTokenIdsDevice",
            "isLastContextChunk",
            "inclusiveScan",
        )
    ),
    Name("plugin", _LOOP, "isDraftTokensExternal", releases=("1.2",), read_at="1.2.0rc2, b35ac1b6"),
    Name("plugin", _LOOP, "hasDraftTokens", releases=("1.2",), read_at="1.2.0rc2, b35ac1b6"),
    Name(
        "plugin",
        "cpp/tensorrt_llm/kernels/speculativeDecoding/externalDraftTokensKernels.cu",
        "acceptDraftTokensKernel",
        releases=("1.2",),
        read_at="04a2caca",
        sureness="unverified",
    ),
    Name(
        "plugin",
        "cpp/tensorrt_llm/layers/externalDraftTokensLayer.cpp",
        "ExternalDraftTokensLayer.targetSoftmax",
        releases=("1.2",),
        read_at="1d263f15",
        sureness="unverified",
    ),
    Name(
        "plugin",
        _INPUTS,
        "GenerationMixin.prepare_basic_inputs",
        (
            "remove_input_padding",
            "gather_context_logits",
            "speculative_decoding_draft_tokens_external",
            "max_draft_len",
        ),
        releases=("1.2",),
        read_at="03ec464e",
        sureness="unverified",
    ),
    Name(
        "plugin",
        _INPUTS,
        "GenerationMixin.prepare_attention_inputs",
        releases=("1.2",),
        read_at="03ec464e",
        sureness="unverified",
    ),
)

NAMES: tuple[Name, ...] = (*ACCEPTANCE, *LLM_API, *SERVE, *BUILD, *EXECUTOR, *PLUGIN)
