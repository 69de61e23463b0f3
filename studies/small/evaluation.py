"""What a model selects, answers and looks at, over the questions of the study."""

from __future__ import annotations

import random
from typing import Any

import torch

from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.mechanism.trace import Trace
from flexattn_cuda.tasks.training_data import IGNORED
from studies.small.encoded_scenes import EncodedScenes
from studies.small.pretraining import MapOfLayer


@torch.no_grad()
def selection(model, processor, images: EncodedScenes) -> dict[str, float]:
    """What the map of the layer before `first_layer` selects, on average over 256 questions: share of the HR tokens, tiles."""
    trace, settings = Trace(), model.config.flexattn
    picks = images.sample(random.Random(0), min(256, len(images.scenes)))
    model(**images.batch(picks, processor, settings), use_cache=False, flexattn_trace=trace)
    mask = (
        trace.steps[0][settings.first_layer - 1].mask[:, 0, 0].float()
    )  # of the row that predicts the answer's first token
    side = model.config.hr_side // settings.zoom
    tiles = mask.view(-1, settings.zoom, side, settings.zoom, side).amax((2, 4)).sum((1, 2))
    return {"share": mask.mean().item(), "tiles": tiles.mean().item()}


@torch.inference_mode()
def answers(
    model, processor, questions: EncodedScenes, settings: FlexAttnConfig | None, batch: int = 50
) -> list[dict[str, Any]]:
    """Greedy answers by `generate`, a dict for each question: number, task, size, question, expected, answer, right."""
    rows, picks, end = [], questions.asked(), processor.tokenizer.eos_token_id
    for begin in range(0, len(picks), batch):
        some = picks[begin : begin + batch]
        inputs = questions.batch(some, processor, settings, answers=False)
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        for (number, question), ids in zip(some, output.tolist()):
            words = processor.tokenizer.convert_ids_to_tokens(ids[: ids.index(end)] if end in ids else ids)
            scene = questions.scenes[number]
            rows.append({
                "number": number, "task": question.task, "size": scene.size, "question": question.text,
                "expected": " ".join(question.answer), "answer": " ".join(words), "right": int(tuple(words) == question.answer),
            })  # fmt: skip
    return rows


@torch.no_grad()
def attention_in_boxes(
    model, processor, questions: EncodedScenes, settings: FlexAttnConfig | None, batch: int = 50
) -> list[dict[str, Any]]:
    """By layer and size of the objects: the share of the map that lies on the answer boxes (supplement, figure 2).

    The map is that of the row which predicts the answer's first token, over the image's low-resolution tokens: mean over
    heads of the softmax over the sequence. mass: its share in the boxes; largest: how often its largest cell is in one;
    boxes: the boxes' share of the cells.
    """
    layers = range(model.config.text_config.num_hidden_layers)
    maps_of, picks = [MapOfLayer(model, layer) for layer in layers], questions.asked()
    sums: dict[tuple[int, str], list[torch.Tensor]] = {}
    for begin in range(0, len(picks), batch):
        some = picks[begin : begin + batch]
        inputs = questions.batch(some, processor, settings)
        model(**inputs, use_cache=False)
        ids, rows = inputs["input_ids"], torch.arange(len(some))
        first = (inputs["labels"] != IGNORED).int().argmax(1) - 1
        visible = (
            torch.ones(*2 * [ids.shape[1]], dtype=torch.bool).tril() & (inputs["attention_mask"] == 1)[:, None, None]
        )
        cells = questions.answer_cells(some).float()
        for layer, map_of in zip(layers, maps_of):
            maps = map_of(visible)[rows, first][ids == processor.image_token_id].view(len(some), -1)
            maps = maps / maps.sum(-1, keepdim=True)
            largest = cells.gather(-1, maps.argmax(-1, keepdim=True))[:, 0]
            for row, values in zip(rows.tolist(), torch.stack([(maps * cells).sum(-1), largest, cells.mean(-1)], 1)):
                sums.setdefault((layer, questions.scenes[some[row][0]].size), []).append(values)
    for map_of in maps_of:
        map_of.handle.remove()
    return [
        {"layer": layer, "size": size} | dict(zip(("mass", "largest", "boxes"), torch.stack(values).mean(0).tolist()))
        for (layer, size), values in sums.items()
    ]
