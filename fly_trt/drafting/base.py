"""What the loop needs of a drafter."""

from typing import Protocol

from fly_trt.engines.base import IntArray


class Drafter(Protocol):
    """Proposes draft tokens for the sequence in a slot. It finds out by itself which of its earlier proposals became
    part of the sequence, so nothing has to be reported back."""

    def propose(self, slot: int, tokens: IntArray, num_tokens: int) -> IntArray:
        """At most `num_tokens` draft tokens int64 [n] to follow the committed `tokens` int64 [length]."""
        ...

    def release(self, slot: int) -> None:
        """Forgets the slot's sequence; the next one in it starts anew."""
        ...


def common_prefix(held: IntArray, tokens: IntArray, known: int) -> int:
    """Length of the common prefix of two sequences whose first `known` tokens are known to agree."""
    end = min(len(held), len(tokens))
    differs = (held[known:end] != tokens[known:end]).nonzero()[0]
    return known + int(differs[0]) if len(differs) else end
