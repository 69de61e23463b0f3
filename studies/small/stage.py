"""The training loop of the shared stages."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from studies.small.optimizer import MuonAndAdamW, one_cycle

console = Console()


class Stage(ABC):
    """A stage of training: which parameters it trains, and how.

    Attributes:
        name: For the log.
        parameters: Those to train, by name.
        rate: Muon's peak learning rate.
        log_every: Steps between two lines of the log.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    rate: float = 1e-2
    log_every: int = 100

    @abstractmethod
    def loss(self, step: int) -> torch.Tensor:
        """Return the loss of the next batch; `step` counts from 1."""

    @abstractmethod
    def summary(self) -> str:
        """Return a line of held-out figures for the log."""


def train_stage(stage: Stage, steps: int) -> None:
    """Train a stage for a number of steps."""
    optimizer = MuonAndAdamW(stage.parameters, stage.rate)
    schedule = one_cycle(optimizer, steps)
    start, average = time.process_time(), None
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(stage.name, total=steps)
        for step in range(1, steps + 1):
            loss = stage.loss(step)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(stage.parameters.values(), 1.0)
            optimizer.step()
            schedule.step()
            average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
            progress.update(task, advance=1, description=f"{stage.name}, loss {average:.3f}")
            if step % stage.log_every == 0 or step == steps:
                seconds = time.process_time() - start
                console.log(f"{stage.name} {step}/{steps} loss {average:.3f} {stage.summary()} {seconds:.0f} CPU s")
