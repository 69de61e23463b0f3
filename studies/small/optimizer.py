"""The optimizer and schedule of every stage: Muon for matrices, AdamW for the rest, at one-cycle rates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flexattn_cuda.errors import InputError

_ADAMW_RATE = 2e-3


def require_muon() -> None:
    """Raise InputError if this torch has no Muon."""
    if not hasattr(torch.optim, "Muon"):
        raise InputError(f"the study trains with torch.optim.Muon; upgrade torch {torch.__version__} to 2.9 or newer")


class MuonAndAdamW(torch.optim.Optimizer):
    """Muon for the matrices between layers, AdamW for everything else.

    The two optimizers hold the state; this one's own is empty.

    Args:
        parameters: By name; embeddings and heads are recognised by theirs.
        rate: Muon's peak learning rate. AdamW's is 2e-3.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], rate: float):
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and "embed" not in n and "head" not in n}
        others = [p for n, p in parameters.items() if n not in matrices]
        self.parts = (
            torch.optim.Muon(list(matrices.values()), lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=_ADAMW_RATE, weight_decay=0.01, betas=(0.9, 0.98)),
        )
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """Return the parts' own group dicts, so that a schedule of this optimizer changes their rates."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:
        """Step both parts."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both parts from `state_dict()`."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """Return a schedule that raises each group's rate to its own in a tenth of the steps, then lowers it to near 0."""
    rates = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps, pct_start=max(0.1, 2 / steps), cycle_momentum=False
    )


def train_first_layers(language: nn.Module, count: int) -> dict[str, nn.Parameter]:
    """Freeze a language model but for its embeddings and first layers, and return their parameters by name."""
    names = ("embed_tokens", *(f"layers.{number}." for number in range(count)))
    return train_only(language, lambda name: name.startswith(names))


def train_only(model: nn.Module, wanted: Callable[[str], bool]) -> dict[str, nn.Parameter]:
    """Freeze all parameters but those with the wanted names, and return these by name."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
