"""How a server is run: what its operator sets."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fly_trt.serving.openai.errors import model_not_found

MAX_BODY_BYTES = 4_000_000
BODY_SECONDS = 30.0
WRITE_SECONDS = 60.0
DRAIN_SECONDS = 60.0
SpecDecodeMetrics = Literal["none", "summary", "detailed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """model_names: under which the model is served, the first one in answers. api_keys: one of them has to be sent
    where there are any. max_body_bytes: of a request. body_timeout: seconds in which a request must have arrived.
    write_timeout: seconds that a client may leave an answer unread. drain_timeout: seconds in which running answers
    may end after SIGTERM. queue_timeout: seconds that a request may wait for a slot, None is for ever. log_requests:
    one line of parameters for each prompt; log_texts: with its texts. generation_config: where the defaults of sampling
    come from, as Defaults.read has it; override_generation_config: what goes over it. spec_decode_metrics: how much
    answers say of speculation. tool_call_parser: its name, None for the chat template's own."""

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout: float = BODY_SECONDS
    write_timeout: float = WRITE_SECONDS
    drain_timeout: float = DRAIN_SECONDS
    queue_timeout: float | None = None
    log_requests: bool = False
    log_texts: bool = False
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    spec_decode_metrics: SpecDecodeMetrics = "summary"
    tool_call_parser: str | None = None

    def check_model(self, asked: str | None) -> str:
        """The name that an answer has. None is the one model that there is. Raises ApiError for an unknown one."""
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            raise model_not_found(asked, self.model_names)
        return asked
