"""One system of a seed: fine-tuned by the trainer of `flexattn train`, in the same way for all, and asked all questions."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from flexattn_cuda.runs.files import write_atomically
from flexattn_cuda.tasks.train import FlexAttnTrainer, last_complete_checkpoint
from studies.small.encoded_scenes import EncodedScenes, Pick
from studies.small.evaluation import answers, attention_in_boxes, selection
from studies.small.presets import Preset, settings_for
from studies.small.pretraining import MuonAndAdamW, one_cycle, trained
from studies.small.results import MAPPED
from studies.small.start import load


def run_system(folder: Path, seed: int, system: str, preset: Preset, tell: Callable[[str], None]) -> None:
    """Fine-tunes one system and asks it all questions."""
    begun = time.process_time()
    started = json.loads((folder / "start" / "start.json").read_text())
    settings = settings_for(system, preset.sizes, started["selected"]["share"])
    torch.manual_seed(seed)
    model, processor = load(folder / "start", settings)
    images = torch.load(folder / "images.pt", weights_only=False, mmap=True)
    trained(model, lambda name: "language_model" in name or "lm_head" in name)
    losses = fine_tune(
        model, Picks(images, preset.steps, preset.batch, seed), lambda picks: images.batch(picks, processor, settings),
        folder / f"{system}.checkpoints", preset.batch, preset.rate, seed, tell,
    )  # fmt: skip
    del images
    seconds = time.process_time() - begun
    tell("questions")
    questions = torch.load(folder / "questions.pt", weights_only=False, mmap=True)
    torch.manual_seed(seed)
    rows = answers(model, processor, questions, settings)
    maps = attention_in_boxes(model, processor, questions, settings) if system in MAPPED else []
    selected = selection(model, processor, questions) if model.config.system == "flexattn" else None
    model.save_pretrained(folder / system)
    processor.save_pretrained(folder / system)
    outcome = {
        "answers": rows,
        "maps": maps,
        "selected": selected,
        "losses": losses,
        "seconds": round(seconds, 1),
    }
    write_atomically(folder / f"{system}.json", json.dumps(outcome))
    shutil.rmtree(folder / f"{system}.checkpoints", ignore_errors=True)


class Picks(torch.utils.data.Dataset):
    """The questions of all steps, the same for every system of a seed."""

    def __init__(self, images: EncodedScenes, steps: int, batch: int, seed: int):
        rng = random.Random(f"fine-tune {seed}")
        self.picks = [pick for _ in range(steps) for pick in images.sample(rng, batch)]

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, number: int):
        return self.picks[number]


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
    """Trains the parameters that require a gradient, as all stages do: `MuonAndAdamW` at `rate`, in one cycle. Goes on from a
    checkpoint in `folder`.

    Args:
        picks: All questions of the run; the trainer shuffles them by `seed`.
    Returns:
        The loss of each step.
    """
    steps = len(picks) // batch
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
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
    optimizer = MuonAndAdamW({name: p for name, p in model.named_parameters() if p.requires_grad}, rate)
    trainer = FlexAttnTrainer(
        model, arguments, train_dataset=picks, data_collator=collate, callbacks=[_Told(tell)],
        optimizers=(optimizer, one_cycle(optimizer, steps)),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    checkpoint = last_complete_checkpoint(folder) if folder.exists() else None
    if checkpoint is not None:
        tell(f"goes on from {checkpoint.name}")
    trainer.train(resume_from_checkpoint=checkpoint)
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
