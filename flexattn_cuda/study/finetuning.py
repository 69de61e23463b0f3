"""Fine-tuning of one system, the same for all, by the trainer of `flexattn train`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from flexattn_cuda.study.encoded_scenes import Pick
from flexattn_cuda.training import FlexAttnTrainer, last_complete_checkpoint


def fine_tune(
    model: Any,
    picks: torch.utils.data.Dataset,
    collate: Callable[[Sequence[Pick]], dict[str, torch.Tensor]],
    folder: Path,
    batch: int,
    rate: float,
    seed: int,
    tell: Callable[[str], None],
) -> list[float]:
    """Trains the language model and what the system adds to it; goes on from a checkpoint in `folder`.

    Args:
        picks: All questions of the run, in batches of `batch` one after the other.
    Returns:
        The loss of each step.
    """
    model.requires_grad_(False)
    model.model.language_model.requires_grad_()
    model.lm_head.requires_grad_()
    steps = len(picks) // batch
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        save_steps=max(1, steps // 4),
        save_total_limit=2,
        logging_steps=1,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = FlexAttnTrainer(model, arguments, train_dataset=picks, data_collator=collate, callbacks=[_Told(tell)])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder) if folder.exists() else None)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _Told(TrainerCallback):
    """The average loss, ten times in a run."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = max(1, state.max_steps // 10)
        losses = [entry["loss"] for entry in state.log_history[-every:] if "loss" in entry]
        if losses and state.global_step % every == 0:
            self._tell(f"step {state.global_step} of {state.max_steps}, loss {sum(losses) / len(losses):.3f}")
