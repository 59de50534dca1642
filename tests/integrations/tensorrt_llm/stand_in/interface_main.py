"""What stands for tensorrt_llm/_torch/speculative/interface.py of main, on its way to 1.3.

Written from the text of a version of mid 2026 (with rejection sampling, penalties, and draft lengths that change from
step to step; no version.py could be opened beside it): names, parameters, shapes and types. What a caller must not read
is -7 here.
"""

import os
from typing import Any

import torch

UNWRITTEN = -7


class SpecMetadata:
    """temperatures: float32, one a row of the logits, read unless is_all_greedy_sample."""

    is_spec_dec_tree = False
    is_spec_dec_dynamic_tree = False
    use_rejection_sampling = False
    is_all_greedy_sample = True
    temperatures: torch.Tensor | None = None


class SpecWorkerBase(torch.nn.Module):
    def __init__(self, use_separate_draft_kv_cache: bool = False) -> None:
        super().__init__()
        self.guided_decoder: Any = None
        self.force_num_accepted_tokens = float(os.environ.get("TLLM_SPEC_DECODE_FORCE_NUM_ACCEPTED_TOKENS", "0"))
        self.use_separate_draft_kv_cache = use_separate_draft_kv_cache
        self.seed = 0

    @property
    def max_draft_len(self) -> int:
        raise NotImplementedError

    def _sample_tokens_for_batch(
        self, logits: torch.Tensor, spec_metadata: Any, num_contexts: int, batch_size: int
    ) -> torch.Tensor:
        if spec_metadata.is_all_greedy_sample:
            return logits.argmax(-1)
        self.seed += 1
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(self.seed))
        return (logits.float() / spec_metadata.temperatures[:, None] - (-noise.log()).log()).argmax(-1)

    def _apply_force_accepted_tokens(
        self, num_accepted_tokens: torch.Tensor, num_contexts: int, runtime_draft_len: int, spec_metadata: Any = None
    ) -> torch.Tensor:
        if self.force_num_accepted_tokens:
            num_accepted_tokens[num_contexts:] = min(int(self.force_num_accepted_tokens), runtime_draft_len) + 1
        return num_accepted_tokens

    def _sample_and_accept_draft_tokens_base(
        self,
        logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        num_contexts: int,
        batch_size: int,
        spec_metadata: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        length = draft_tokens.shape[-1]
        if logits.dim() == 1:
            logits = logits[None]
        accepted_tokens = torch.full((batch_size, length + 1), UNWRITTEN, dtype=torch.int32, device=logits.device)
        num_accepted_tokens = torch.ones(batch_size, dtype=torch.int32, device=logits.device)
        sampled = self._sample_tokens_for_batch(logits, spec_metadata, num_contexts, batch_size)
        accepted_tokens[:num_contexts, 0] = sampled[:num_contexts]
        accepted_tokens[num_contexts:] = sampled[num_contexts:].reshape(batch_size - num_contexts, length + 1)
        agrees = draft_tokens == accepted_tokens[num_contexts:, :length]
        num_accepted_tokens[num_contexts:] += agrees.int().cumprod(-1).sum(1)
        num_accepted_tokens = self._apply_force_accepted_tokens(
            num_accepted_tokens, num_contexts, length, spec_metadata=spec_metadata
        )
        return accepted_tokens, num_accepted_tokens

    def _accept_draft_tokens(
        self, logits: torch.Tensor, draft_tokens: torch.Tensor, num_contexts: int, batch_size: int, spec_metadata: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if spec_metadata.use_rejection_sampling and not spec_metadata.is_all_greedy_sample:
            raise NotImplementedError("rejection sampling")
        return self._sample_and_accept_draft_tokens_base(logits, draft_tokens, num_contexts, batch_size, spec_metadata)
