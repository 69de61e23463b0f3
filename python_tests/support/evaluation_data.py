"""Small data sets in the formats of the benchmarks, made of generated images."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import question_files
import tiny_checkpoint
import torch
from datasets import Dataset, Image, Sequence
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from flexattn_cuda import FlexAttnLlavaForConditionalGeneration
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor

# Options of several lengths, as those of the benchmark are.
VSTAR = {
    "direct_attributes": [
        ("What is the colour of the sign?", ["The sign is red.", "The sign is blue.", "It is a dark green."]),
        ("What is the material of the glove?", ["rubber", "cotton", "kevlar", "leather"]),
    ],
    "relative_position": [("Is the dog left of the cat?", ["The dog is on the left side of the cat.", "No."])],
}


def write_vstar(folder: Path, categories: dict[str, list] = VSTAR) -> Path:
    """Write questions in the format of craigwu/vstar_bench."""
    for category, questions in categories.items():
        (folder / category).mkdir(parents=True)
        for number, (question, options) in enumerate(questions):
            path = folder / category / f"sa_{number}"
            question_files.image(160 - 40 * number, 120, seed=number).save(path.with_suffix(".jpg"))
            record = {"target_object": ["sign"], "bbox": [[8, 8, 9, 9]], "question": question, "options": options}
            path.with_suffix(".json").write_text(json.dumps(record))
    return folder


# ------------------------------------------------------------------------------------- benchmarks of lmms-eval's own


def save_with_two_answers(folder: Path, first: str, second: str) -> Path:
    """Save a checkpoint whose first token of any answer is one of two words."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, first: 3, second: 4, "USER": 5, "ASSISTANT": 6, ":": 7, "?": 8, "the": 9}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tiny_checkpoint.save(folder)
    model = FlexAttnLlavaForConditionalGeneration.from_pretrained(folder)
    with torch.no_grad():
        heads = model.lm_head.weight
        direction = heads[358].clone()  # by which half of the questions below get the first
        heads.zero_()
        heads[3], heads[4] = direction, -direction  # one of the two is above the zero of all others
    model.save_pretrained(folder)
    images = tiny_checkpoint.processor().image_processor
    FlexAttnLlavaProcessor(images, tokenizer, tiny_checkpoint.IMAGE_ID, split_at_images=True).save_pretrained(folder)
    return folder


def write_magnifierbench(folder: Path) -> list[dict]:
    """Write MagnifierBench below a folder as on the hub, and return its rows."""
    rows = [
        {"id": str(number), "images": [question_files.image(128, 96, seed=number)], "answer": "ABCD"[number % 4]}
        | {"instruction": f"Is there {'the ' * number}? A. 7, B. 8, C. 12, D. 42"}
        for number in range(8)
    ]
    _write_rows(folder / "Otter-AI" / "MagnifierBench", "test", rows, {"images": Sequence(Image())})
    return rows


def write_benchmarks(folder: Path, said: Callable[[dict], str]) -> dict[str, list[dict]]:
    """Write POPE, MME and TextVQA below a folder as on the hub, and return their rows.

    Args:
        folder: Where lmms-eval is to run: a data set that lies there is read in place of the one on the hub.
        said: Returns what the model answers to a question of TextVQA, some of whose ten answers are that.
    """
    shared = [{"image": question_files.image(128, 96, seed=number)} for number in range(8)]
    pope = [
        {**row, "id": str(number), "question_id": str(number), "question": f"Is there {'the ' * number}?"}
        | {"answer": "yes" if number % 4 < 2 else "no", "image_source": f"COCO_{number}", "category": "random"}
        for number, row in enumerate(shared)
    ]
    mme = [
        {**row, "question_id": f"{category}/{number}.png", "category": category}
        | {"question": f"{'no ' * half}the ? Please answer yes or no.", "answer": "No" if half else "Yes"}
        for category in ("existence", "code_reasoning")
        for number, row in enumerate(shared[:4] if category == "existence" else shared[4:])
        for half in (False, True)
    ]
    textvqa = []
    for number, row in enumerate(shared[:6]):
        one = {**row, "image_id": str(number), "question_id": number, "question": f"what {'the ' * number}?"}
        golds = [said(one)] * number
        textvqa.append(one | {"answers": golds + ["nothing"] * (10 - number), "ocr_tokens": ["a"]})
    rows = {"POPE": pope, "MME": mme, "textvqa": textvqa}
    for name, own in rows.items():
        split = "validation" if name == "textvqa" else "test"
        _write_rows(folder / "lmms-lab-encoder" / name, split, own, {"image": Image()})
    return rows


