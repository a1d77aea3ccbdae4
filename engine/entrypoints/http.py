"""The FastAPI application: `create_app(engine, settings, ...)`. Routes get a Serving, never a global."""

from __future__ import annotations

import time

from fastapi import APIRouter, FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from engine.entrypoints.disconnect import ClientLeft
from engine.entrypoints.engine_client import ServingEngine
from engine.entrypoints.gate import Gate, hash_keys
from engine.entrypoints.http_errors import HttpError
from engine.entrypoints.openai.routes import openai_router
from engine.entrypoints.serving import Serving, json_response
from engine.entrypoints.settings import ServerSettings
from engine.entrypoints.version import version
from engine.errors import EngineDead, RequestError
from engine.metrics.export import EngineMetrics, HttpMetrics, MetricsPage


def create_app(
    engine: ServingEngine,
    settings: ServerSettings,
    *,
    model_names: tuple[str, ...],
    model_root: str = "",
    metrics: EngineMetrics | None = None,
) -> FastAPI:
    """The application over a started engine. `app.state.serving` is its Serving (the drain switch is there)."""
    http_metrics = HttpMetrics()
    serving = Serving(
        engine=engine,
        settings=settings,
        model_names=model_names,
        model_root=model_root or model_names[0],
        http_metrics=http_metrics,
        page=MetricsPage(http_metrics, *((metrics,) if metrics else ())),
        started=time.time(),
    )
    app = FastAPI(
        title="twinfer",
        version=version(),
        redirect_slashes=False,
        docs_url=None if settings.disable_docs else "/docs",
        redoc_url=None,
        openapi_url=None if settings.disable_docs else "/openapi.json",
    )
    app.state.serving = serving
    app.include_router(openai_router(serving))
    app.include_router(operations_router(serving))
    add_error_handlers(app, serving)
    app.add_middleware(Gate, digests=hash_keys(settings.api_key), metrics=http_metrics)
    if settings.allowed_origins:  # outside the gate: a browser's preflight carries no key
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.allowed_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def operations_router(serving: Serving) -> APIRouter:
    """Probes, version, load and metrics."""
    router = APIRouter()

    @router.get("/livez")
    async def livez() -> Response:
        return json_response({"status": "alive"})

    async def readyz() -> Response:
        if serving.is_ready:
            return json_response({"status": "ready"})
        return json_response({"status": serving.state}, 503)

    for path in ("/readyz", "/health", "/ping"):
        router.add_api_route(path, readyz, methods=["GET"])
    router.add_api_route("/ping", readyz, methods=["POST"], operation_id="ping_post")

    @router.get("/version")
    async def show_version() -> Response:
        return json_response({"version": version()})

    @router.get("/load")
    async def load() -> Response:
        return json_response({"server_load": serving.active})

    @router.get("/metrics")
    async def metrics() -> Response:
        return Response(serving.page.render(), headers={"content-type": serving.page.content_type})

    return router


def add_error_handlers(app: FastAPI, serving: Serving) -> None:
    """Every error in the OpenAI body."""

    async def known(request: Request, error: Exception) -> Response:
        return serving.error_response(error, request.state.request_id)

    async def left(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    async def http(request: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        path = request.url.path[:128]
        message, code = {
            404: (f"there is no route {path!r}", "not_found"),
            405: (f"{request.method} is not allowed on {path!r}", "method_not_allowed"),
        }.get(status, ("the request cannot be answered", "http_error"))
        headers = error.headers if isinstance(error, HTTPException) else None
        return Response(HttpError(status, message, code).body(), status, headers, media_type="application/json")

    app.add_exception_handler(RequestError, known)
    app.add_exception_handler(EngineDead, known)
    app.add_exception_handler(ClientLeft, left)
    app.add_exception_handler(HTTPException, http)
