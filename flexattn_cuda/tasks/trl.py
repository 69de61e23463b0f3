"""Train models that FlexAttention was attached to with the trainers of TRL.

trainer = with_model_loss(SFTTrainer)(model, args, train_dataset=data, processing_class=processor_for(model))
"""

from __future__ import annotations

from typing import Any, TypeVar

from transformers import Trainer

TrainerClass = TypeVar("TrainerClass", bound=type[Trainer])


def with_model_loss(trainer_class: TrainerClass) -> TrainerClass:
    """Return a trainer of TRL that takes the loss from the model's own forward.

    TRL calls the model without its head, past its forward, to compute the loss in parts. There is no way for
    high-resolution images on that path, nor for the labels that say which rows see them. The metrics that TRL computes
    beside the loss (entropy, accuracy of tokens) are not logged.

    Args:
        trainer_class: SFTTrainer, or a subclass of it.
    """
    return type(trainer_class.__name__, (trainer_class,), {"compute_loss": _compute_loss})  # type: ignore[return-value]


def _compute_loss(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
    return Trainer.compute_loss(trainer, *args, **kwargs)
