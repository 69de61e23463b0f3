"""A file of questions: the answers are those of `ask`, and a bad line is reported and skipped."""

from __future__ import annotations

import weakref

import pytest
import torch
from question_files import SIGNS, read, signs, some, uninterrupted, write

from flexattn_cuda import ask, load
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.ask_batch import Totals, answer_file, answers


@pytest.fixture(scope="module")
def default():
    return load(device="cpu")


@pytest.mark.slow
def test_the_answers_are_those_of_ask(default, tmp_path):
    records = signs()
    totals = answer_file(write(tmp_path / "q.jsonl", records), tmp_path / "a.jsonl", device="cpu", batch_size=4)
    expected = [ask(*default, one["image"], one["question"]).text for one in records]
    assert expected[: len(SIGNS)] == [one["answer"] for one in SIGNS]
    answers = [
        {"id": number} | one | {"answer": text} for number, (one, text) in enumerate(zip(records, expected), start=1)
    ]
    assert read(tmp_path / "a.jsonl") == answers and totals == Totals(len(records), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "q.jsonl"]


@pytest.mark.slow
def test_long_answers_are_those_of_ask(checkpoint, folder):
    records = some(7)
    answer_file(write(folder / "q.jsonl", records), folder / "a.jsonl", checkpoint, "cpu", max_new_tokens=12)
    loaded = load(checkpoint, "cpu")
    expected = [ask(*loaded, folder / one["image"], one["question"], 12).text for one in records]
    assert [one["answer"] for one in read(folder / "a.jsonl")] == expected


def test_a_long_question_does_not_shorten_the_answers_of_others(checkpoint, folder, monkeypatch):
    model, processor = load(checkpoint, "cpu")
    questions, image = ["x", "x" * 200, "x" * 202], open_image(folder / "0.png")
    lengths = [answering.prompt_length(model, processor, one) for one in questions]
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", lengths[1] + 4)
    alone = [ask(model, processor, image, one, max_new_tokens=9).tokens for one in questions]
    assert answering.generate_answers(model, processor, [[image]] * 3, questions, 9) == alone
    assert [len(tokens) for tokens in alone] == [9, 4, 2]


def test_an_answer_ends_at_its_own_end(checkpoint, folder, monkeypatch):
    model, processor = load(checkpoint, "cpu")
    questions, images = ["why", "whywhy", "x"], [[open_image(folder / f"{number}.png")] for number in range(3)]
    whole = answering.generate_answers(model, processor, images, questions, 8)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, whole[1][3]])
    ended = answering.generate_answers(model, processor, images, questions, 8)
    expected = [row[: row.index(whole[1][3])] if whole[1][3] in row else row for row in whole]
    assert ended == expected and len({len(row) for row in ended}) > 1


def test_batches_hold_prompts_of_about_the_same_length(checkpoint, folder, asked):
    records = some(11)
    answer_file(
        write(folder / "q.jsonl", records), folder / "a.jsonl", checkpoint, "cpu", max_new_tokens=1, batch_size=4
    )
    assert [len(questions) for questions in asked] == [4, 4, 3]
    lengths = [len(question) for questions in asked for question in questions]
    assert lengths == sorted(lengths, reverse=True)


def test_the_images_of_one_batch_at_most_are_in_memory(checkpoint, folder, monkeypatch):
    images, most = [], []

    def opened(path):
        images.append(weakref.ref(image := open_image(path)))
        most.append(sum(one() is not None for one in images))
        return image

    monkeypatch.setattr(answers, "read_image", opened)
    answer_file(
        write(folder / "q.jsonl", some(7)), folder / "a.jsonl", checkpoint, "cpu", max_new_tokens=1, batch_size=2
    )
    assert len(images) == 7 and max(most) == 2


