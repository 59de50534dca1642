"""Draft tokens for the running requests: how many, of which policy the round is, and what came of them.

It has the drafter and everything that is learnt from rounds: what drafts cost, how likely they stand, whether windows
pay. It knows requests and rounds; it runs no target engine and decides nothing of who runs.
"""

import time
from collections.abc import Sequence

from fly_trt.drafting import Draft, Drafter, DraftRow, DraftStop, ReadsPrompts
from fly_trt.runtime.breaker import Breaker
from fly_trt.runtime.draft_length import SURE, AcceptanceRate, DraftLength
from fly_trt.runtime.guided import GuidedDraft, forced_draft, propose_guided
from fly_trt.runtime.loosening import Loosening, StepCosts
from fly_trt.runtime.request import Request
from fly_trt.runtime.rounds import Round, RoundCosts
from fly_trt.tokens import NO_TOKENS, IntArray
from fly_trt.verification import EXACT, EXACT_WITH_ENTROPY, DraftSource, Evidence, Limits

MAX_USUAL_CONTEXT = 2  # committed tokens that a round starts with, but for the first after a prompt


class Speculation:
    """drafter: None decodes without drafts. num_draft_tokens: of a round, at most, and 0 without a drafter.
    is_adaptive: steps verify as many as pay. step_costs: what a loose request's windows cost, so that it opens them
    where they pay; None means always. stop_token_ids: the model's own, never loosened. has_top_tokens: the target names
    its most probable tokens, which a trace has. `breaker`: which settings are exact for now. `prompt_reader`: the
    drafter, where it wants to know what the target says of prompts."""

    def __init__(
        self,
        drafter: Drafter | None,
        num_draft_tokens: int,
        *,
        is_adaptive: bool,
        step_costs: StepCosts | None,
        stop_token_ids: frozenset[int],
        has_top_tokens: bool = False,
    ) -> None:
        self.drafter = drafter
        self.prompt_reader = drafter if isinstance(drafter, ReadsPrompts) else None
        self.num_draft_tokens = num_draft_tokens if drafter is not None else 0
        has_costs = drafter is not None and not drafter.is_free  # free drafts cost nothing where they do not stand
        self._step_costs = step_costs if has_costs else None
        self._stop_token_ids = stop_token_ids
        self.breaker: Breaker | None = None
        self._has_top_tokens = has_top_tokens
        self.draft_length = DraftLength(self.num_draft_tokens, adaptive=is_adaptive)

    @property
    def drafts_are_free(self) -> bool:
        return self.drafter is not None and self.drafter.is_free

    def choose_length(self, rows: Sequence[Request], num_context: int) -> int:
        """Draft tokens that pay in a step of these rows, which have up to `num_context` context tokens each."""
        rates = [self._rate(request) for request in rows]
        limits = [self._limit(request) for request in rows]
        unread = 0
        if self.drafter is not None:
            drafting = (request for request, limit in zip(rows, limits, strict=True) if limit)
            unread = sum(self.drafter.num_unread(request.slot, len(request.sequence)) for request in drafting)
        # What pays in the long step of a prompt need not pay in those that follow it.
        num_usual = min(num_context, MAX_USUAL_CONTEXT)
        length = self.draft_length.choose([rate.value for rate in rates], limits, num_usual, unread)
        if not length and any(limits):
            may_draft = [rate for rate, limit in zip(rates, limits, strict=True) if limit]
            for rate in may_draft:
                rate.fade()
            if self.draft_length.rest():
                may_draft[0].forget()  # one tries: all would have to catch up
        return length

    def choose_forced(self, decoding: Sequence[Request], num_rows: int, num_draft: int) -> int:
        """Of what grammars force after the sequences that decode, the tokens that pay for each row in a step of
        `num_rows`, which verifies about `num_draft` draft tokens anyway. They cost no drafting and stand for sure, so
        that they may pay where drafts do not."""
        if all(request.grammar is None for request in decoding):
            return 0
        forced = [0 if request.grammar is None else self._num_forced(request) for request in decoding]
        rates = [self._rate(request).value for request in decoding]
        num_context = max(request.num_context for request in decoding)
        return self.draft_length.choose_forced(forced, rates, num_rows, num_draft, num_context)

    def start_round(self, request: Request, num_draft: int, num_forced: int = 0) -> None:
        """Opens a round of about `num_draft` draft tokens, or of up to `num_forced` that a grammar forces.

        What an exact policy emits does not depend on the round's length. With a loose one it does, if only because the
        token after the draft is the target's own: such a round is as long as the rule says, whatever the load. A
        request that pauses its windows is decoded exactly, and the last round of the pause ends where the pause does.
        So is one whose setting the breaker has tripped, from its next round on.
        """
        length, limit, policy = len(request.sequence), self._limit(request), request.policy
        forced = NO_TOKENS if request.grammar is None else self._forced(request)
        request.forced = None
        num_draft, is_observed, exact_because = max(num_draft, min(num_forced, len(forced))), False, "windows"
        closed = EXACT_WITH_ENTROPY if request.traces_full_entropy else EXACT
        if not policy.is_loose:
            num_draft = min(num_draft, limit)
        elif self._is_tripped(request):
            num_draft, policy = min(num_draft, limit), closed
            request.metrics.exact_because = exact_because = "breaker"
        elif self._step_costs is None or not policy.has_windows:
            num_draft = limit
        else:
            if request.loosening is None:
                request.loosening = Loosening(self._step_costs, policy.lookahead, limit, length)
            if (pause := request.loosening.resume_at - length) > 0:
                num_draft, policy = min(num_draft, limit, pause - 1), closed
            else:
                num_draft, policy, is_observed = limit, policy if request.loosening.is_open else closed, True
        if request.limits is None:
            request.limits = self._limits(request)
        request.round = Round(length, Evidence(num_draft), policy, request.limits, is_observed)
        if request.params.speculation_trace:
            request.round.costs = RoundCosts()
            request.round.exact_because = exact_because if request.policy.is_loose and policy is closed else None
            request.round.needs_top = self._has_top_tokens or request.sampler is not None
        if request.grammar is not None:
            is_scored = policy.needs_draft_scores or request.draft_stop is not None
            request.round.begin_draft(forced_draft(forced[:num_draft], is_scored=is_scored))
        if request.guards is not None:
            request.guards.start_round(request.output_token_ids)

    def draft(self, rows: Sequence[Request], num_tokens: int) -> None:
        """Makes the draft tokens that a step with rows of `num_tokens` feeds, and of a loose round one more to compare
        with the last choice."""
        asked: list[tuple[Request, Round, int]] = []
        for request in rows:
            if (round_ := request.round) is None or self.drafter is None:
                continue
            end = round_.end
            if not self.drafter.is_free:
                end = min(end, round_.num_fed + num_tokens - request.num_context + 1)
            if end > len(round_.draft):
                asked.append((request, round_, end - round_.num_committed))
        if not asked:
            return
        started = time.perf_counter()
        wanted = [_row(request, round_, count) for request, round_, count in asked]
        guided = {
            at: GuidedDraft(wanted[at], round_, request.grammar, request.output_tokens, is_free=self.drafts_are_free)
            for at, (request, round_, _) in enumerate(asked)
            if request.grammar is not None
        }
        drafts = propose_guided(wanted, guided, self.propose) if guided else self.propose(wanted)
        seconds = time.perf_counter() - started
        for (_, round_, count), draft in zip(asked, drafts, strict=True):
            round_.take_draft(draft, count)
            if round_.costs is not None:
                round_.costs.add_draft(seconds, len(asked))

    def propose(self, rows: Sequence[DraftRow]) -> list[Draft]:
        """What the drafter proposes, and how long it takes for it."""
        assert self.drafter is not None
        unread = max(self.drafter.num_unread(row.slot, len(row.tokens)) for row in rows)
        self.drafter.prepare(rows)
        prepared, started = self.drafter.num_preparations, time.perf_counter()
        drafts = self.drafter.propose(rows)
        # What was read at length has brought its first draft tokens already.
        longest = max(len(draft.tokens) for draft in drafts)
        if self.drafter.num_preparations == prepared and unread <= MAX_USUAL_CONTEXT and longest:
            self.draft_length.observe_drafting(len(rows), longest, time.perf_counter() - started)
        return drafts

    def warm_up(self, num_rows: int, token: IntArray) -> None:
        """Drafts in the first slots until the cost of it is known."""
        if self.drafter is None:
            return
        for _ in range(SURE + 1):
            self.propose([DraftRow(slot, token, 2) for slot in range(num_rows)])
            for slot in range(num_rows):
                self.drafter.release(slot)

    def probe(self, token: IntArray) -> None:
        """Drafts one token in the first slot. Raises what the drafter raises."""
        if self.drafter is not None:
            self.drafter.propose([DraftRow(0, token, 1)])
            self.drafter.reset()

    def end_round(self, request: Request, round_: Round, num_kept: int) -> None:
        """Learns from a round that is decided, of which `num_kept` draft tokens were emitted."""
        num_stood, was_rejected = round_.counts_of_drafter()
        if round_.evidence.num_known and (num_stood or was_rejected):
            self._rate(request).observe(num_stood, was_rejected)
            self.draft_length.observe_round(num_stood, was_rejected)
        round_.policy.observe(round_.evidence, round_.num_committed)
        if request.guards is not None:
            request.guards.end_round(round_.evidence, num_kept)
        is_paused = request.loosening is not None and not round_.is_observed  # its length is the load's
        if request.draft_stop is not None and not is_paused:
            _show_rejected(round_, request.draft_stop)
        if request.loosening is not None and round_.is_observed and not request.is_finished:
            request.loosening.observe(round_.window_counts(), len(request.sequence))

    def _is_tripped(self, request: Request) -> bool:
        return self.breaker is not None and request.setting is not None and self.breaker.is_tripped(request.setting)

    def _limits(self, request: Request) -> Limits:
        has_exact_copies = self.drafter is not None and self.drafter.has_exact_copies
        exact_copies = has_exact_copies and not request.policy.loosens_copies
        return Limits(request.end_token_ids | self._stop_token_ids, request.guards, exact_copies)

    def _limit(self, request: Request) -> int:
        """Draft tokens that a round of the request has at most."""
        asked = request.params.num_speculative_tokens
        return self.num_draft_tokens if asked is None else min(asked, self.num_draft_tokens)

    def _forced(self, request: Request) -> IntArray:
        """What its grammar forces next, as far as a round may be long. The end of a finished output is not part of
        it: it is the target's own token, which every round has."""
        if request.forced is None:
            assert request.grammar is not None
            limit = self._limit(request)
            request.forced = request.grammar.forced(request.output_tokens)[:limit] if limit else NO_TOKENS
        return request.forced

    def _num_forced(self, request: Request) -> int:
        """Tokens that a step may verify next, of those that its grammar forces."""
        return len(self._forced(request)) if request.round is None else request.round.num_forced_left

    def _rate(self, request: Request) -> AcceptanceRate:
        if request.acceptance_rate is None:
            request.acceptance_rate = AcceptanceRate(self.draft_length.usual_rate)
        return request.acceptance_rate


def _row(request: Request, round_: Round, num_tokens: int) -> DraftRow:
    return DraftRow(
        request.slot,
        request.sequence.tokens,
        num_tokens,
        stop=request.draft_stop,
        wants_scores=round_.policy.needs_draft_scores,
        is_private=round_.policy.is_loose or round_.is_observed,
        round_start=round_.start,
        num_prompt=len(request.prompt_token_ids),
    )


def _show_rejected(round_: Round, stop: DraftStop) -> None:
    """Tells a rule that ends drafts where the target rejected a token that a draft model chose."""
    at, evidence = round_.num_committed, round_.evidence
    if at < evidence.num_known and evidence.sources[at] == DraftSource.MODEL and at < len(evidence.scores.entropy):
        stop.observe(float(evidence.scores.entropy[at]))
