"""From options to a server that listens."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

import uvicorn

from flexattn_cuda.errors import InputError
from flexattn_cuda.serve.app import create_app
from flexattn_cuda.serve.service import Service
from flexattn_cuda.tasks.load import load
from flexattn_cuda.tasks.models import TrainingProcessor
from flexattn_cuda.tasks.options import TOKEN_VARIABLE, ServeOptions

DEFAULT_NAME = "flexattn-default"
_GRACE = 10  # seconds that answers have to be finished in after SIGTERM or Ctrl-C


def serve(options: ServeOptions, announce: Callable[[str], None] = print) -> None:
    """Serve a model until SIGTERM or Ctrl-C; answers that are under way are finished first.

    Args:
        options: Of the server.
        announce: Called with the address of the page when requests are answered.

    Raises:
        InputError: If the address cannot be used, or needs a token.
        CheckpointError: If the model cannot be loaded.
    """
    options = replace(options, token=options.token or os.environ.get(TOKEN_VARIABLE) or None)
    listener = _bind(options)  # before the model is loaded, so that a port in use is known at once
    with listener:
        model, processor = load(
            options.model, options.device, options.dtype, adapter=options.adapter, quantize=options.quantize
        )
        service = Service(model, cast(TrainingProcessor, processor), options, options.name or _name(options.model))
        config = uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=_GRACE,
            timeout_keep_alive=30,
            limit_concurrency=4 * (options.queue + options.batch_size) + 64,
            ws="none",
        )
        server = _Announcing(config, lambda: announce(_address(listener)))
        server.run(sockets=[listener])


class _Announcing(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]):
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()


def _bind(options: ServeOptions) -> socket.socket:
    try:
        [(family, _, _, _, address), *_] = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        if options.token is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise InputError(
                f"{options.host} can be reached from other machines; set {TOKEN_VARIABLE} or pass --token, or leave "
                "--host out"
            )
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(
            f"cannot listen on {options.host}, port {options.port}: {reason}; choose another with --host or --port"
        ) from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def _name(model: str | None) -> str:
    """Return the name of a model in the API: a hub id as it is, a folder by its own name."""
    if model is None:
        return DEFAULT_NAME
    return Path(model).resolve().name if Path(model).exists() else model
