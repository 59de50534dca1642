"""What must hold between two steps of the loop, in one place. Tests call it after every step."""

from fly_trt.runtime.loop import GenerationLoop
from fly_trt.runtime.request import Request, RequestState


def check_invariants(loop: GenerationLoop) -> None:
    """Raises AssertionError naming the request and the rule that is broken."""
    scheduler = loop.scheduler
    slots = scheduler.slots
    active = slots.active
    assert scheduler.running == active, "the running requests are those that own a slot"
    owners = [request.slot for request in active]
    assert owners == sorted(set(owners)), f"one owner per slot, in their order: {owners}"
    for index, slot in enumerate(slots.table):
        assert slot.request is None or slot.request.slot == index, f"slot {index}: its owner thinks it has another"
        assert slot.request is None or not len(slot.kept), f"slot {index}: owned and kept at once"
    for request in scheduler.waiting:
        assert request.state is RequestState.WAITING, f"{request.request_id}: waits as {request.state}"
        assert request.slot == -1, f"{request.request_id}: waits with slot {request.slot}"
    for request in active:
        _check_running(request)


def _check_running(request: Request) -> None:
    name, committed = request.request_id, len(request.sequence)
    assert request.state in (RequestState.PREFILL, RequestState.DECODE), f"{name}: runs as {request.state}"
    assert request.sequence.tokens.tolist() == [*request.prompt_token_ids, *request.output_token_ids], (
        f"{name}: prompt and output are the committed tokens"
    )
    assert len(request.output_token_ids) < request.max_tokens, f"{name}: runs beyond max_tokens"
    assert (request.state is RequestState.DECODE) or not request.output_token_ids, f"{name}: emits while it prefills"
    round_ = request.round
    if round_ is None or (round_.is_careful and not len(round_.choices)):
        assert 0 <= request.num_cached < committed, f"{name}: {request.num_cached} of {committed} tokens cached"
        return
    assert request.state is RequestState.DECODE, f"{name}: has a round while it prefills"
    assert len(round_.choices), f"{name}: a round without a verified position is left open"
    assert request.num_cached == round_.start + round_.num_fed, f"{name}: the cache ends at the last fed token"
    assert committed == round_.start + round_.num_committed, f"{name}: the round's accepted tokens are committed"
    assert round_.num_fed < round_.end or round_.end == 0, f"{name}: a verified round is left open"
