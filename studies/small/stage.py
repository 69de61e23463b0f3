"""The training loop of the shared stages."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

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


def train_stage(stage: Stage, steps: int, keep: Path | None = None) -> None:
    """Train a stage for a number of steps.

    Args:
        stage: The stage. If it is to be resumed, its losses depend on nothing but the parameters and the step.
        steps: Number of steps.
        keep: Where to write parameters and optimizer with each line of the log, and to resume from; deleted at the end.
    """
    optimizer = MuonAndAdamW(stage.parameters, stage.rate)
    schedule = one_cycle(optimizer, steps)
    state = _StageState(stage, optimizer, schedule, keep)
    done = state.read()
    start, average = time.process_time(), None
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(stage.name, total=steps, completed=done)
        for step in range(done + 1, steps + 1):
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
                state.write(step)
    state.remove()


@dataclass(frozen=True)
class _StageState:
    """What a stage that was stopped goes on from, in the file `keep`; nothing if that is None."""

    stage: Stage
    optimizer: MuonAndAdamW
    schedule: torch.optim.lr_scheduler.LRScheduler
    keep: Path | None

    def read(self) -> int:
        """Restore what the file holds, and return the number of steps that are done."""
        if self.keep is None or not self.keep.exists():
            return 0
        state = torch.load(self.keep)
        with torch.no_grad():
            for name, parameter in self.stage.parameters.items():
                parameter.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        console.log(f"{self.stage.name}: going on after step {state['step']}")
        return state["step"]

    def write(self, step: int) -> None:
        """Write the file, which is never seen half written."""
        if self.keep is None:
            return
        unfinished = self.keep.with_suffix(".new")
        state = {"parameters": self.stage.parameters, "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"schedule": self.schedule.state_dict(), "step": step}, unfinished)
        os.replace(unfinished, self.keep)

    def remove(self) -> None:
        """Delete the file."""
        if self.keep is not None:
            self.keep.unlink(missing_ok=True)
