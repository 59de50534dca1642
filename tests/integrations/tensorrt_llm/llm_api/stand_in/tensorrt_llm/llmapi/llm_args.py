"""TorchLlmArgs as far as a YAML of fly-build can name it, and the way from plain values to its classes."""

from ..version import __version__


class TorchLlmArgs:
    model: object
    tokenizer: object
    tokenizer_mode: object
    skip_tokenizer_init: object
    trust_remote_code: object
    tensor_parallel_size: object
    dtype: object
    revision: object
    tokenizer_revision: object
    pipeline_parallel_size: object
    max_batch_size: object
    max_seq_len: object
    backend: object
    max_num_tokens: object
    max_input_len: object
    enable_chunked_prefill: object
    kv_cache_config: object
    speculative_config: object
    stream_interval: object
    cuda_graph_config: object
    disable_overlap_scheduler: object
    quant_config: object
    return_perf_metrics: object
    enable_iter_perf_stats: object
    gather_generation_logits: object
    attn_backend: object
    sampler_type: object
    env_overrides: object


DECODING = {  # decoding_type: settings, of which the draft's length is one
    "Eagle": {"max_draft_len", "speculative_model_dir", "eagle3_one_model"},
    "Eagle3": {"max_draft_len", "speculative_model_dir", "speculative_model", "eagle3_one_model"},
    "MTP": {"num_nextn_predict_layers", "max_draft_len"},
    "Draft_Target": {"max_draft_len", "speculative_model_dir", "speculative_model"},
}
COMMON = {"allow_advanced_sampling", "use_rejection_sampling", "max_total_draft_tokens"}


class DecodingConfig:
    def __init__(self, decoding_type: str, **settings: object) -> None:
        known = DECODING[decoding_type] | COMMON
        if unknown := set(settings) - known:
            raise ValueError(f"{sorted(unknown)[0]}: extra fields not permitted")
        self.decoding_type = decoding_type
        self.settings = settings


class KvCacheConfig:
    def __init__(
        self,
        *,
        enable_block_reuse: bool = True,
        free_gpu_memory_fraction: float = 0.9,
        dtype: str = "auto",
        tokens_per_block: int = 32,
        max_tokens: int | None = None,
        enable_partial_reuse: bool = True,
    ) -> None:
        self.enable_block_reuse = enable_block_reuse


def update_llm_args_with_extra_dict(
    llm_args: dict, llm_args_dict: dict, extra_llm_api_options: str | None = None
) -> dict:
    made = dict(llm_args_dict)
    if "speculative_config" in made:
        made["speculative_config"] = DecodingConfig(**made["speculative_config"])
    if "kv_cache_config" in made and not __version__.startswith("1.2"):  # pydantic does it in the 1.2 line
        made["kv_cache_config"] = KvCacheConfig(**made["kv_cache_config"])
    return llm_args | made
