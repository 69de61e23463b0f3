"""Training, on transformers' Trainer: several processes, sharded states and mixed precision come from there and accelerate.

flexattn train --data records.json --images DIR --model DIR --output OUT

OUT/checkpoint-N/   what a run goes on from after an interruption; complete.json in it is written last
OUT/loss.csv        step, epoch, loss, grad_norm, learning_rate
OUT/broken.jsonl    the records that were left out, and why
OUT                 in the end: the model and its processor, for `flexattn ask --model OUT`
"""

from __future__ import annotations

import csv
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.training_args import OptimizerNames

from flexattn_cuda import devices
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.llava.model import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.runs.files import locked_folder, to_disk, told, write_whole
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.runs.progress import Progress
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.training_data import IGNORED, Broken

_COMPLETE = "complete.json"
_OPTIMIZERS = {"adamw": "adamw_torch"}
_SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)  # need no arguments
_PRECISIONS = ("auto", "float32", "float16", "bfloat16", "float64")
_TRAINED: dict[str, Callable[[str], bool]] = {
    "all": lambda name: "vision_tower." not in name,
    "projector": lambda name: "multi_modal_projector." in name,
    "hr": lambda name: "_proj_hd." in name or ".cross_attn." in name,
}


# -------------------------------------------------------------------------------------------------------------- trainer


def answer_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: Any,
) -> torch.Tensor:
    """Cross-entropy of the answer tokens, in float32, or in float64 where the logits are.

    Args:
        logits: [B, N, V] of any dtype.
        labels: [B, N] int64; position x is predicted by the logits of x - 1, unless it is -100.
        num_items_in_batch: Answer tokens that the sum is divided by; those of this call when None.
    """
    wanted = labels[:, 1:] != IGNORED
    rows = logits[:, :-1][wanted]  # only these are converted: the prompts' rows are many times more
    total = functional.cross_entropy(
        rows.to(torch.promote_types(rows.dtype, torch.float32)),
        labels[:, 1:][wanted],
        reduction="sum",
    )
    return total / (wanted.sum() if num_items_in_batch is None else num_items_in_batch)