BROKEN = [
    ("{", "not JSON"),
    ("\ufeff[1]", "not a JSON object"),
    ("[" * 50_000, "not JSON"),
    ({"image": "0.png"}, 'there is no "question"'),
    ({"question": "why"}, 'there is no "image"'),
    ({"image": 5, "question": "why"}, '"image" is not a string'),
    ({"image": "0.png", "question": None}, '"question" is not a string'),
    ({"image": "0.png", "question": " "}, "the question is empty"),
    ({"image": "0.png", "question": "<image>?"}, "contains <image>"),
    ({"image": "0.png", "question": "\ud800"}, "not a character"),
    ({"image": "0.png", "question": "why", "id": [1]}, '"id" is neither'),
    ({"image": "0.png", "question": "long " * 300}, "the question is too long"),
    ({"image": "nowhere.png", "question": "why"}, "there is no image"),
    ({"image": "", "question": "why"}, "is not an image file"),
    ({"image": "cut.png", "question": "why"}, "is damaged"),
    ({"image": "a\0b\ud800.png", "question": "why"}, "there is no image"),
    ({"image": "n" * 300, "question": "why"}, "cannot be read"),
]


def test_a_bad_line_is_reported_and_the_others_are_answered(checkpoint, folder):
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    good = {"id": "good", "image": str(folder / "1.png"), "question": "why"}
    records = [one for line, _ in BROKEN for one in (good, line, "")]
    totals = answer_file(write(folder / "q.jsonl", records), folder / "a.jsonl", checkpoint, "cpu", max_new_tokens=2)
    answers = read(folder / "a.jsonl")
    expected = ask(*load(checkpoint, "cpu"), folder / "1.png", "why", max_new_tokens=2).text
    assert answers[::2] == [good | {"answer": expected}] * len(BROKEN)
    for number, (answer, (line, says)) in enumerate(zip(answers[1::2], BROKEN)):
        assert list(answer) == ["id", "image", "question", "error"] and answer["id"] == 3 * number + 2
        assert says in answer["error"] and "\n" not in answer["error"]
        if isinstance(line, dict) and isinstance(line.get("question"), str):
            assert answer["question"] == line["question"]
    assert totals == Totals(len(BROKEN), len(BROKEN))


def test_a_question_that_cannot_be_answered_costs_itself_alone(checkpoint, folder, monkeypatch):
    records = [*some(3), {"image": "1.png", "question": "unanswerable"}]
    generate = answering.generate_answers

    def refusing(model, processor, images, questions, *rest):
        if "unanswerable" in questions:
            raise InputError("the image is 300 times as wide as high")
        return generate(model, processor, images, questions, *rest)

    expected = uninterrupted(checkpoint, write(folder / "q.jsonl", records))
    monkeypatch.setattr(answering, "generate_answers", refusing)
    totals = answer_file(folder / "q.jsonl", folder / "a.jsonl", checkpoint, "cpu", max_new_tokens=2)
    answers = read(folder / "a.jsonl")
    assert totals == Totals(3, 1) and answers[:3] == expected[:3]
    assert answers[3]["error"] == "the image is 300 times as wide as high"


def test_a_gpu_without_enough_memory_is_reported(checkpoint, folder, monkeypatch):
    def generate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answering, "generate_answers", generate)
    with pytest.raises(InputError, match="2 questions at a time; use a smaller batch size"):
        answer_file(write(folder / "q.jsonl", some(2)), folder / "a.jsonl", checkpoint, "cpu")


def test_paths_that_are_not_paths_are_refused(tmp_path):
    with pytest.raises(InputError, match="input is None; it must be a path"):
        answer_file(None, tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="output is empty"):
        answer_file(tmp_path / "q.jsonl", "")


def test_an_image_may_be_a_url(checkpoint, folder, monkeypatch):
    fetched = []

    def download(url):
        fetched.append(url)
        return open_image(folder / "0.png")

    monkeypatch.setattr("flexattn_cuda.inputs.image_sources.download", download)
    url = "https://example.org//a/0.png?size=2"
    records = [{"image": name, "question": "What?"} for name in (url, "0.png")]
    answer_file(write(folder / "q.jsonl", records), folder / "a.jsonl", checkpoint, "cpu", max_new_tokens=2)
    answered = read(folder / "a.jsonl")
    assert fetched == [url] and answered[0]["image"] == url and answered[0]["answer"] == answered[1]["answer"]
