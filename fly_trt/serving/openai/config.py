"""How a server is run: what its operator sets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fly_trt.checks import check_at_least, is_number
from fly_trt.errors import ConfigError
from fly_trt.serving.openai.http.errors import model_not_found

MAX_BODY_BYTES = 4_000_000
BODY_SECONDS = 30.0
WRITE_SECONDS = 60.0
DRAIN_SECONDS = 60.0
SpecDecodeMetrics = Literal["none", "summary", "detailed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """model_names: under which the model is served, the first one in answers. api_keys: one of them has to be sent
    where there are any. allowed_origins: of web pages that may read answers. root_path: a prefix that a proxy has.
    max_body_bytes: of a request. body_timeout: seconds in which it must have arrived. write_timeout: seconds that a
    client may leave an answer unread. drain_timeout: seconds that running answers have after SIGTERM. log_requests: one
    line of parameters for each prompt; log_texts: with its texts. generation_config: where the defaults of sampling
    come from, as Defaults.read has it; override_generation_config: what goes over it. spec_decode_metrics: how much
    answers say of speculation. tool_call_parser: its name, None for the chat template's own. allow_breaker_reset: a
    client may make a setting loose again that the breaker has tripped."""

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    root_path: str = ""
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout: float = BODY_SECONDS
    write_timeout: float = WRITE_SECONDS
    drain_timeout: float = DRAIN_SECONDS
    log_requests: bool = False
    log_texts: bool = False
    generation_config: str = "auto"
    override_generation_config: Mapping[str, Any] = field(default_factory=dict)
    spec_decode_metrics: SpecDecodeMetrics = "summary"
    tool_call_parser: str | None = None
    allow_breaker_reset: bool = False

    def __post_init__(self) -> None:
        check_at_least("max_body_bytes", self.max_body_bytes, 1)
        for name in ("body_timeout", "write_timeout", "drain_timeout"):
            value = getattr(self, name)
            if not (is_number(value) and 0 < value < math.inf):
                raise ConfigError(f"{name} {value!r}: expected seconds, above 0")
        for name in ("model_names", "api_keys", "allowed_origins"):
            if not all(getattr(self, name)):
                raise ConfigError(f"{name}: an empty one: leave it out, or give it a value")

        if self.root_path and not self.root_path.startswith("/"):
            raise ConfigError(f"root_path {self.root_path!r}: expected a path, such as '/fly'")

    def check_model(self, asked: str | None) -> str:
        """The name that an answer has. None is the one model that there is. Raises ApiError for an unknown one."""
        if asked is None:
            return self.model_names[0]
        if asked not in self.model_names:
            raise model_not_found(asked, self.model_names)
        return asked
