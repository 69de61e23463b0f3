"""Scenes as image tokens of the frozen encoder, at every resolution that a system uses, and batches of questions about them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from flexattn_cuda.families.llava.vision import encode_images, encode_tiles
from flexattn_cuda.inputs.processor import FlexAttnLlavaImageProcessor
from flexattn_cuda.mechanism.config import FlexAttnConfig
from flexattn_cuda.tasks.training_data import IGNORED
from studies.small.scenes import SIDE, TASKS, Box, Question, Scene

Pick = tuple[int, Question]
"""A question about the image with that number."""


@dataclass
class EncodedScenes:
    """n images without their pixels.

    Attributes:
        low: [n, S*S, D] half, image tokens of the low-resolution images.
        high: By (zoom, highres_size), [n, h*h, D] half.
        live: [n, 4] int32, as `valid_rect`.
        scenes: What was drawn and asked; without `image`.
    """

    low: torch.Tensor
    high: dict[tuple[int, int], torch.Tensor]
    live: torch.Tensor
    scenes: list[Scene]

    def asked(self) -> list[Pick]:
        """Each image with the question of the evaluation."""
        return [(number, scene.asked) for number, scene in enumerate(self.scenes)]

    @cached_property
    def by_task(self) -> dict[str, list[int]]:
        """The images that have questions of a task."""
        return {
            task: [n for n, scene in enumerate(self.scenes) if any(q.task == task for q in scene.questions)]
            for task in TASKS
        }

    def sample(self, rng: random.Random, count: int) -> list[Pick]:
        """Questions for training: uniform over the tasks that there are, then over the images that have questions of the
        task, then over these."""
        picks = []
        for task in rng.choices([task for task in TASKS if self.by_task[task]], k=count):
            number = rng.choice(self.by_task[task])
            picks.append(
                (
                    number,
                    rng.choice([question for question in self.scenes[number].questions if question.task == task]),
                )
            )
        return picks

    def batch(
        self,
        picks: Sequence[Pick],
        processor,
        settings: FlexAttnConfig | None,
        answers: bool = True,
    ) -> dict[str, torch.Tensor]:
        """What `forward` takes, padded on the left.

        Args:
            settings: Of the system: tells which resolution it sees; None for the low resolution alone.
            answers: With the answers and their labels, for training and for forced answers; without, for `generate`.
        """
        tokenizer, image = processor.tokenizer, processor.image_token_id
        numbers = [number for number, _ in picks]
        inputs = {"image_features": self.low[numbers].float(), "valid_rect": self.live[numbers]}
        room = self.low.shape[1]
        if settings is not None:
            inputs["hr_features"] = self.high[settings.zoom, settings.highres_size][numbers].float()
            room += inputs["hr_features"].shape[1] if settings.system == "hd" else 0
        rows = []
        for _, question in picks:
            ids = tokenizer(processor.prompt(question.text))["input_ids"]
            at = ids.index(image)
            answer = _answer_ids(tokenizer, question) if answers else []
            rows.append((ids[:at] + [image] * room + ids[at + 1 :], answer))
        longest = max(len(ids) + len(answer) for ids, answer in rows)
        padding = [longest - len(ids) - len(answer) for ids, answer in rows]
        inputs["input_ids"] = torch.tensor(
            [[tokenizer.pad_token_id] * pad + ids + answer for pad, (ids, answer) in zip(padding, rows)]
        )
        inputs["attention_mask"] = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
        if answers:
            inputs["labels"] = torch.tensor([[IGNORED] * (longest - len(answer)) + answer for _, answer in rows])
        return inputs

    def packed(self, numbers: Sequence[int], processor) -> dict[str, torch.Tensor]:
        """Whole images with all their questions, for the low resolution: each question sees the image and itself alone.

        An image is far longer than a question, so this costs a fraction of one row per question and computes the same.

        Returns:
            input_ids, position_ids, labels: [n, N], padded on the right; every question has the positions it has alone.
            visible: [n, 1, N, N] bool, row i sees key j.
            image_features: [n, S*S, D].
            cells: [n, N, S*S] bool: in the rows that predict an answer token, LR cells that the answer boxes touch.
        """
        tokenizer, image = processor.tokenizer, processor.image_token_id
        area = self.low.shape[1]
        side = round(area**0.5)
        rows = []
        for number in numbers:
            ids, part, places, labels, cells = [], [], [], [], []
            for k, question in enumerate(self.scenes[number].questions, start=1):
                text = tokenizer(processor.prompt(question.text))["input_ids"]
                at = text.index(image)
                shared = at + area
                if not ids:
                    ids = text[:at] + [image] * area
                    part, places, labels = [0] * shared, list(range(shared)), [IGNORED] * shared
                answer = _answer_ids(tokenizer, question)
                own = text[at + 1 :] + answer
                looks = (*question.looks, question.boxes)  # the end of an answer looks at all of it
                cells += [(len(ids) + len(own) - len(answer) - 1 + token, boxes) for token, boxes in enumerate(looks)]
                labels += [IGNORED] * (len(own) - len(answer)) + answer
                places += range(shared, shared + len(own))
                part += [k] * len(own)
                ids += own
            rows.append((ids, places, labels, part, cells))
        longest = max(len(row[0]) for row in rows)

        def padded(column: int, value: int) -> torch.Tensor:
            return torch.tensor([row[column] + [value] * (longest - len(row[column])) for row in rows])

        parts, causal = padded(3, -1), torch.ones(longest, longest, dtype=torch.bool).tril()
        marked = torch.zeros(len(rows), longest, area, dtype=torch.bool)
        for mark, row in zip(marked, rows):
            for at, boxes in row[4]:
                mark[at] = cells_of(boxes, side)
        return {
            "input_ids": padded(0, tokenizer.pad_token_id),
            "position_ids": padded(1, 0),
            "labels": padded(2, IGNORED),
            "visible": (causal & ((parts[:, None] == 0) | (parts[:, None] == parts[:, :, None])))[:, None],
            "image_features": self.low[list(numbers)].float(),
            "cells": marked,
        }

    def answer_cells(self, picks: Sequence[Pick]) -> torch.Tensor:
        """[n, S*S] bool: LR cells that the answer boxes touch."""
        side = round(self.low.shape[1] ** 0.5)
        return torch.stack([cells_of(question.boxes, side) for _, question in picks])


def _answer_ids(tokenizer, question: Question) -> list[int]:
    """A token for each word, and the end."""
    return [*tokenizer.convert_tokens_to_ids(list(question.answer)), tokenizer.eos_token_id]


def cells_of(boxes: Iterable[Box], side: int, pixels: int = SIDE) -> torch.Tensor:
    """[side*side] bool: cells of a grid over a square of so many pixels that a box touches."""
    edge, cell = torch.arange(side) * (pixels / side), pixels / side
    touched = torch.zeros(side, side, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes:
        touched |= ((edge < y1) & (edge + cell > y0))[:, None] & (edge < x1) & (edge + cell > x0)
    return touched.flatten()


@torch.no_grad()
def encode_scenes(
    model, processor, scenes: Iterable[Scene], count: int, resolutions: Sequence[tuple[int, int]]
) -> EncodedScenes:
    """The image tokens of scenes, by the model's encoder.

    All resolutions share the low-resolution tokens, made by `processor`, so that systems differ in nothing but the high one.

    Args:
        count: How many scenes there are.
        resolutions: (zoom, highres_size) of the systems; see `resolutions_of`.
    """
    images = processor.image_processor
    makers = {
        resolution: FlexAttnLlavaImageProcessor(
            highres_size=resolution[1], lowres_size=images.lowres_size, lr_side=images.lr_side
        )
        for resolution in resolutions
    }
    patch, width = model.config.vision_config.patch_size, model.config.text_config.hidden_size

    def room(side: int) -> torch.Tensor:
        return torch.empty(count, (side // patch) ** 2, width, dtype=torch.half)

    low, live, kept = room(images.lowres_size), torch.empty(count, 4, dtype=torch.int32), []
    high = {(zoom, size): room(size) for zoom, size in resolutions}
    for number, scene in enumerate(scenes):
        pixels = images([scene.image])
        low[number] = encode_images(model.model, pixels["pixel_values"])[0]
        live[number] = pixels["valid_rect"][0]
        for (zoom, size), maker in makers.items():
            photograph = (pixels if size == images.highres_size else maker([scene.image]))["pixel_values_hr"][0]
            high[zoom, size][number] = encode_tiles(model.model, photograph, zoom)
        kept.append(scene.without_image())
    return EncodedScenes(low, high, live, kept)


def resolutions_of(settings: Iterable[FlexAttnConfig | None]) -> list[tuple[int, int]]:
    """(zoom, highres_size) of each that has one, without repetition."""
    return sorted({(one.zoom, one.highres_size) for one in settings if one is not None})
