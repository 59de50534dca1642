"""The generation loop: schedule -> draft -> verify -> commit.

The loop is the only one that runs the engines. It knows requests, tokens and slots, and nothing of files or callers.
"""

import numpy as np

from fly_trt.drafting import Drafter
from fly_trt.engines.base import NO_TOKENS, Engine, IntArray, Step
from fly_trt.runtime.request import Request, RequestState
from fly_trt.runtime.scheduler import Scheduler
from fly_trt.verification import accept, count_loosened


class GenerationLoop:
    """Serves requests with a target engine and, where there is one, a drafter of `num_draft_tokens` per step."""

    def __init__(self, target: Engine, drafter: Drafter | None, num_draft_tokens: int, num_slots: int) -> None:
        self._target = target
        self._drafter = drafter
        self._num_draft_tokens = num_draft_tokens if drafter is not None else 0
        self._max_context = target.info.max_num_tokens - self._num_draft_tokens
        self._scheduler = Scheduler(num_slots)

    def add(self, request: Request) -> None:
        self._scheduler.add(request)

    def has_requests(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def step(self) -> list[Request]:
        """Advances every running request by one engine step and returns those whose output changed."""
        changed = []
        for request in self._scheduler.schedule():
            num_tokens = len(request.output_token_ids)
            if request.state is RequestState.PREFILL:
                self._prefill(request)
            else:
                self._decode(request)
            if len(request.output_token_ids) > num_tokens:
                changed.append(request)
            if request.state is RequestState.FINISHED:
                self._release(request)
        return changed

    def abort(self, request: Request) -> None:
        """Ends a request wherever it is. What it has emitted stays."""
        if request.state is not RequestState.FINISHED:
            request.finish("abort")
            self._release(request)

    def _prefill(self, request: Request) -> None:
        """One chunk of the prompt, except its last, which rides with the first draft tokens."""
        chunk = self._max_context
        if len(request.sequence) - request.num_cached <= chunk:
            request.state = RequestState.DECODE
            self._decode(request)
            return
        self._verify(request, request.sequence.tokens[request.num_cached :][:chunk], NO_TOKENS)
        request.num_cached += chunk

    def _decode(self, request: Request) -> None:
        """One round: draft, verify, commit."""
        tokens = request.sequence.tokens
        draft = NO_TOKENS
        if self._drafter is not None:
            draft = self._drafter.propose(request.slot, tokens, self._num_draft_tokens)
        context = tokens[request.num_cached :]
        step = self._verify(request, context, draft)
        num_accepted, next_token = self._verdict(request, step, len(context), draft)
        request.num_cached += len(context) + num_accepted
        new = [*draft[:num_accepted].tolist(), next_token]
        request.sequence.append(new)
        num_emitted = request.commit(new)
        if len(draft):
            kept = min(num_emitted, num_accepted)
            argmax = step.argmax[0, len(context) - 1 :]
            request.metrics.record_step(len(draft), kept, count_loosened(draft, argmax, kept))

    def _verify(self, request: Request, context: IntArray, draft: IntArray) -> Step:
        step = self._target.step(request.slot, 1, len(context) + len(draft))
        step.set_row(0, request.num_cached, context, draft, request.policy)
        self._target.run(step)
        return step

    def _verdict(self, request: Request, step: Step, num_context: int, draft: IntArray) -> tuple[int, int]:
        """The engine's decision, or the host's where the request has stop tokens that the engine does not know."""
        if not request.stop_token_ids or not np.isfinite(request.policy.entropy_threshold):
            return int(step.num_accepted[0]), int(step.next_token[0])
        predicted = slice(num_context - 1, num_context + len(draft))
        entropy = step.entropy if request.policy.use_full_entropy else step.entropy_topk
        stops = request.stop_token_ids | self._target.info.stop_token_ids
        verdict = accept(draft, step.argmax[0, predicted], entropy[0, predicted], request.policy, stops)
        return verdict.num_accepted, verdict.next_token

    def _release(self, request: Request) -> None:
        slot = self._scheduler.remove(request)
        if slot is not None and self._drafter is not None:
            self._drafter.release(slot)
