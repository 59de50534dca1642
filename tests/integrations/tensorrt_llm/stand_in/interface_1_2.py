"""What stands for tensorrt_llm/_torch/speculative/interface.py of the 1.2 line.

Written from the text of a version of about January 2026, near 1.2.0 (no version.py could be opened beside it): names,
parameters, shapes and types, and what is done to the arguments. What a caller must not read is -7 here; the logits are
divided by the temperatures in place where requests sample, as there.
"""

import os
from typing import Any

import torch

UNWRITTEN = -7


class SpecMetadata:
    """temperatures: float32, one a row of the logits, where allow_advanced_sampling."""

    is_spec_dec_tree = False
    is_spec_dec_dynamic_tree = False
    allow_advanced_sampling = False
    temperatures: torch.Tensor | None = None


class SpecWorkerBase(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.guided_decoder: Any = None
        self.force_num_accepted_tokens = int(os.environ.get("TLLM_SPEC_DECODE_FORCE_NUM_ACCEPTED_TOKENS", "0"))
        self.seed = 0

    @property
    def max_draft_len(self) -> int:
        raise NotImplementedError

    def _sample_tokens_for_batch(
        self, logits: torch.Tensor, spec_metadata: Any, num_contexts: int, batch_size: int
    ) -> torch.Tensor:
        if not spec_metadata.allow_advanced_sampling:
            return logits.argmax(-1)
        self.seed += 1
        logits.div_(spec_metadata.temperatures[:, None])
        noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(self.seed))
        return (logits.float() - (-noise.log()).log()).argmax(-1)

    def _apply_force_accepted_tokens(self, num_accepted_tokens: torch.Tensor, num_contexts: int) -> torch.Tensor:
        if self.force_num_accepted_tokens:
            forced = min(self.force_num_accepted_tokens, self.max_draft_len)
            num_accepted_tokens[num_contexts:] = forced + 1
        return num_accepted_tokens

    def _sample_and_accept_draft_tokens_base(
        self,
        logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        num_contexts: int,
        batch_size: int,
        spec_metadata: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if logits.dim() == 1:
            logits = logits[None]
        width = self.max_draft_len + 1
        accepted_tokens = torch.full((batch_size, width), UNWRITTEN, dtype=torch.int32, device=logits.device)
        num_accepted_tokens = torch.ones(batch_size, dtype=torch.int32, device=logits.device)
        sampled = self._sample_tokens_for_batch(logits, spec_metadata, num_contexts, batch_size)
        accepted_tokens[:num_contexts, 0] = sampled[:num_contexts]
        accepted_tokens[num_contexts:] = sampled[num_contexts:].reshape(batch_size - num_contexts, width)
        agrees = draft_tokens == accepted_tokens[num_contexts:, : self.max_draft_len]
        num_accepted_tokens[num_contexts:] += agrees.int().cumprod(-1).sum(1)
        return accepted_tokens, self._apply_force_accepted_tokens(num_accepted_tokens, num_contexts)
