"""What must hold between two steps of the loop, in one place. Tests ask after every step, and with FLY_TRT_CHECK=1 so
does the product."""

from fly_trt.runtime.request import Request, RequestState
from fly_trt.runtime.scheduler import Scheduler


def check_invariants(scheduler: Scheduler) -> None:
    """Raises AssertionError naming the request and the rule that is broken, also where Python leaves `assert` out."""
    slots = scheduler.slots
    active = slots.active
    _check(scheduler.running == active, "the running requests are those that own a slot")
    owners = [request.slot for request in active]
    _check(owners == sorted(set(owners)), f"one owner per slot, in their order: {owners}")
    for index, slot in enumerate(slots.table):
        owner = slot.request
        _check(owner is None or owner.slot == index, f"slot {index}: its owner thinks it has another")
        _check(owner is None or not len(slot.kept), f"slot {index}: owned and kept at once")
    if not slots.loan.is_over and slots.loan.slot < len(slots):
        lent = slots.table[slots.loan.slot]
        _check(lent.request is None and not len(lent.kept), f"slot {slots.loan.slot}: lent and in use at once")
    for request in scheduler.waiting:
        _check(request.state is RequestState.WAITING, f"{request.request_id}: waits as {request.state}")
        _check(request.slot == -1, f"{request.request_id}: waits with slot {request.slot}")
    for request in active:
        _check_running(request)


def _check_running(request: Request) -> None:
    name, committed, decodes = request.request_id, len(request.sequence), request.state is RequestState.DECODE
    _check(decodes or request.state is RequestState.PREFILL, f"{name}: runs as {request.state}")
    emitted = [*request.prompt_token_ids, *request.output_token_ids]
    _check(request.sequence.tokens.tolist() == emitted, f"{name}: prompt and output are the committed tokens")
    _check(len(request.output_token_ids) < request.max_tokens, f"{name}: runs beyond max_tokens")
    _check(decodes or not request.output_token_ids, f"{name}: emits while it prefills")
    round_, cached = request.round, request.num_cached
    if round_ is None or (not round_.has_begun and (round_.is_careful or round_.least_fed)):
        _check(0 <= cached < committed, f"{name}: {cached} of {committed} tokens cached")
        return
    _check(decodes, f"{name}: has a round while it prefills")
    _check(round_.has_begun, f"{name}: a round without a verified position is left open")
    _check(cached == round_.start + round_.num_fed, f"{name}: the cache ends at the last fed token")
    _check(committed == round_.start + round_.num_committed, f"{name}: the round's accepted tokens are committed")
    _check(round_.num_fed < round_.end or round_.end == 0, f"{name}: a verified round is left open")


def _check(holds: bool, rule: str) -> None:
    if not holds:
        raise AssertionError(rule)
