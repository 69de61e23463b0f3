"""The routes."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from flexattn_cuda.serve import chat, responses
from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.guard import Guard, Limits
from flexattn_cuda.serve.schemas import ChatRequest, ResponsesRequest
from flexattn_cuda.serve.service import MIB, Service

_PAGE = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_LOG = logging.getLogger(__name__)


def create_app(service: Service) -> FastAPI:
    """Return the ASGI application that serves a model; its lifespan starts and stops the engine."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await anyio.to_thread.run_sync(service.engine.stop)

    # Without pages of FastAPI's own: they load scripts from elsewhere.
    app = FastAPI(title="flexattn", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    _add_api(app, service)
    page = _add_page(app)
    _add_errors(app)
    options = service.options
    limits = Limits(
        token=options.token,
        max_bytes=int(options.max_request * MIB),
        max_pending_bytes=int(options.max_pending * MIB),
        max_requests=options.queue + options.batch_size,
        timeout=options.timeout,
    )
    known = page | {"/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/responses"}
    app.add_middleware(
        Guard, limits=limits, metrics=service.metrics, open_paths=page | {"/health"}, known_paths=frozenset(known)
    )
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        alive = service.engine.alive
        return JSONResponse({"status": "ok" if alive else "stopping"}, 200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.name:
            raise RequestError(f"there is no such model; this server has {service.name!r}", 404, "model_not_found")
        return service.card()

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await chat.complete(service, request, body)

    @app.post("/v1/responses")
    async def create_response(request: Request, body: ResponsesRequest) -> Response:
        return await responses.respond(service, request, body)


def _add_page(app: FastAPI) -> frozenset[str]:
    """Serve the files of the page, which are read once, and return their paths."""
    paths = set()
    for file in sorted(_PAGE.iterdir()):
        path = "/" if file.name == "index.html" else f"/{file.name}"
        response = Response(file.read_bytes(), media_type=_TYPES[file.suffix], headers=_PAGE_HEADERS)
        app.add_api_route(path, _always(response), methods=["GET", "HEAD"], include_in_schema=False)
        paths.add(path)
    return frozenset(paths)


def _always(response: Response) -> Any:
    async def answer() -> Response:
        return response

    return answer


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"][1:])
        message = first["msg"].removeprefix("Value error, ")
        return JSONResponse(RequestError(f"{place}: {message}" if place else message, param=place or None).body(), 400)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return JSONResponse(RequestError(str(error.detail), error.status_code).body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        _LOG.error("a request failed", exc_info=error)
        failed = RequestError("the request failed; the server's log says why", 500, "internal_error")
        return JSONResponse(failed.body(), 500)
