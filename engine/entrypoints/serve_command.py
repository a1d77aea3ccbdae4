"""`twinfer serve`: start the engine, say where it listens, serve until a signal, drain, end with status 0."""

from __future__ import annotations

import argparse

from engine import env
from engine.entrypoints.flags import (
    UsageError,
    add_flags,
    build,
    build_engine_config,
    engine_flags,
    read_values,
    server_flags,
)
from engine.entrypoints.settings import ServerSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="checkpoint (default: the toy model)")
    parser.add_argument("--config", metavar="FILE", help="YAML with the options below, under the command line")
    add_flags(parser, [*engine_flags(), *server_flags()])


def check_settings(settings: ServerSettings) -> None:
    """Raises UsageError for what would be unsafe or cannot work."""
    if settings.is_public and not settings.api_key and not settings.insecure_no_auth:
        raise UsageError(
            f"--host: {settings.host} lets other machines connect; set TWINFER_API_KEY (or --api-key), "
            "or allow it with --insecure-no-auth"
        )
    if not 0 <= settings.port < 65536:
        raise UsageError(f"--port: {settings.port} is not accepted; expected 0 .. 65535")
    if (settings.ssl_keyfile is None) != (settings.ssl_certfile is None):
        raise UsageError("--ssl-keyfile and --ssl-certfile: give both or neither")
    if settings.drain_delay < 0 or settings.drain_timeout < 0:
        raise UsageError("--drain-delay and --drain-timeout: expected seconds >= 0")
    if settings.max_open_requests < 1:
        raise UsageError(f"--max-open-requests: {settings.max_open_requests} is not accepted; expected >= 1")
    if settings.heartbeat_timeout < 0:
        raise UsageError(f"--heartbeat-timeout: {settings.heartbeat_timeout:g} is not accepted; expected >= 0")
    if any(not key for key in settings.api_key):
        raise UsageError("--api-key: an empty key is not accepted")


def run(args: argparse.Namespace) -> int:
    values = read_values(args, [*engine_flags(), *server_flags()])
    key = env.read("TWINFER_API_KEY")
    if key:
        values["api_key"] = [*values.get("api_key", ()), key]
    config, settings = build_engine_config(values), build(ServerSettings, values)
    check_settings(settings)
    from engine.entrypoints.serve import serve  # the web server, only now

    return serve(config, settings)
