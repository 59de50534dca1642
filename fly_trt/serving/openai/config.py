"""How a server is run: what its operator sets."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """model_names: under which the model is served, the first one in answers. max_body_bytes: of a request."""

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4_000_000
    root_path: str = ""
