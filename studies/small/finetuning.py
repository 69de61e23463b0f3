"""Fine-tunes a system with the trainer of `flexattn train`, in the same way for all, and asks it all questions."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.tasks.train import FlexAttnTrainer, last_complete_checkpoint
from studies.small.backbones import BACKBONES
from studies.small.batches import question_batch
from studies.small.encoded_scenes import EncodedScenes, Pick
from studies.small.evaluation import answer_questions, measure_maps, measure_selection
from studies.small.optimizer import MuonAndAdamW, one_cycle, train_only
from studies.small.outcomes import Outcome
from studies.small.presets import Preset, settings_for
from studies.small.results import MAPPED
from studies.small.start import selected_share


def run_system(folder: Path, seed: int, system: str, preset: Preset, tell: Callable[[str], None]) -> None:
    """Fine-tune a system from the seed's start, ask it all questions, and write its checkpoint and outcome.

    Args:
        folder: The seed's folder.
        seed: The seed.
        system: One of SYSTEMS.
        preset: How much is done.
        tell: Takes progress messages.
    """
    started = time.process_time()
    settings = settings_for(system, preset.sizes, selected_share(folder))
    selects = settings is not None and settings.system == "flexattn"
    torch.manual_seed(seed)
    backbone = BACKBONES[preset.sizes.backbone]
    model, processor = backbone.load_as(folder / "start", settings)
    train_only(model, lambda name: "language_model" in name or "lm_head" in name)
    checkpoints = folder / f"{system}.checkpoints"
    plan = FineTuning(checkpoints, preset.steps, preset.batch, preset.rate, seed)
    losses = fine_tune(model, processor, _load_scenes(folder / "images.pt"), settings, plan, tell)
    seconds = time.process_time() - started
    tell("questions")
    questions = _load_scenes(folder / "questions.pt")
    torch.manual_seed(seed)
    outcome = Outcome(
        answers=answer_questions(model, processor, questions, settings),
        maps=measure_maps(model, processor, questions, settings) if system in MAPPED else [],
        selected=measure_selection(model, processor, questions) if selects else None,
        losses=losses,
        seconds=round(seconds, 1),
    )
    backbone.save(model, processor, folder / system)
    outcome.write(folder / f"{system}.json")
    shutil.rmtree(checkpoints, ignore_errors=True)


def _load_scenes(path: Path) -> EncodedScenes:
    return torch.load(path, weights_only=False, mmap=True)


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned.

    Attributes:
        folder: For checkpoints; a run resumes from the last complete one.
        steps: Optimizer steps.
        batch: Questions per step.
        rate: Muon's peak learning rate.
        seed: Of the questions and their order.
    """

    folder: Path
    steps: int
    batch: int
    rate: float
    seed: int

    def arguments(self) -> TrainingArguments:
        """Return the trainer's arguments."""
        return TrainingArguments(
            output_dir=str(self.folder),
            max_steps=self.steps,
            per_device_train_batch_size=self.batch,
            max_grad_norm=1.0,
            save_steps=max(1, self.steps // 4),
            save_total_limit=2,
            logging_steps=1,
            seed=self.seed,
            data_seed=self.seed,
            remove_unused_columns=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )


class TrainingQuestions(torch.utils.data.Dataset):
    """The questions of all steps, the same for every system of a seed."""

    def __init__(self, images: EncodedScenes, plan: FineTuning):
        rng = random.Random(f"fine-tune {plan.seed}")
        self._picks = [pick for _ in range(plan.steps) for pick in images.sample(rng, plan.batch)]

    def __len__(self) -> int:
        return len(self._picks)

    def __getitem__(self, number: int) -> Pick:
        return self._picks[number]


def fine_tune(
    model: Any,
    processor: Any,
    images: EncodedScenes,
    settings: FlexAttnConfig | None,
    plan: FineTuning,
    tell: Callable[[str], None],
) -> list[float]:
    """Train the parameters that require a gradient, or resume from a checkpoint in the plan's folder.

    Args:
        model: The model, left in evaluation mode.
        processor: Of the model.
        images: Scenes to draw questions from.
        settings: Of the system, which say what resolution it sees; None for the low resolution alone.
        plan: Steps, batch, rate, seed and folder.
        tell: Takes progress messages.

    Returns:
        The loss of each step.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = MuonAndAdamW(trained, plan.rate)

    def collate(picks: Sequence[Pick]) -> dict[str, torch.Tensor]:
        return question_batch(images, picks, processor, settings)

    trainer = FlexAttnTrainer(
        model,
        plan.arguments(),
        train_dataset=TrainingQuestions(images, plan),
        data_collator=collate,
        callbacks=[_AverageLoss(tell)],
        optimizers=(optimizer, one_cycle(optimizer, plan.steps)),
    )
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_complete_checkpoint(plan.folder) if plan.folder.exists() else None
    if checkpoint is not None:
        tell(f"resuming from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class _AverageLoss(TrainerCallback):
    """Reports the average loss ten times in a run."""

    def __init__(self, tell: Callable[[str], None]):
        self._tell = tell

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        every = max(1, state.max_steps // 10)
        losses = [entry["loss"] for entry in state.log_history[-every:] if "loss" in entry]
        if losses and state.global_step % every == 0:
            self._tell(f"step {state.global_step} of {state.max_steps}, loss {sum(losses) / len(losses):.3f}")
