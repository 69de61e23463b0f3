"""Our options in transformers' terms."""

from __future__ import annotations

from transformers import TrainingArguments

from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.tasks.options import TrainOptions
from flexattn_cuda.tasks.train.requirements import Machine, transformers_optimizer


def training_arguments(options: TrainOptions, machine: Machine) -> TrainingArguments:
    """Return the arguments of the Trainer; InputError if its batches do not make up the recipe's step."""
    processes = Processes().count
    return TrainingArguments(
        output_dir=str(options.output),
        num_train_epochs=1 if options.epochs is None else options.epochs,
        max_steps=-1 if options.steps is None else options.steps,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulated_batches(processes),
        learning_rate=options.learning_rate,
        optim=transformers_optimizer(options.optimizer),
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.clip,
        fp16=machine.precision == "float16",
        bf16=machine.precision == "bfloat16",
        save_steps=options.save_every,
        save_total_limit=options.keep,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        seed=options.seed,
        data_seed=options.seed,
        dataloader_num_workers=options.workers,
        remove_unused_columns=False,
        ddp_find_unused_parameters=True,  # a batch without images does not use the projections for HR tokens
        ddp_backend="gloo" if processes > 1 and machine.on_cpu else None,
        use_cpu=machine.on_cpu,
        log_level_replica="passive",
        report_to=["tensorboard"] if options.tensorboard else [],
        disable_tqdm=True,
    )


def start_processes(arguments: TrainingArguments) -> None:
    """Let transformers start its process group, so that what several processes exchange on GPUs goes through NCCL."""
    _ = arguments.device  # starts it
    arguments._n_gpu = 1  # one process has one GPU: torch's DataParallel would separate images from their prompts
