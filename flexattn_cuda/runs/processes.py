"""The processes that torchrun or `accelerate launch` started, and the objects they exchange."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from flexattn_cuda import devices
from flexattn_cuda.errors import CheckpointError, InputError

Made = TypeVar("Made")
_SECONDS_BETWEEN_LOOKS = 1.0


class Processes:
    """The processes that share the work: those that torchrun or `accelerate launch` started, or this one alone.

    Both launchers set the same environment variables. The processes exchange a few Python objects, through the CPU.

    Attributes:
        rank: The number of this process, from 0.
        count: The number of processes.
    """

    def __init__(self) -> None:
        self.rank, self._local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            _end_with_launcher()
        self._owns_default_group = False
        self._group: distributed.ProcessGroup | None = None

    def __enter__(self) -> Processes:
        if self.count > 1:
            self._owns_default_group = not distributed.is_initialized()
            if self._owns_default_group:
                distributed.init_process_group("gloo")
            # The first process to finish waits for the last one, which may take any time.
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=365))
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_default_group:
            distributed.destroy_process_group()

    def device(self, device: str | torch.device | None) -> torch.device:
        """Return the device of this process: of several, each takes the GPU of its local rank unless one is numbered.

        Raises:
            InputError: If the device is unknown or cannot be used.
        """
        chosen = devices.choose_device(device)
        if self.count > 1 and chosen.type == "cuda" and chosen.index is None:
            return devices.choose_device(f"cuda:{self._local_rank}")
        return chosen

    def broadcast_from_rank0(self, make: Callable[[], Made]) -> Made:
        """Call `make` in process 0 and return its result in all; an InputError or CheckpointError is raised in all."""
        if self.count == 1:
            return make()
        sent: list[Any] = [None]
        if self.rank == 0:
            try:
                sent = [make()]
            except (InputError, CheckpointError) as error:
                sent = [error]
        distributed.broadcast_object_list(sent, src=0, group=self._group)
        if isinstance(sent[0], Exception):
            raise sent[0]
        return sent[0]

    def gather_to_rank0(self, part: Made) -> list[Made]:
        """Return the parts of all processes in process 0, and an empty list in the others."""
        if self.count == 1:
            return [part]
        parts: list[Any] | None = [None] * self.count if self.rank == 0 else None
        distributed.gather_object(part, parts, dst=0, group=self._group)
        return parts or []


@functools.cache
def _end_with_launcher() -> None:
    """End this process when its launcher is gone.

    torchrun ends its workers itself, unless it is killed; they would wait for each other until a timeout of half an
    hour.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, name="flexattn-launcher", daemon=True).start()
