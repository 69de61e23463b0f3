"""What a model selects, answers and looks at, over the questions of the study."""

from __future__ import annotations

import random
from collections.abc import Iterator

import torch
from torch.nn import functional

from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.trace import Trace
from flexattn_cuda.tasks.training_data import IGNORED
from studies.small.attention_maps import causal_visibility, mass_and_largest, record_maps
from studies.small.batches import answer_cells, question_batch
from studies.small.encoded_scenes import EncodedScenes, Pick
from studies.small.outcomes import Answered, MapFigures, Selection

_SELECTION_QUESTIONS = 256
_BATCH = 50


@torch.no_grad()
def measure_selection(model, processor, images: EncodedScenes) -> Selection:
    """Return what the map of the layer before `first_layer` selects, on average over 256 questions."""
    trace, settings = Trace(), model.flexattn_settings
    picks = images.sample(random.Random(0), min(_SELECTION_QUESTIONS, len(images.scenes)))
    model(**question_batch(images, picks, processor, settings), use_cache=False, flexattn_trace=trace)
    selecting = trace.steps[0][settings.first_layer - 1]
    mask = selecting.mask[:, 0, 0].float()  # of the row that predicts the answer's first token
    side = round(mask.shape[-1] ** 0.5) // settings.zoom
    tiles = mask.view(-1, settings.zoom, side, settings.zoom, side).amax((2, 4)).sum((1, 2))
    return Selection(mask.mean().item(), tiles.mean().item())


@torch.inference_mode()
def answer_questions(model, processor, questions: EncodedScenes, settings: FlexAttnConfig | None) -> list[Answered]:
    """Return greedy answers to the evaluation's question of every scene, by `generate`."""
    answered, end = [], processor.tokenizer.eos_token_id
    for picks in _batches(questions):
        inputs = question_batch(questions, picks, processor, settings, answers=False)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for (number, question), ids in zip(picks, output.tolist()):
            words = processor.tokenizer.convert_ids_to_tokens(ids[: ids.index(end)] if end in ids else ids)
            answered.append(
                Answered(
                    number=number,
                    task=question.task,
                    size=questions.scenes[number].size,
                    question=question.text,
                    expected=" ".join(question.answer),
                    answer=" ".join(words),
                    right=int(tuple(words) == question.answer),
                )
            )
    return answered


@torch.no_grad()
def measure_maps(model, processor, questions: EncodedScenes, settings: FlexAttnConfig | None) -> list[MapFigures]:
    """Return by layer and size of the objects what the map lies on (supplement, figure 2).

    The map is the mean over heads of the softmax over the sequence, in the row that predicts the answer's first token,
    restricted to the LR tokens of the image.
    """
    layers = range(model.config.text_config.num_hidden_layers)
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    with record_maps(model, layers) as recorded:
        for picks in _batches(questions):
            inputs = question_batch(questions, picks, processor, settings)
            model(**inputs, use_cache=False)
            answers = (inputs["labels"] != IGNORED).int()
            before_answer = functional.one_hot(answers.argmax(1) - 1, answers.shape[1]).bool()
            image = inputs["input_ids"] == processor.image_token_id
            visible = causal_visibility(inputs["attention_mask"])
            cells = answer_cells(questions, picks).float()
            for layer, one in zip(layers, recorded):
                maps = one.map(visible, before_answer)[image].view(len(picks), -1)
                for pick, values in zip(picks, _map_values(maps, cells)):
                    found.setdefault((layer, questions.scenes[pick.scene].size), []).append(values)
    return [MapFigures(layer, size, *torch.stack(values).mean(0).tolist()) for (layer, size), values in found.items()]


def _map_values(maps: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """Return mass, largest and boxes of MapFigures for maps [n, S*S] and answer cells, [n, 3]."""
    return torch.stack([*mass_and_largest(maps / maps.sum(-1, keepdim=True), cells), cells.mean(-1)], 1)


def _batches(questions: EncodedScenes) -> Iterator[list[Pick]]:
    picks = questions.asked()
    for start in range(0, len(picks), _BATCH):
        yield picks[start : start + _BATCH]
