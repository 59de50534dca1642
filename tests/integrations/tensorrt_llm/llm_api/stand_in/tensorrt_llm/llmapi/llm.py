"""LLM and RequestOutput."""

import atexit
import weakref

from ..executor.executor import GenerationExecutor
from ..executor.result import GenerationResult
from ..sampling_params import SamplingParams
from ..version import __version__
from .llm_args import DecodingConfig, KvCacheConfig, TorchLlmArgs
from .utils import enable_worker_single_process_for_tp1


class RequestOutput(GenerationResult):
    """Has what the result has, its queue too, and takes the responses in its place."""

    def __init__(self) -> None:
        raise RuntimeError("RequestOutput is made of a result")

    @classmethod
    def _from_generation_result(cls, result: GenerationResult) -> "RequestOutput":
        made = cls.__new__(cls)
        made.__dict__.update(result.__dict__)
        return made


STARTED: "list[LLM]" = []
"""By this process, for tests."""


class LLM:
    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        **kwargs: object,
    ) -> None:
        for key in kwargs:
            if key not in TorchLlmArgs.__annotations__:
                raise ValueError(f"LLM got invalid argument: {key}")
        assert not enable_worker_single_process_for_tp1(), "the stand-in's workers are processes"
        self.speculative = kwargs.get("speculative_config")
        if self.speculative is not None and not isinstance(self.speculative, DecodingConfig):
            raise ValueError("speculative_config: Input should be a valid instance of a decoding config")
        cache = kwargs.get("kv_cache_config") or KvCacheConfig()
        cache = KvCacheConfig(**cache) if isinstance(cache, dict) else cache
        self.model, self.revision, self.kwargs = model, revision, kwargs
        length = 0
        if self.speculative is not None:
            settings = self.speculative.settings
            length = settings.get("max_draft_len") or settings["num_nextn_predict_layers"]
        self._executor: GenerationExecutor | None = GenerationExecutor(
            {
                "num_draft_tokens": length,
                "max_batch_size": kwargs.get("max_batch_size") or 8,
                "enable_block_reuse": cache.enable_block_reuse,
                "samples": bool(
                    self.speculative is None
                    or self.speculative.settings.get("allow_advanced_sampling")
                    or not __version__.startswith("1.2")
                ),
            }
        )
        STARTED.append(self)
        atexit.register(LLM._shutdown_wrapper, weakref.ref(self))

    def generate_async(
        self,
        inputs: dict | list[int] | str,
        sampling_params: SamplingParams | None = None,
        lora_request: None = None,
        prompt_adapter_request: None = None,
        streaming: bool = False,
        kv_cache_retention_config: None = None,
        disaggregated_params: None = None,
        _postproc_params: None = None,
        scheduling_params: None = None,
        cache_salt: None = None,
    ) -> RequestOutput:
        if self._executor is None or self._executor.is_shutdown():
            raise RuntimeError("LLM is shutting down")
        if not isinstance(sampling_params, SamplingParams):
            raise TypeError(f"The sampling_params must be type SamplingParams, got {type(sampling_params)}")
        assert streaming, "the stand-in streams"
        assert sampling_params.end_id is not None, "the stand-in has no tokenizer to ask"
        assert not sampling_params.detokenize
        assert (sampling_params.n, sampling_params.best_of) == (1, 1)
        prompt = inputs["prompt_token_ids"]
        limit = self.kwargs.get("max_num_tokens")
        if limit and not self.kwargs.get("enable_chunked_prefill") and len(prompt) > limit:
            raise ValueError(f"The sum of prompt length ({len(prompt)}) should not exceed max_num_tokens ({limit})")
        return RequestOutput._from_generation_result(self._executor.submit(list(prompt), sampling_params))

    @staticmethod
    def _shutdown_wrapper(self_ref: "weakref.ref[LLM]") -> None:
        if (llm := self_ref()) is not None:
            llm.shutdown()

    def shutdown(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