def write_mmvet(folder: Path) -> None:
    """Write two questions of MM-Vet below a folder as on the hub."""
    rows = [
        {"question_id": f"v1_{number}", "image": question_files.image(128, 96, seed=number), "question": "What is it?"}
        | {"answer": "a sign <AND> 42", "capability": "ocr,rec"}
        for number in range(2)
    ]
    _write_rows(folder / "lmms-lab-encoder" / "MMVet", "test", rows, {"image": Image()})


def _write_rows(folder: Path, split: str, rows: list[dict], images: dict[str, Any]) -> None:
    """Write the rows of a split, of which some columns are images, as the hub's parquet files lie."""
    (folder / "data").mkdir(parents=True)
    table = Dataset.from_list(rows)
    for column, feature in images.items():
        table = table.cast_column(column, feature)
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


# --------------------------------------------------------------------------------------------- other tasks of our own


RSVQA_KINDS = ("presence", "comp", "count", "presence", "comp", "comp")


def write_rsvqa(folder: Path, kinds: Iterable[str] = RSVQA_KINDS, per_image: int = 2) -> list[dict]:
    """Write questions of these types as RSVQA's high-resolution set, and return the rows that are asked."""
    (folder / "Data").mkdir(parents=True)
    questions: list[dict] = []
    answers: list[dict] = []
    for number, kind in enumerate(kinds):
        answer = "3" if kind == "count" else ("yes", "no")[number % 2]
        text = f"Is there {'the ' * number}?"
        own = {
            "img_id": number // per_image,
            "type": kind,
            "question": text,
            "answers_ids": [100 + number],
            "active": True,
        }
        questions.append({"id": number, **own})
        answers.append({"id": 100 + number, "question_id": number, "answer": answer, "active": True})
    questions.append({"id": 99, "active": False})
    answers.append({"id": 199, "active": False})
    for number in {one["img_id"] for one in questions if one["active"]}:
        question_files.image(128, 128, seed=number).save(folder / "Data" / f"{number}.tif")
    (folder / "USGS_split_test_phili_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "USGS_split_test_phili_answers.json").write_text(json.dumps({"answers": answers}))
    return [
        {"image": folder / "Data" / f"{question['img_id']}.tif", "question": question["question"]}
        | {"category": "presence" if question["type"] == "presence" else "comparison", "answer": answer["answer"]}
        for question, answer in zip(questions, answers)
        if question.get("type") in ("presence", "comp")
    ]


def write_refcoco(folder: Path) -> list[dict]:
    """Write RefCOCO below a folder as on the hub, and return its rows: boxes of 20, 5 and 1 % of the image."""
    sides = ((50, 40), (25, 20), (10, 10))
    rows = [
        {"question_id": str(number), "image": question_files.image(100, 100, seed=number), "file_name": "a.jpg"}
        | {"bbox": [10.0, 20.0, *map(float, side)], "answer": ["the sign", "the red sign"][: 1 + number % 2]}
        for number, side in enumerate(sides)
    ]
    _write_rows(folder / "lmms-lab-encoder" / "RefCOCO", "val", rows, {"image": Image()})
    return rows


def write_gqa(folder: Path) -> dict[str, dict]:
    """Write GQA's questions and scene graphs, and return the questions."""
    (folder / "images").mkdir(parents=True)
    scenes = {}
    for number, (width, height) in enumerate([(160, 120), (96, 144)]):
        question_files.image(width, height, seed=number).save(folder / "images" / f"{number}.jpg")
        objects = {"7": {"x": 10, "y": 20, "w": 50, "h": 40}, "8": {"x": 40, "y": 0, "w": 30, "h": 90}}
        scenes[str(number)] = {"width": width, "height": height, "objects": objects}
    pointers = [{"question": {"1": "7"}, "fullAnswer": {"0": "8"}, "answer": {}}, {"question": {}, "fullAnswer": {}}]
    questions = {
        f"0{number}": {"imageId": str(number // 2), "question": f"What is {'the ' * number}?", "answer": "dog"}
        | {"annotations": pointers[number % 3 == 2], "semantic": [{"operation": "select", "argument": "dog (7)"}]}
        for number in range(4)
    }
    (folder / "val_balanced_questions.json").write_text(json.dumps(questions))
    (folder / "val_sceneGraphs.json").write_text(json.dumps(scenes))
    return questions
