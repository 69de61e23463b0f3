"""A run: prepare, check, resume, fit."""

from __future__ import annotations

import hashlib
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from flexattn_cuda.checkpoints import adapters
from flexattn_cuda.errors import InputError
from flexattn_cuda.families.attached import AttachedModel
from flexattn_cuda.families.llava.family import LlavaFamily
from flexattn_cuda.inputs.hr_processor import HRProcessor
from flexattn_cuda.runs.files import locked_folder, make_writable_folder, os_errors_as_input_errors, write_atomically
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks import lora, training_data
from flexattn_cuda.tasks.models import max_positions
from flexattn_cuda.tasks.options import TrainOptions
from flexattn_cuda.tasks.train.arguments import start_processes, training_arguments
from flexattn_cuda.tasks.train.broken_list import BrokenList, print_summary
from flexattn_cuda.tasks.train.callbacks import LossFile, ProgressBar
from flexattn_cuda.tasks.train.checkpoints import Resumable, keep_last_complete_checkpoint, remove_checkpoints, writing
from flexattn_cuda.tasks.train.prediction import print_prediction
from flexattn_cuda.tasks.train.requirements import (
    choose_machine,
    require_accelerate,
    require_tensorboard,
    transformers_optimizer,
)
from flexattn_cuda.tasks.train.trainer import AdapterTrainer, FlexAttnTrainer, choose_trained
from flexattn_cuda.tasks.training_data import Broken, Checked


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        records: Number of records in the data.
        broken: Those that were left out.
        losses: The loss by step, including the steps of earlier runs that this one resumed; empty after a mere check.
    """

    records: int
    broken: list[Broken]
    losses: dict[int, float]


def train(options: TrainOptions, progress: bool = False) -> Outcome:
    """Train a model on data in LLaVA's format; call it again with the same options to resume after an interruption.

    All records are checked before the first step. Of several processes that torchrun or `accelerate launch` started,
    each takes its share of every step; what accelerate's configuration says of FSDP or DeepSpeed applies.

    Args:
        options: What to train, on what, and how.
        progress: Print progress on stderr.

    Raises:
        CheckpointError: If there is no such checkpoint, or it cannot be loaded.
        InputError: If something cannot be used, an earlier run in the output folder had other options, or the loss
            becomes NaN or infinite.
    """
    with TrainingRun(options, progress) as run:
        run.prepare()
        checked = run.check()
        losses = {} if options.check_only else run.fit(run.resume(checked), checked.broken)
        return Outcome(run.record_count, checked.broken, losses)


class TrainingRun:
    """One run of `train`, whose steps are called in the order of their definition.

    As a context manager it holds the processes, the lock of the output folder and the progress bar.
    """

    def __init__(self, options: TrainOptions, progress: bool = False):
        self._options, self._progress = options, progress
        self._open = ExitStack()
        self._broken_list = BrokenList(options.output / "broken.jsonl")

    def __enter__(self) -> TrainingRun:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def record_count(self) -> int:
        return len(self._records)

    def prepare(self) -> None:
        """Refuse what cannot be used, read the records, start the processes and load the model."""
        options = self._options
        _check_requirements(options)
        self._machine = choose_machine(options)
        _check_output(options)
        self._records = training_data.read_records(options.data)
        make_writable_folder(options.output)
        self._arguments = training_arguments(options, self._machine)
        set_seed(options.seed)  # for projections that start at random
        start_processes(self._arguments)
        self._processes = self._open.enter_context(Processes())
        self._progress &= self._processes.rank == 0
        self._load_model()

    def _load_model(self) -> None:
        options = self._options
        dtype = None if options.check_only else self._machine.weights
        if options.adapter_only:
            model, self._processor = _load_attached(options, dtype)
        else:
            model, self._processor = loading.load_llava(options.model, "cpu", dtype, options.system)
        self._model: Any = model
        if options.lora is None:
            choose_trained(self._model, "hr" if options.adapter_only else options.train)
        else:
            self._add_lora(options.lora)
        self._check_optimizer()
        if options.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        positions = max_positions(self._model)
        if options.max_length is not None and options.max_length > positions:
            raise InputError(f"max length is {options.max_length}; the model has {positions} positions")
        self._encode = partial(
            training_data.encode,
            self._processor,
            max_length=options.max_length or positions,
            ends=answering.end_ids(self._model, self._processor),
            images=options.images,
        )

    def _add_lora(self, rank: int) -> None:
        base = self._model
        if isinstance(base, AttachedModel):
            family = base.hr_family
        elif base.config.system == "flexattn":
            family = LlavaFamily(base)
        else:
            raise InputError(f"--lora needs FlexAttention, but the system is {base.config.system}; leave --lora out")
        self._beside_lora = partial(
            adapters.write,
            settings=family.settings,
            base=adapters.BaseModel.of(base, family.text_model),
            weights=adapters.projections(family.text_model, family.hr_layers),
        )
        self._model = lora.wrap(base, family.text_model, rank, self._options.train)

    def _check_optimizer(self) -> None:
        try:
            FlexAttnTrainer.get_optimizer_cls_and_kwargs(self._arguments, self._model)
        except (ImportError, ValueError) as error:  # some optimizers come from packages that may be missing
            reason = " ".join(str(error).split())
            raise InputError(f"the optimizer {self._options.optimizer} cannot be used: {reason}") from None

    def check(self) -> Checked:
        """Lock the output folder and check all records."""
        return self._processes.broadcast_from_rank0(self._check_on_rank0)

    def _check_on_rank0(self) -> Checked:
        options = self._options
        self._open.enter_context(locked_folder(options.output))
        if not options.images.is_dir():
            raise InputError(f"there is no folder {options.images} of images")
        verdicts = options.output / "images.jsonl"
        with os_errors_as_input_errors(verdicts):
            checked = training_data.check(self._records, options.images, self._encode, verdicts, self._progress)
        found = checked.broken
        self._broken_list.write(found)
        if self._progress:
            print_summary(found, self.record_count)
            if options.recipe is not None:
                print_prediction(options, self._model.config, self.record_count - len(found), self._processes.count)
        if not options.check_only:
            self._broken_list.require_usable(found, self.record_count, options.broken)
        return checked

    def resume(self, checked: Checked) -> Path | None:
        """Return the checkpoint to resume from, or None to start at the first step."""
        fingerprint = self._fingerprint(checked)
        found = self._processes.broadcast_from_rank0(
            lambda: _checkpoint_to_resume(self._options.output, fingerprint, self._options.restart)
        )
        for folder in found.damaged if self._progress else ():
            print(f"{folder} is not as it was written, and was removed", file=sys.stderr)
        if found.checkpoint is not None and self._progress:
            print(f"resuming from {found.checkpoint}", file=sys.stderr)
        return found.checkpoint

    def _fingerprint(self, checked: Checked) -> Fingerprint:
        options = self._options
        return options.fingerprint().with_facts(
            data=hashlib.blake2b(options.data.read_bytes()).hexdigest(),
            images=str(options.images.resolve()),
            content_of_images=checked.images_hash,
            precision=self._machine.precision,
            processes=self._processes.count,
            set_of_broken_records=[one.record for one in checked.broken],
        )

    def fit(self, checkpoint: Path | None, broken: list[Broken]) -> dict[int, float]:
        """Train, save the model, and return the loss by step."""
        options = self._options
        trainer_class = AdapterTrainer if options.adapter_only and options.lora is None else FlexAttnTrainer
        trainer = trainer_class(
            self._model,
            self._arguments,
            train_dataset=self._dataset(broken),
            data_collator=training_data.Collator(self._processor.pad_id, self._processor.token_types),
            processing_class=self._processor,
            callbacks=self._callbacks(),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        with writing(options.output):
            trainer.save_model()
            if options.lora is not None and self._processes.rank == 0:
                self._beside_lora(options.output)
        losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
        if self._progress:
            first, last = min(losses), max(losses)
            shown = f"loss {losses[first]:.4g} at step {first}, {losses[last]:.4g} at step {last}"
            print(f"wrote {options.output}: {shown}", file=sys.stderr)
        return losses

    def _dataset(self, broken: list[Broken]) -> training_data.Conversations:
        left_out = {one.record for one in broken}
        return training_data.Conversations(
            self._records,
            [number for number in range(self.record_count) if number not in left_out],
            self._options.images,
            self._processor,
            self._encode,
            self._broken_list.report_later,
        )

    def _callbacks(self) -> list[LossFile | ProgressBar]:
        if self._processes.rank != 0:
            return []
        return [LossFile(self._options.output / "loss.csv"), ProgressBar(self._progress, self._open)]


def _check_requirements(options: TrainOptions) -> None:
    require_accelerate()
    if options.lora is not None:
        lora.require_peft()
    if options.tensorboard:
        require_tensorboard()
    transformers_optimizer(options.optimizer)


def _check_output(options: TrainOptions) -> None:
    model = loading.DEFAULT_MODEL if options.model is None else Path(options.model)
    if options.output.resolve() == model.resolve():
        raise InputError(f"the output {options.output} is the folder of the model; choose another folder")
    if options.adapter is not None and options.output.resolve() == Path(options.adapter).resolve():
        raise InputError(f"the output {options.output} is the folder of the adapter; choose another folder")


def _load_attached(options: TrainOptions, dtype: torch.dtype | None) -> tuple[AttachedModel, HRProcessor]:
    """Load a model to train an adapter for; raise InputError if it cannot be trained."""
    if options.adapter is not None and lora.is_in(Path(options.adapter)):
        raise InputError(f"the adapter in {options.adapter} was trained with --lora; start from one that was not")
    model, processor = loading.load_attached(options.model, "cpu", dtype, options.adapter)
    if processor.family.finish is not None:
        raise InputError(
            f"adapters for {model.config.model_type} cannot be trained: the end of its prompts and the mask of its "
            "answers are of a form of their own"
        )
    return model, processor


def _checkpoint_to_resume(output: Path, fingerprint: Fingerprint, restart: bool) -> Resumable:
    """Return the last complete checkpoint of an earlier run with the same fingerprint, and clear away later ones."""
    written = output / "run.json"
    with os_errors_as_input_errors(output):
        if restart:
            remove_checkpoints(output)
        elif written.exists():
            fingerprint.require_same(
                Fingerprint.read(written), f"the run in {output}", f"start another from it with --model {output}"
            )
        found = keep_last_complete_checkpoint(output)
        write_atomically(written, fingerprint.to_json())
    return found
