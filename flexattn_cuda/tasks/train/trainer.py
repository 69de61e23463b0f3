"""The trainer, its loss, and the choice of what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainingArguments

from flexattn_cuda.checkpoints import adapters
from flexattn_cuda.checkpoints.projections import is_projection
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.attach import attached_model, save_adapter
from flexattn_cuda.tasks.train.checkpoints import checkpoint_folder, last_complete_checkpoint, mark_complete, writing
from flexattn_cuda.tasks.training_data import IGNORED

_IN_PART: dict[str, Callable[[str], bool]] = {
    "all": lambda name: "vision_tower." not in name,
    "projector": lambda name: "multi_modal_projector." in name,
    "hr": is_projection,
}


def answer_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: Any,
) -> torch.Tensor:
    """Return the cross-entropy of the answer tokens, in float32, or in float64 if the logits are.

    Args:
        logits: [B, N, V] of any floating-point dtype.
        labels: [B, N] int64. Position x is predicted by the logits of x - 1, unless its label is -100.
        vocab_size: Unused; transformers passes it to every loss.
        num_items_in_batch: Number of answer tokens to divide the sum by; by default those of this call.
    """
    is_answer = labels[:, 1:] != IGNORED
    rows = logits[:, :-1][is_answer]  # only these are converted: prompts have many times as many rows
    total = functional.cross_entropy(
        rows.to(torch.promote_types(rows.dtype, torch.float32)), labels[:, 1:][is_answer], reduction="sum"
    )
    return total / (is_answer.sum() if num_items_in_batch is None else num_items_in_batch)


def choose_trained(model: nn.Module, part: str) -> None:
    """Let gradients reach a part of the model and no other.

    Args:
        model: The model.
        part: "all" (except the vision tower), "projector" or "hr" (the projections for HR tokens).

    Raises:
        InputError: If there is no such part.
    """
    if part not in _IN_PART:
        raise InputError(f"the part to train is {part!r}; allowed: {', '.join(_IN_PART)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_IN_PART[part](name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("this system has no projections for high-resolution tokens to train; choose another part")


class _AnswerLoss:
    """`answer_loss` in place of a model's own loss function.

    Attributes:
        answers: Number of answer tokens to divide by in a model that does not hand it on.
        computed: Whether the model has called it.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self.answers: torch.Tensor | int | None = None
        self.computed = False

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the loss, in a form that gradients can be asked of, also where nothing that is trained took part: HR
        projections, in a batch without images.

        It is called inside the model's forward, where DistributedDataParallel finds out which weights take part.
        """
        self.computed = True
        loss = answer_loss(*args, **{"num_items_in_batch": self.answers, **kwargs})
        if torch.is_grad_enabled() and not loss.requires_grad:
            for weight in self._model.parameters():
                if weight.requires_grad:
                    loss = loss + 0 * weight.sum()
        return loss


class FlexAttnTrainer(Trainer):
    """transformers' Trainer for `FlexAttnLlavaForConditionalGeneration`, a model that FlexAttention was attached to, or
    PEFT's wrapper of either.

    A batch is what the model's `forward` takes, with labels: pixels, or `image_features` and `hr_features` that were
    encoded before. In training, the attention to HR tokens is weighted with `FlexAttnConfig.alpha` of the epochs done.
    The loss is the mean over the answer tokens of all processes and of all batches that a step accumulates.

    A checkpoint that `last_complete_checkpoint` accepts is complete, whenever the run was interrupted. Every checkpoint
    is preceded by an entry of the loss.

    Raises:
        InputError: If the loss or the norm of its gradient becomes NaN or infinite while training, or the model
            computes its loss without its loss function (Gemma3 in transformers 5.0).
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments, **kwargs: Any):
        self._loss = _AnswerLoss(model)
        getattr(model, "get_base_model", lambda: model)().loss_function = self._loss
        super().__init__(model, args, **kwargs)
        self.model_accepts_loss_kwargs = True  # whatever the model says: see _AnswerLoss

    @property
    def hr_alpha(self) -> float:
        """The weight of the attention to HR tokens in the next step."""
        settings = self.accelerator.unwrap_model(self.model).flexattn_settings
        return 1.0 if settings is None else settings.alpha(self.state.epoch or 0.0)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if model.training:
            inputs = {**inputs, "hr_alpha": self.hr_alpha}
        self._loss.answers, self._loss.computed = num_items_in_batch, False
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not self._loss.computed:
            kind = self.accelerator.unwrap_model(model).config.model_type
            raise InputError(f"this version of transformers computes the loss of {kind} by itself; install a newer one")
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        # Non-finite gradients spoil the weights that are saved next, except that loss scaling skips their step.
        watched = ("loss",) if self.args.fp16 else ("loss", "grad_norm")
        if any(not math.isfinite(logs.get(name, 0.0)) for name in watched):
            checkpoint = last_complete_checkpoint(self.args.output_dir)
            raise InputError(
                f"the loss of step {self.state.global_step} or its gradient is NaN or infinite; it was not saved, "
                + (f"the last complete checkpoint is {checkpoint}" if checkpoint else "and there is no checkpoint")
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.control.should_log |= self.control.should_save  # the last step may not be one of those that are logged
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load through the model class: transformers skips weights whose names in the file differ from the model's."""
        model = self.model if model is None else model
        has_own_form = self.is_fsdp_enabled or self.is_deepspeed_enabled or hasattr(model, "peft_config")
        if has_own_form:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
        return None

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = checkpoint_folder(self.args.output_dir, self.state.global_step)
        with writing(folder):
            super()._save_checkpoint(*args, **kwargs)
            self.accelerator.wait_for_everyone()  # every process writes a part of its own
            if self.args.should_save:
                mark_complete(folder)


class AdapterTrainer(FlexAttnTrainer):
    """Trains the HR projections of a model that FlexAttention was attached to: what it writes are adapters."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, self.args.output_dir if output_dir is None else output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        family = attached_model(self.model if model is None else model).hr_family
        adapters.read(resume_from_checkpoint).load_into(family.text_model, family.hr_layers)
