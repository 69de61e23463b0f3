"""Requests that are answered together: each as if it were alone."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from question_files import image

from flexattn_cuda.serve.engine import Engine
from flexattn_cuda.serve.images import ImageCache, ServedImage
from flexattn_cuda.serve.jobs import Done, Failed, Job, Piece, Prompt, Wanted
from flexattn_cuda.serve.metrics import Metrics
from flexattn_cuda.serve.rows import VisibleText
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks.load import load

QUESTIONS = ["why", "What stands there on the left?", "How many?", "What colour is it, and who painted it so?"]


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load(checkpoint, "cpu")


class Heard:
    """The events of one job."""

    def __init__(self) -> None:
        self.events, self.over = [], threading.Event()

    def __call__(self, event) -> None:
        self.events.append(event)
        if isinstance(event, Done | Failed):
            self.over.set()

    @property
    def text(self) -> str:
        assert self.over.wait(60)
        assert isinstance(self.events[-1], Done), self.events[-1]
        return "".join(event.text for event in self.events if isinstance(event, Piece))


def prompt(processor, question: str, *seeds: int) -> Prompt:
    conversation = [
        {"role": "user", "content": [{"type": "image"}] * len(seeds) + [{"type": "text", "text": question}]}
    ]
    text = processor.conversation_text(conversation, add_generation_prompt=True)
    pictures = [image(160 - 8 * seed, 120, seed) for seed in seeds]
    images = [
        ServedImage(str(seed), *one.size, processor.frame(*one.size), processor.image_inputs([one]))
        for seed, one in zip(seeds, pictures)
    ]
    return Prompt(processor.conversation_inputs(text, [processor.image_tokens] * len(seeds)), images)


def engine(loaded, batch_size: int = 16, capacity: int = 1 << 30) -> Engine:
    return Engine(*loaded, ImageCache(capacity), batch_size, Metrics())


def answers(loaded, asked: list[tuple[Prompt, Wanted]], batch_size: int = 16) -> list[str]:
    """Answer prompts, all of which wait when the engine starts."""
    made, heard = engine(loaded, batch_size), [Heard() for _ in asked]
    made._thread = threading.Thread(target=made._run, daemon=True)
    for (one, wanted), sink in zip(asked, heard):
        made._waiting.append(Job(one, wanted, sink, 60))
    made.start()
    texts = [sink.text for sink in heard]
    made.stop()
    return texts


@pytest.mark.parametrize("trace", [False, True])
def test_answers_of_a_batch_equal_those_of_single_runs(loaded, trace):
    processor = loaded[1]
    asked = [
        (
            prompt(processor, QUESTIONS[number % 4], *range(number % 3)),
            Wanted(3 + 2 * number, trace=trace and number % 3),
        )
        for number in range(9)
    ]
    together = answers(loaded, asked)
    assert together == [answers(loaded, [one])[0] for one in asked] and len(set(together)) > 5


def test_a_batch_differs_from_single_runs_by_rounding_alone(loaded):
    """The figure behind the promise: what the logits of a batch differ by, and how far apart the best two are."""
    model, processor = loaded
    images = [image(160 - 8 * seed, 120, seed) for seed in range(4)]
    texts = [processor.prompt(question) for question in QUESTIONS]
    with torch.no_grad():
        batch = model(**processor(images=images, text=texts)).logits[:, -1]
        single = torch.cat(
            [model(**processor(images=[one], text=[text])).logits[:, -1] for one, text in zip(images, texts)]
        )
    top = single.topk(2).values
    assert (batch - single).abs().max() < 1e-4 * single.abs().max()
    assert (top[:, 0] - top[:, 1]).min() > 10 * (batch - single).abs().max()


def test_hr_tokens_without_weight_change_nothing(loaded):
    """What models of other families answer with in place of the low-resolution model is that model."""
    model, processor = loaded
    inputs = processor(images=[image()], text=processor.prompt("why"))
    with torch.no_grad():
        weightless, full = (model(**inputs, hr_alpha=alpha).logits[:, -1] for alpha in (0.0, 1.0))
        del inputs["pixel_values_hr"]
        low = model(**inputs).logits[:, -1]
    assert torch.allclose(weightless, low, atol=1e-5) and not torch.allclose(full, low, atol=1e-3)


def test_a_batch_of_mixed_systems_is_split(loaded):
    processor = loaded[1]
    asked = [(prompt(processor, "why", 1), Wanted(6, hr=bool(number % 2))) for number in range(6)]
    together = answers(loaded, asked)
    assert together[0::2] == [together[0]] * 3 and together[1::2] == [together[1]] * 3 and together[0] != together[1]


def test_an_image_is_encoded_once(loaded, monkeypatch):
    model, processor = loaded
    calls, encode = [], model.encode
    monkeypatch.setattr(model, "encode", lambda **pixels: calls.append(1) or encode(**pixels))
    made = engine(loaded, batch_size=2)
    made.start()
    for question in QUESTIONS:
        heard = Heard()
        made.submit(Job(prompt(processor, question, 1), Wanted(2), heard, 60))
        assert heard.text
    made.stop()
    assert len(calls) == 1


def test_a_job_that_is_cancelled_while_it_waits_is_never_begun(loaded):
    made, heard = engine(loaded), Heard()
    job = Job(prompt(loaded[1], "why"), Wanted(4), heard, 60)
    job.cancel()
    made._waiting.append(job)
    made.start()
    assert heard.over.wait(10) and len(heard.events) == 1
    made.stop()


def test_a_row_that_is_cancelled_does_not_hold_up_its_batch(loaded):
    made, first, second = engine(loaded), Heard(), Heard()
    long, short = prompt(loaded[1], "why", 1), prompt(loaded[1], "How many?", 2)
    cancelled = Job(long, Wanted(300), lambda event: (first(event), cancelled.cancel()), 60)
    made._waiting += [cancelled, Job(short, Wanted(5), second, 60)]
    begun = time.monotonic()
    made.start()
    assert second.text == answers(loaded, [(short, Wanted(5))])[0]
    made.stop()
    assert time.monotonic() - begun < 20 and len(first.events) < 10


def test_a_job_that_is_late_fails_with_a_sentence(loaded):
    made, heard = engine(loaded), Heard()
    made.start()
    made.submit(Job(prompt(loaded[1], "why", 1), Wanted(300), heard, 0.2))
    assert heard.over.wait(20)
    made.stop()
    assert heard.events[-1].error.status == 504 and "longer than the 0.2 seconds" in heard.events[-1].error.message


def test_an_error_of_the_model_ends_its_batch_and_not_the_server(loaded, monkeypatch):
    made, broken, fine = engine(loaded), Heard(), Heard()
    with monkeypatch.context() as patch:
        patch.setattr("flexattn_cuda.serve.engine.generate_greedily", lambda *_, **__: 1 / 0)
        made.start()
        made.submit(Job(prompt(loaded[1], "why", 1), Wanted(2), broken, 60))
        assert broken.over.wait(20)
    made.submit(Job(prompt(loaded[1], "why", 1), Wanted(2), fine, 60))
    assert fine.text and broken.events[-1].error.status == 500
    made.stop()


def test_a_full_gpu_is_told_as_such(loaded, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError

    made, heard = engine(loaded), Heard()
    monkeypatch.setattr("flexattn_cuda.serve.engine.generate_greedily", full)
    made.start()
    made.submit(Job(prompt(loaded[1], "why", 1), Wanted(2), heard, 60))
    assert heard.over.wait(20)
    made.stop()
    assert heard.events[-1].error.status == 503 and "--batch-size" in heard.events[-1].error.message


def test_stopping_refuses_what_waits(loaded):
    made, heard = engine(loaded, batch_size=1), [Heard() for _ in range(4)]
    for sink in heard:
        made._waiting.append(Job(prompt(loaded[1], "why", 1), Wanted(8), sink, 60))
    made.start()
    made.stop()
    assert all(sink.over.is_set() for sink in heard)
    assert isinstance(heard[-1].events[-1], Failed) and heard[-1].events[-1].error.status == 503
    assert not made.alive


def test_an_answer_is_no_longer_than_the_model_has_positions(loaded):
    assert answering.room(loaded[0], 500) == 12


# ------------------------------------------------------------------------------------------------------- visible text


@pytest.mark.parametrize("pieces", [[" 8", "9 ", "", "0 "], [" 89 0 "], list(" 89 0 ")])
def test_white_space_around_an_answer_is_not_shown(pieces):
    text = VisibleText()
    assert "".join(map(text.add, pieces)) + text.end() == "89 0"


@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_a_stop_text_is_found_however_it_is_cut(size):
    answer, text = "one two STOP three", VisibleText(["STOP", "three"])
    shown = [text.add(answer[at : at + size]) for at in range(0, len(answer), size)]
    assert "".join(shown) + text.end() == "one two" and text.stopped


def test_what_only_begins_like_a_stop_text_is_shown_in_the_end():
    text = VisibleText(["STOP"])
    assert text.add("a ST") == "a" and text.add("AR") == " STAR" and text.add("ST") == "" and text.end() == "ST"


# ------------------------------------------------------------------------------------------------------------- images


def served_image(digest: str, numbers: int) -> ServedImage:
    return ServedImage(digest, 1, 1, None, {"image_features": torch.zeros(numbers)}, encoded=True)


def test_the_images_that_were_used_last_are_kept():
    cache = ImageCache(4 * 10)
    for digest in "abc":
        cache.keep(served_image(digest, 4))
        assert cache.find("a" if digest == "a" else digest)
        cache.find("a")
    assert cache.find("a") and cache.find("c") and not cache.find("b") and cache.size == 2 * 16


def test_an_image_larger_than_the_cache_drops_no_other():
    cache = ImageCache(4 * 10)
    cache.keep(served_image("a", 10))
    cache.keep(served_image("b", 11))
    assert cache.find("a") and not cache.find("b") and len(cache) == 1


def test_keeping_an_image_twice_counts_it_once():
    cache = ImageCache(1000)
    for _ in range(3):
        cache.keep(served_image("a", 10))
    assert cache.size == 40
