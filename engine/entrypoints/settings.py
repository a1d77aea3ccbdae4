"""ServerSettings: what belongs to the HTTP server and not to the engine. Flag names are the field names with dashes."""

from __future__ import annotations

from dataclasses import dataclass

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_key: tuple[str, ...] = ()  # TWINFER_API_KEY adds one; kept here only until they are hashed
    insecure_no_auth: bool = False
    root_path: str = ""
    allowed_origins: tuple[str, ...] = ()
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    uvicorn_log_level: str = "warning"
    response_role: str = "assistant"
    drain_delay: float = 0.0  # seconds after SIGTERM in which new requests are still taken
    drain_timeout: float = 60.0  # seconds for open requests to end
    max_open_requests: int = 4096  # more are answered 503
    heartbeat_timeout: float = 10.0  # seconds without an answer of the engine until readyz says 503; 0 = do not ask
    max_body_bytes: int = 32 << 20
    head_timeout: float = 30.0
    body_timeout: float = 120.0
    disable_docs: bool = False

    @property
    def is_public(self) -> bool:
        """Whether other machines can connect."""
        return self.uds is None and self.host not in LOOPBACK
