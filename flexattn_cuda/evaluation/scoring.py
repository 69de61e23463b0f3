"""How probable answers are to a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.questions import check_question
from flexattn_cuda.mechanism.trace import Trace
from flexattn_cuda.tasks.ask import end_ids
from flexattn_cuda.tasks.encoded import EncodedImage, encode_image
from flexattn_cuda.tasks.models import HRModel, TrainingProcessor, max_positions, on_device
from flexattn_cuda.tasks.training_data import IGNORED, BrokenRecordError, Collator, Turn, labelled_ids
from flexattn_cuda.tasks.training_data.dataset import joined


@dataclass(frozen=True)
class Candidate:
    """An answer to score.

    Attributes:
        images: What the question is about; encoded or not.
        question: The question.
        answer: The answer, without its end.
    """

    images: Sequence[Image.Image | EncodedImage]
    question: str
    answer: str


@dataclass(frozen=True)
class Score:
    """How probable an answer is.

    Attributes:
        loss: Mean cross-entropy of the answer's tokens, its end included, in nats.
        greedy: Whether the model would give this answer: each of its tokens is the most probable one.
    """

    loss: float
    greedy: bool


@torch.inference_mode()
def score(
    model: HRModel, processor: TrainingProcessor, candidates: Sequence[Candidate], trace: Trace | None = None
) -> list[Score]:
    """Score answers as one batch.

    Rows that predict a token of an answer see HR tokens with weight 1, each with its own selection, as the released
    code scores options: the multi-row form. The answers end as those of the model's training data do.

    Args:
        model: The model.
        processor: Its processor.
        candidates: The answers, with their questions and images.
        trace: Filled with what the rows look at.

    Raises:
        InputError: If a question or an answer is empty or cannot be written in the model's tokens, the two are too long
            for the model, or its logits are NaN or infinite.
    """
    records = [_record(model, processor, candidate) for candidate in candidates]
    batch = Collator(processor.pad_id, processor.token_types)(records)
    inputs = on_device(batch, model.device)
    logits = model(**inputs, use_cache=False, flexattn_trace=trace).logits  # type: ignore[operator]
    return _scores(logits, inputs["labels"])


def _record(model: HRModel, processor: TrainingProcessor, candidate: Candidate) -> dict[str, Any]:
    """Return an answer after its prompt as the model's forward takes it, see `Collator`."""
    images = [one if isinstance(one, EncodedImage) else encode_image(model, processor, one) for one in candidate.images]
    check_question(candidate.question)
    if not candidate.answer.strip():
        raise InputError(f"an answer to {candidate.question!r} is empty, so there is nothing to score")
    turn = Turn(candidate.question, len(images), candidate.answer)
    image_tokens = [processor.image_tokens_of(image.width, image.height) for image in images]
    try:
        row = labelled_ids(processor, [turn], end_ids(model, processor), image_tokens)
    except BrokenRecordError as error:
        raise InputError(str(error)) from None
    if len(row.ids) > max_positions(model):
        raise InputError(
            f"a question and its answer take {len(row.ids)} tokens, and the model has {max_positions(model)} positions"
        )
    ids, labels = map(torch.tensor, row)
    record: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if processor.token_types is not None:
        record[processor.token_types] = (ids == processor.image_token_id).long()
    names = images[0].inputs if images else ()
    return record | {name: joined([image.inputs[name] for image in images]) for name in names}


def _scores(logits: torch.Tensor, labels: torch.Tensor) -> list[Score]:
    """Return the score of each row: logits [B, N, V] of any dtype, labels [B, N]; computed in float32 at least."""
    is_answer = labels[:, 1:] != IGNORED
    wanted, rows = labels[:, 1:][is_answer], logits[:, :-1][is_answer]
    losses = functional.cross_entropy(rows.to(torch.promote_types(rows.dtype, torch.float32)), wanted, reduction="none")
    if not bool(losses.isfinite().all()):
        raise InputError(
            f"the loss of an answer is NaN or infinite in {logits.dtype}; if the model's weights are whole, choose a "
            "dtype of wider range, such as bfloat16 or float32"
        )
    lengths, hits = is_answer.sum(-1).tolist(), rows.argmax(-1) == wanted
    return [Score(loss.mean().item(), bool(hit.all())) for loss, hit in zip(losses.split(lengths), hits.split(lengths))]
