"""One server process: AsyncEngine, metrics, the app and the draining HTTP server, in the order of their lives."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.core.messages import CoreReady
from engine.entrypoints.http import create_app
from engine.entrypoints.http_server import HttpServer, bind, check_tls, url_of
from engine.entrypoints.settings import ServerSettings
from engine.entrypoints.version import version
from engine.frontend.async_engine import AsyncEngine
from engine.frontend.progress import StartupBar
from engine.metrics.export import EngineMetrics
from engine.metrics.log import StatsLog

log = logging.getLogger("twinfer.serve")

DEFAULT_NAME = "default"  # what the toy model answers to


@dataclass(frozen=True, slots=True)
class Interrupted(Exception):
    """A signal came before the server was ready."""

    name: str


def serve(config: EngineConfig, settings: ServerSettings) -> int:
    """Run until a signal. Returns the exit status; raises StartupError."""
    logging.basicConfig(
        level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("twinfer").setLevel(logging.INFO)
    try:
        import uvloop

        new_loop: Any = uvloop.new_event_loop
    except ImportError:  # Windows
        new_loop = None
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(run_server(config, settings))


async def run_server(config: EngineConfig, settings: ServerSettings) -> int:
    raise_file_limit()
    check_tls(settings)
    sock = bind(settings)
    engine = AsyncEngine(config)
    try:
        try:
            ready = await start_engine(engine, config)
        except Interrupted as interrupted:
            print(f"twinfer: {interrupted.name} before the server was ready", file=sys.stderr)
            return 130
        names = config.model.served_model_name or (config.model.model or DEFAULT_NAME,)
        metrics = EngineMetrics(names[0], max_model_len=ready.max_model_len, cache=cache_facts(config, ready))
        engine.listeners.append(metrics)
        if config.log_stats:
            engine.listeners.append(StatsLog())
        app = create_app(
            engine, settings, model_names=names, model_root=config.model.model or DEFAULT_NAME, metrics=metrics
        )
        stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in ready.startup_s.items())
        log.info("start-up: %s", stages)
        server = HttpServer(app, settings, on_give_up=engine.shutdown)
        sock.listen(2048)
        print(banner(ready, names[0], url_of(settings, sock), settings), flush=True)
        heart = asyncio.ensure_future(app.state.serving.watch_engine()) if settings.heartbeat_timeout else None
        await server.serve(sockets=[sock])
        if heart is not None:
            heart.cancel()
        return 0
    finally:
        await engine.shutdown()
        sock.close()
        if settings.uds is not None:
            Path(settings.uds).unlink(missing_ok=True)


def raise_file_limit() -> None:
    """As many open connections as the system allows, not as many as the shell set."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def start_engine(engine: AsyncEngine, config: EngineConfig) -> CoreReady:
    """Start it with a progress bar; SIGTERM and SIGINT give up. Raises StartupError, Interrupted."""
    loop = asyncio.get_running_loop()
    came: asyncio.Future[str] = loop.create_future()

    def on_signal(name: str) -> None:
        if not came.done():
            came.set_result(name)

    signals = (signal.SIGTERM, signal.SIGINT)
    for number in signals:
        loop.add_signal_handler(number, on_signal, number.name)
    try:
        with StartupBar(True) as bar:
            starting = asyncio.ensure_future(engine.start(bar.update))
            waited: set[asyncio.Future[Any]] = {starting, came}
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
                raise Interrupted(came.result())
            return starting.result()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def cache_facts(config: EngineConfig, ready: CoreReady) -> dict[str, str]:
    """Labels of cache_config_info."""
    return {
        "block_size": str(ready.page_tokens),
        "num_gpu_blocks": str(ready.num_pages),
        "cache_dtype": config.cache.kv_cache_dtype,
        "enable_prefix_caching": str(config.cache.enable_prefix_caching),
        "gpu_memory_utilization": str(config.cache.gpu_memory_utilization),
    }


def banner(ready: CoreReady, model: str, url: str, settings: ServerSettings) -> str:
    """One line of facts, notes, and a curl line that works as it stands."""
    reason = f" ({ready.backend_reason})" if ready.backend_reason else ""
    facts = [
        f"twinfer {version()}",
        f"backend {ready.backend}{reason}",
        f"device {ready.device}",
        f"model {model}",
        ready.dtype,
        f"{ready.kv_tokens:,} KV tokens",
        f"ready in {sum(ready.startup_s.values()):.1f} s, {ready.num_compiles} compiled",
        url,
    ]
    body = json.dumps({"model": model, "prompt": "def add(a, b):", "max_tokens": 32, "temperature": 0})
    words = ["curl", f"{url}/v1/completions"]
    if settings.uds is not None:
        words = ["curl --unix-socket", settings.uds, "http://localhost/v1/completions"]
    words.append("-H 'Content-Type: application/json'")
    if settings.api_key:
        words.append('-H "Authorization: Bearer $TWINFER_API_KEY"')
    words.append("-d " + shell_quoted(body))
    return "\n".join([" | ".join(facts), *(f"note: {note}" for note in ready.notes), " ".join(words)])


def shell_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
