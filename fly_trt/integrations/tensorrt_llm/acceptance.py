"""FLy behind the acceptance of TensorRT-LLM's one-model workers, as torch operations on the device.

`SpecWorkerBase._sample_and_accept_draft_tokens_base` samples the target's token of every row and accepts draft tokens
that are equal to it. `FlyAcceptance` calls it and loosens what the rule of fly_trt.verification.fly says. What decides
about operations is a shape or a number of Python, and no tensor comes from the host or waits for it, so that a CUDA
graph can hold all of it. It runs uncompiled: ranks whose kernels differ in the last bit would part at the threshold. It
knows the arguments of that one method and nothing else of TensorRT-LLM.
"""

from collections.abc import Callable
from typing import Any

import torch

from fly_trt.integrations.tensorrt_llm.environment import Acceptance
from fly_trt.verification.fly import FlyPolicy

TOP_K = 3  # as fly-build's default: the published presets have no other
_BLOCK = 256
_AT_ONCE = 2**22  # float32 numbers of a temporary: what stays in a GPU's second cache
_NO_SHARE = -1000.0  # exp of it is 0

Base = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class FlyAcceptance:
    """The rule in one process, in the place of the method `original`.

    say: told, once each, where nothing is loosened although somebody might expect it.
    """

    def __init__(self, acceptance: Acceptance, say: Callable[[str], None]) -> None:
        self.acceptance = acceptance
        self._say = say
        self._said: set[str] = set()
        self._policies: dict[int, FlyPolicy] = {}
        self._counts: dict[torch.device, torch.Tensor] = {}

    def __call__(
        self,
        original: Base,
        worker: Any,
        logits: torch.Tensor,
        draft_tokens: torch.Tensor,
        num_contexts: int,
        batch_size: int,
        spec_metadata: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes and gives what `original` does: logits [num_contexts + G (K + 1), V] and draft_tokens [G, K] of G =
        batch_size - num_contexts generation requests -> accepted_tokens int32 [batch_size, K + 1] and
        num_accepted_tokens int32 [batch_size], the accepted draft tokens and one more."""
        num_gens, num_draft = batch_size - num_contexts, draft_tokens.shape[-1]
        policy = self._policy(logits.shape[-1])
        num_loose = num_draft - max(policy.window, policy.lookahead)  # behind them there is no room for a window
        reason = ""
        if num_gens and policy.is_loose:
            reason = _exact_because(worker, logits, draft_tokens, num_contexts, num_gens, spec_metadata)
            if not reason and num_loose <= 0:
                reason = f"drafts have {num_draft} tokens: a window needs {num_draft - num_loose + 1}"
            self._say_once(reason)
        if reason or not num_gens or not policy.is_loose:
            return original(worker, logits, draft_tokens, num_contexts, batch_size, spec_metadata)
        if getattr(spec_metadata, "use_rejection_sampling", False):
            self._say_once("a batch has a request that samples, with use_rejection_sampling set")

        # Before it samples: it may divide the logits by the temperatures in place.
        rows = logits[num_contexts:].view(num_gens, num_draft + 1, -1)
        may_loosen = is_uncertain(rows[:, :num_loose], draft_tokens[:, :num_loose], policy)
        accepted_tokens, num_accepted_tokens = original(
            worker, logits, draft_tokens, num_contexts, batch_size, spec_metadata
        )
        choices = accepted_tokens[num_contexts:, : num_draft + 1]
        stop_token_ids = self.acceptance.stop_token_ids
        tokens, num_accepted, loosened = decide(draft_tokens, choices, may_loosen, policy, stop_token_ids)
        accepted_tokens[num_contexts:, :num_loose] = tokens
        num_accepted_tokens[num_contexts:] = num_accepted + 1
        self._count(num_accepted, loosened)
        return accepted_tokens, num_accepted_tokens

    def counts(self) -> tuple[int, int]:
        """Accepted draft tokens so far, and how many of them the target had not chosen; with those of warm-up and
        padding. Waits for the device, so never while a graph is captured."""
        totals = [counts.tolist() for counts in self._counts.values()]
        return sum(accepted for accepted, _ in totals), sum(loosened for _, loosened in totals)

    def _policy(self, vocab_size: int) -> FlyPolicy:
        if vocab_size not in self._policies:
            self._policies[vocab_size] = self.acceptance.policy(vocab_size)
        return self._policies[vocab_size]

    def _say_once(self, reason: str) -> None:
        if reason and reason not in self._said:
            self._said.add(reason)
            self._say(f"nothing is loosened where {reason}")

    def _count(self, num_accepted: torch.Tensor, loosened: torch.Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        device = num_accepted.device
        if device not in self._counts:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return  # zeros made there would be zeros again at each replay
            with torch.inference_mode(False):  # one made in that mode is not to be written outside of it
                self._counts[device] = torch.zeros(2, dtype=torch.int64, device=device)
        self._counts[device] += torch.stack([num_accepted.sum(), loosened.sum()])


def _exact_because(
    worker: Any, logits: torch.Tensor, draft_tokens: torch.Tensor, num_contexts: int, num_gens: int, spec_metadata: Any
) -> str:
    if worker.force_num_accepted_tokens:
        return "the number of accepted tokens is forced"
    if spec_metadata.is_spec_dec_tree:
        return "drafts are trees"
    num_rows = num_contexts + num_gens * (draft_tokens.shape[-1] + 1)
    # is_ragged_verify: where a release knows drafts of different lengths, whose packed rows may be as many by chance.
    is_even = draft_tokens.dim() == logits.dim() == 2 and draft_tokens.shape[0] == num_gens
    if not is_even or logits.shape[0] != num_rows or getattr(spec_metadata, "is_ragged_verify", False):
        return "drafts are of different lengths, or rows are not [contexts + requests (draft tokens + 1), vocabulary]"
    return ""


def is_uncertain(logits: torch.Tensor, draft_tokens: torch.Tensor, policy: FlyPolicy) -> torch.Tensor:
    """bool [G, L]: where the policy's entropy of the logits [G, L, V] reaches its threshold and the draft token
    [G, L] is possible at all. Never where there is no softmax: NaN, +inf, or nothing but -inf."""
    largest = _largest(logits, TOP_K).float()
    top = largest[..., :1]
    size = max(1, _AT_ONCE // (logits.shape[1] * logits.shape[2]))
    parts = zip(torch.split(logits, size), torch.split(top, size), strict=True)
    sums = [_sums(part, of, policy.use_full_entropy) for part, of in parts]
    total, weighted = (torch.cat(of_parts) for of_parts in zip(*sums, strict=True))
    if policy.use_full_entropy:
        entropy = total.log() - weighted / total
    else:
        logprobs = (largest - top - total.log().unsqueeze(-1)).clamp(min=_NO_SHARE)
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    tokens = draft_tokens.long().clamp(0, logits.shape[-1] - 1)
    scores = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return (entropy >= policy.entropy_threshold) & (scores > -torch.inf) & (tokens == draft_tokens)


def decide(
    draft_tokens: torch.Tensor,
    choices: torch.Tensor,
    may_loosen: torch.Tensor,
    policy: FlyPolicy,
    stop_token_ids: tuple[int, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft tokens [G, K], the target's choices [G, K + 1] and where its uncertainty lets one be loosened, bool
    [G, K - max(window, lookahead)] -> the tokens of those first positions, how many draft tokens stand, int [G], and
    which of them are loosened, bool."""
    num_draft, num_loose, ahead = draft_tokens.shape[1], may_loosen.shape[1], policy.lookahead
    differs = draft_tokens != choices[:, :num_draft]
    num_differing = differs.int().cumsum(-1)
    agrees_ahead = num_differing[:, ahead : ahead + num_loose] == num_differing[:, :num_loose]
    draft, chosen = draft_tokens[:, :num_loose], choices[:, :num_loose]
    loose = differs[:, :num_loose] & may_loosen & agrees_ahead
    for token in stop_token_ids:
        loose = loose & (draft != token) & (chosen != token)
    stands = torch.cat([~differs[:, :num_loose] | loose, ~differs[:, num_loose:]], -1).int().cumprod(-1)
    return torch.where(loose, draft, chosen), stands.sum(-1), loose & (stands[:, :num_loose] > 0)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` largest of the last axis, largest first. They lie in the blocks whose maxima are the largest, so that
    no selection reads the vocabulary, which takes several times as long as a maximum."""
    num_blocks = scores.shape[-1] // _BLOCK
    if num_blocks <= count:
        return scores.topk(min(count, scores.shape[-1]), -1).values
    blocks = scores[..., : num_blocks * _BLOCK].view(*scores.shape[:-1], num_blocks, _BLOCK)
    best = blocks.amax(-1).topk(count, -1).indices
    candidates = blocks.gather(-2, best.unsqueeze(-1).expand(*best.shape, _BLOCK)).flatten(-2)
    return torch.cat([candidates, scores[..., num_blocks * _BLOCK :]], -1).topk(count, -1).values


def _sums(logits: torch.Tensor, top: torch.Tensor, is_weighted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """With d what logits are below the largest: the sums of exp(d) and, if asked for, of exp(d) d, in float32."""
    below = logits.float() - top
    if not is_weighted:
        total = below.exp_().sum(-1)
        return total, total
    shares = below.clamp_(min=_NO_SHARE).exp()
    return shares.sum(-1), below.mul_(shares).sum(-1)
