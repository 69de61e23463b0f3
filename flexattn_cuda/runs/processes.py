"""The processes that torchrun or `accelerate launch` started, and what they tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from flexattn_cuda import devices
from flexattn_cuda.errors import CheckpointError, InputError

Made = TypeVar("Made")


class Processes:
    """The processes that share the work: those that torchrun or `accelerate launch` started, or this one alone.

    Both launchers tell a process by the same environment variables who it is. What the processes tell each other are a
    few Python objects, through the CPU.
    """

    def __init__(self) -> None:
        self.rank, self._local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self._began_them = False
        self._group: distributed.ProcessGroup | None = None

    def __enter__(self) -> Processes:
        if self.count > 1:
            self._began_them = not distributed.is_initialized()
            if self._began_them:
                distributed.init_process_group("gloo")
            # The first process to end waits for the last one, which may take as long as it likes.
            self._group = distributed.new_group(backend="gloo", timeout=timedelta(days=365))
        return self

    def __exit__(self, *_: object) -> None:
        if self._began_them:
            distributed.destroy_process_group()

    def device(self, wanted: str | torch.device | None) -> torch.device:
        """The device meant; among several processes, the GPU of the local rank where none is named by its number."""
        chosen = devices.choose_device(wanted)
        if self.count > 1 and chosen.type == "cuda" and chosen.index is None:
            return devices.choose_device(f"cuda:{self._local_rank}")
        return chosen

    def broadcast_from_rank0(self, make: Callable[[], Made]) -> Made:
        """What `make` gives in the first process, for all of them; what it refuses, refused in all of them."""
        if self.count == 1:
            return make()
        told: list[Any] = [None]
        if self.rank == 0:
            try:
                told = [make()]
            except (InputError, CheckpointError) as error:
                told = [error]
        distributed.broadcast_object_list(told, src=0, group=self._group)
        if isinstance(told[0], Exception):
            raise told[0]
        return told[0]

    def gather_to_rank0(self, part: Made) -> list[Made]:
        """The parts of all processes in the first one, nothing in the others."""
        if self.count == 1:
            return [part]
        parts: list[Any] | None = [None] * self.count if self.rank == 0 else None
        distributed.gather_object(part, parts, dst=0, group=self._group)
        return parts or []