def require_accelerate() -> None:
    """InputError where it is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("training needs the package accelerate: pip install 'flexattn_cuda[train]'")


class FlexAttnTrainer(Trainer):
    """transformers' Trainer for `FlexAttnLlavaForConditionalGeneration`.

    A batch is what the model's `forward` takes, with labels: pixels, or `image_features` and `hr_features` that were encoded
    before. In training the attention to HR tokens is mixed in with `FlexAttnConfig.alpha` of the epochs done. The loss is the
    mean over the answer tokens of all processes and of all batches that a step accumulates. A checkpoint in which
    `last_complete_checkpoint` finds everything is whole, whenever the run was ended. Every checkpoint is preceded by an entry
    of the loss, and InputError is raised where that is not a finite number.
    """

    def __init__(self, model: FlexAttnLlavaForConditionalGeneration, args: TrainingArguments, **kwargs: Any):
        model.loss_function = answer_loss
        super().__init__(model, args, **kwargs)

    @property
    def hr_alpha(self) -> float:
        """The weight of the attention to HR tokens in the step that comes next."""
        settings = self.accelerator.unwrap_model(self.model).config.flexattn
        return 1.0 if settings is None else settings.alpha(self.state.epoch or 0.0)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if model.training:
            inputs = {**inputs, "hr_alpha": self.hr_alpha}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        super().log(logs, *args, **kwargs)
        # Such gradients spoil the weights that are saved; only the loss scaling of float16 leaves their step out.
        told = ("loss",) if self.args.fp16 else ("loss", "grad_norm")
        if any(not math.isfinite(logs.get(name, 0.0)) for name in told):
            whole = last_complete_checkpoint(self.args.output_dir)
            raise InputError(
                f"the loss of step {self.state.global_step} or its gradient is not a number; nothing of it was saved, "
                + (f"the last complete checkpoint is {whole}" if whole else "and there is no checkpoint before it")
            )

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.control.should_log |= self.control.should_save  # the last step need not be one of those that are logged
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """transformers passes over weights whose names in the file are not those in the model, as LLaVA's are not."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # they keep states of their own
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        model = self.model if model is None else model
        saved = type(model).from_pretrained(resume_from_checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # every process writes a part of its own
        if self.args.should_save:
            _mark_complete(Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")


def _mark_complete(folder: Path) -> None:
    """Lists the files with their sizes, last of all, when they are on the disk."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _COMPLETE):
        with open(path, "rb") as file:
            to_disk(file)
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_whole(folder / _COMPLETE, json.dumps(sizes))


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _COMPLETE).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, the latest first, complete or not."""
    found = [
        (re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-([0-9]+)", path.name), path)
        for path in output.iterdir()
        if path.is_dir()
    ]
    return [path for _, path in sorted(((int(name[1]), path) for name, path in found if name), reverse=True)]


def last_complete_checkpoint(output: str | Path) -> Path | None:
    """The latest checkpoint of a run that was written to its end; None where there is none."""
    return next((folder for folder in _checkpoints(Path(output)) if _is_complete(folder)), None)


def choose_trained(model: nn.Module, part: str) -> None:
    """Lets gradients into a part of the model: "all" (all but the vision tower), "projector", "hr" (the projections for HR
    tokens)."""
    if part not in _TRAINED:
        raise InputError(f"what is trained is {part!r}; allowed: {', '.join(_TRAINED)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_TRAINED[part](name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("this system has no projections for high-resolution tokens to train; choose another part")


# ----------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
        records: How many records the data has.
        broken: Those that were left out.
        losses: The loss of every logged step, those of an interrupted run before included; empty where nothing was trained.
    """

    records: int
    broken: list[Broken]
    losses: dict[int, float]


def train(
    data_file: str | Path,
    images: str | Path,
    output: str | Path,
    model: str | Path | None = None,
    system: str | None = None,
    *,
    epochs: float = 1.0,
    steps: int | None = None,
    batch_size: int = 4,
    accumulate: int = 1,
    learning_rate: float = 2e-5,
    optimizer: str = "adamw",
    schedule: str = "cosine",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    part: str = "all",
    precision: str = "auto",
    gradient_checkpointing: bool = False,
    max_length: int | None = None,
    broken: str = "skip",
    save_every: int = 500,
    keep: int = 2,
    log_every: int = 1,
    seed: int = 0,
    workers: int = 0,
    device: str | None = None,
    tensorboard: bool = False,
    restart: bool = False,
    check_only: bool = False,
    progress: bool = False,
) -> Outcome:
    """Trains a model on data in LLaVA's format (data.py); called again after an interruption, it goes on.

    All records are checked before the first step. In processes that torchrun or `accelerate launch` started, each takes its
    share of every step; what accelerate's configuration says of FSDP or DeepSpeed applies.

    Args:
        data_file: A JSON list, or JSONL.
        images: The folder that the images' paths are relative to.
        output: A folder, see above.
        model: A checkpoint folder or hub id in any of the three formats; None: the small model of this package.
        system: As in `load`.
        epochs: Passes through the data; steps: optimizer steps instead.
        batch_size: Records in a process at a time; accumulate: such batches in a step.
        optimizer: "adamw", "sgd" or another name of transformers; schedule: "cosine", "linear", "constant", ... of
            those in transformers that need no arguments.
        clip: Greatest norm of the gradients; 0 for no limit.
        part: What is trained, as in `choose_trained`.
        precision: "float32", "float64", or mixed: "float16" (with loss scaling) or "bfloat16" on float32 weights. "auto": what
            the GPU is fastest in, float32 on the CPU.
        max_length: Positions that a record may take; the model's limit when None.
        broken: What happens where records are broken: "skip" leaves them out, "refuse" ends the run before its first step.
        save_every: Steps between checkpoints, of which the last `keep` (at least 2: one is always whole) stay.
        log_every: Steps between entries of the loss; divides save_every.
        workers: Processes that prepare the records; 0: this one.
        device: "cpu" or "cuda"; None or "auto": the GPU where it can be used, else the CPU.
        tensorboard: Write TensorBoard logs into output/runs.
        restart: Discard what an earlier run has left.
        check_only: End after the check.
        progress: Tell on stderr how far it is.
    Raises:
        CheckpointError: There is no such checkpoint, or it cannot be loaded.
        InputError: Something cannot be used, an earlier run in `output` had other settings, or the loss is not a number.
    """
    output = Path(output)
    for name, value, least in [
        ("steps", 1 if steps is None else steps, 1),
        ("batch size", batch_size, 1),
        ("accumulate", accumulate, 1),
        ("learning rate", learning_rate, 0),
        ("warmup steps", warmup_steps, 0),
        ("weight decay", weight_decay, 0),
        ("clip", clip, 0),
        ("max length", 1 if max_length is None else max_length, 1),
        ("save every", save_every, 1),
        ("keep", keep, 2),
        ("log every", log_every, 1),
        ("workers", workers, 0),
    ]:
        if not least <= value < math.inf:
            raise InputError(
                f"{name} is {value}; it must be " + (f"at least {least}" if value < least else "a finite number")
            )
    if not 0 < epochs < math.inf:
        raise InputError(f"epochs is {epochs}; it must be more than 0 and finite")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed is {seed}; it must be at least 0 and less than 2**32")
    if save_every % log_every:
        raise InputError(
            f"a checkpoint every {save_every} steps falls between two entries of the loss, every {log_every}"
        )
    if broken not in ("skip", "refuse"):
        raise InputError(f"what is done with broken records is {broken!r}; allowed: skip, refuse")
    require_accelerate()
    if tensorboard and not any(importlib.util.find_spec(name) for name in ("tensorboard", "tensorboardX")):
        raise InputError("TensorBoard logs need the package tensorboard: pip install tensorboard")
    chosen = devices.choose_device(device)
    if chosen.index is not None:
        raise InputError(
            f"the device is {str(device)!r}; allowed: auto, cpu, cuda. CUDA_VISIBLE_DEVICES tells which GPUs are meant"
        )
    on_cpu = chosen.type == "cpu"
    precision = _choose_precision(precision, on_cpu)
    optimizer = _known(_OPTIMIZERS.get(optimizer, optimizer), [one.value for one in OptimizerNames], "optimizer")
    schedule = _known(schedule, _SCHEDULES, "schedule")
    if output.resolve() == Path(loading.DEFAULT_MODEL if model is None else model).resolve():
        raise InputError(f"the output {output} is the folder of the model; what is trained needs a folder of its own")
    records = data.read_records(data_file)
    _make_folder(output)
    set_seed(seed)  # for projections that begin at random

    # The processes begin here, so that what they share on GPUs goes through NCCL.
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=epochs,
        max_steps=-1 if steps is None else steps,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulate,
        learning_rate=learning_rate,
        optim=optimizer,
        lr_scheduler_type=schedule,
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=clip,
        fp16=precision == "float16",
        bf16=precision == "bfloat16",
        save_steps=save_every,
        save_total_limit=keep,
        logging_steps=log_every,
        logging_nan_inf_filter=False,
        seed=seed,
        data_seed=seed,
        dataloader_num_workers=workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch without images leaves the projections for HR tokens alone
        ddp_backend="gloo" if on_cpu and Processes().count > 1 else None,
        use_cpu=on_cpu,
        log_level_replica="passive",
        report_to=["tensorboard"] if tensorboard else [],
        disable_tqdm=True,
    )
    arguments.device  # begins them
    arguments._n_gpu = 1  # one process has one GPU: torch's DataParallel would part images from their prompts
    with Processes() as processes, ExitStack() as until_the_end:
        dtype = None if check_only else torch.float64 if precision == "float64" else torch.float32
        loaded, processor = loading.load(model, "cpu", dtype, system=system)
        choose_trained(loaded, part)
        try:
            FlexAttnTrainer.get_optimizer_cls_and_kwargs(arguments, loaded)
        except (
            ImportError,
            ValueError,
        ) as error:  # the names include those of packages that may be missing
            raise InputError(f"the optimizer {optimizer} cannot be used: {' '.join(str(error).split())}") from None
        if gradient_checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": False})
        longest = loaded.config.text_config.max_position_embeddings
        if max_length is not None and max_length > longest:
            raise InputError(f"max length is {max_length}; the model has {longest} positions")
        encode = partial(
            data.encode,
            processor,
            max_length=max_length or longest,
            ends=answering.end_ids(loaded, processor),
        )
        first, shown = processes.rank == 0, progress and processes.rank == 0
        settings = {
            "data": hashlib.blake2b(Path(data_file).read_bytes()).hexdigest(),
            "folder of images": str(Path(images).resolve()),
            "model": str(loading.DEFAULT_MODEL if model is None else model),
            "system": system,
            "processes": processes.count,
            "epochs": epochs,
            "steps": steps,
            "batch size": batch_size,
            "accumulate": accumulate,
            "learning rate": learning_rate,
            "optimizer": optimizer,
            "schedule": schedule,
            "warmup steps": warmup_steps,
            "weight decay": weight_decay,
            "clip": clip,
            "part": part,
            "precision": precision,
            "max length": max_length,
            "seed": seed,
        }

        def begin() -> tuple[list[Broken], Path | None]:
            until_the_end.enter_context(locked_folder(output))
            found = _checked(records, images, output, encode, shown)
            usable = len(records) - len(found)
            if found and broken == "refuse" and not check_only:
                raise InputError(
                    f"{len(found)} of {len(records)} records are broken, the first is {found[0]}; all are listed in "
                    f"{output / 'broken.jsonl'}, and `--broken skip` leaves them out"
                )
            if not usable and not check_only:
                raise InputError(
                    f"{data_file} has no record that can be trained on; {output / 'broken.jsonl'} says why"
                )
            settings["set of broken records"] = [one.record for one in found]
            return found, None if check_only else _earlier_run(output, settings, restart)

        found, resumed = processes.broadcast_from_rank0(begin)
        if check_only:
            return Outcome(len(records), found, {})
        if resumed is not None and shown:
            print(f"goes on from {resumed}", file=sys.stderr)
        left_out = {one.record for one in found}
        trainer = FlexAttnTrainer(
            loaded,
            arguments,
            train_dataset=data.Conversations(
                records,
                [number for number in range(len(records)) if number not in left_out],
                images,
                processor,
                encode,
                partial(_tell_later, output / "broken.jsonl"),
            ),
            data_collator=data.Collator(processor.pad_id),
            processing_class=processor,
            callbacks=[_LossFile(output / "loss.csv"), _Progress(shown, until_the_end)] if first else [],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        trainer.save_model()
        if shown:
            print(f"wrote {output}", file=sys.stderr)
        return Outcome(
            len(records),
            found,
            {one["step"]: one["loss"] for one in trainer.state.log_history if "loss" in one},
        )


def _choose_precision(precision: str, on_cpu: bool) -> str:
    if precision not in _PRECISIONS:
        raise InputError(f"the precision is {precision!r}; allowed: {', '.join(_PRECISIONS)}")
    fast = on_cpu or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return "float32" if on_cpu else "bfloat16" if fast else "float16"
    if precision == "float16" and on_cpu:
        raise InputError("mixed precision in float16 needs a GPU; on the CPU use float32 or bfloat16")
    if precision == "bfloat16" and not fast:
        raise InputError("this GPU has no bfloat16 (the V100 is one of those); use float16")
    return precision


def _known(name: str, names: Sequence[str], what: str) -> str:
    if name not in names:
        raise InputError(f"the {what} is {name!r}; allowed: {', '.join(names)}")
    return name


def _make_folder(output: Path) -> None:
    with told(output):
        output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise InputError(f"{output} cannot be written: permission denied")


def _checked(
    records: list[Any], images: str | Path, output: Path, encode: Callable[..., Any], progress: bool
) -> list[Broken]:
    """`data.check`, with its list in the output and its count on stderr."""
    if not Path(images).is_dir():
        raise InputError(f"there is no folder {images} of images")
    listed = output / "broken.jsonl"
    with told(listed):
        found = data.check(records, images, encode, output / "images.jsonl", progress)
        listed.write_text("".join(json.dumps(asdict(one)) + "\n" for one in found))
    if progress:
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(f"{len(records)} records, {len(found)} of them broken")
        for kind, count in Counter(one.kind for one in found).most_common():
            console.print(f"  {count} {kind}", markup=False)
    return found


def _tell_later(listed: Path, broken: Broken) -> None:
    """A record that broke after the check, in whatever process has met it."""
    print(f"{broken}; another record takes its place", file=sys.stderr, flush=True)
    with open(listed, "a") as file:
        file.write(json.dumps(asdict(broken)) + "\n")


def _settings_of(written: Path) -> dict[str, Any]:
    try:
        settings = json.loads(written.read_text())
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise InputError(f"{written} does not hold the settings of a run; remove it, or discard the run with --restart")
    return settings


def _earlier_run(output: Path, settings: dict[str, Any], restart: bool) -> Path | None:
    """The checkpoint to go on from. What a run was ended in the middle of is removed."""
    written = output / "run.json"
    with told(output):
        for folder in _checkpoints(output):
            if restart or not _is_complete(folder):
                shutil.rmtree(folder)
        if not restart and written.exists():
            before = _settings_of(written)
            if changed := [name for name in settings if before.get(name) != settings[name]]:
                raise InputError(
                    f"the run in {output} was begun with another {', '.join(changed)}; go on with the same, or discard it with --restart"
                )
        write_whole(written, json.dumps(settings))
    return last_complete_checkpoint(output)


# ------------------------------------------------------------------------------------------------------------ callbacks


class _LossFile(TrainerCallback):
    """The loss of every logged step as CSV; what an interrupted run had written beyond its checkpoint is written anew."""

    columns = ("step", "epoch", "loss", "grad_norm", "learning_rate")

    def __init__(self, path: Path):
        self._path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        with open(self._path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows([one.get(name) for name in self.columns] for one in state.log_history if "loss" in one)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        one = state.log_history[-1]
        if "loss" in one:
            with open(self._path, "a", newline="") as file:
                csv.writer(file).writerow(one.get(name) for name in self.columns)


class _Progress(TrainerCallback):
    """Shows how far the run is, until it ends or, at the latest, `until_the_end` is closed: a bar hides the cursor."""

    def __init__(self, wanted: bool, until_the_end: ExitStack):
        self._wanted, self._shown = wanted, until_the_end.enter_context(ExitStack())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report = self._shown.enter_context(
            Progress(state.max_steps, "steps", self._wanted, done=state.global_step)
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._report.advance(1)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._shown.close()
