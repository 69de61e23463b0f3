"""Training data: every broken record is named with its number and its kind, and no other."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from question_files import QUESTION
from tiny_checkpoint import processor
from training_data import record

from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.training_data import checks


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "image.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "image.png").read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    return tmp_path


def test_a_list_and_lines_hold_the_same_records(tmp_path):
    records = [record("a.png"), record()]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)) + "\n")
    assert data.read_records(tmp_path / "a.json") == data.read_records(tmp_path / "a.jsonl") == records


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("none.json", None, "cannot be read: No such file"),
        ("a.json", "[]", "holds no records"),
        ("a.jsonl", "\n", "holds no records"),
        ("a.json", "{}", "does not hold a list"),
        ("a.json", '{"image": 1}\n{"image": 2}', "must end in .jsonl"),
    ],
)
def test_a_file_without_records_is_refused(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=says):
        data.read_records(tmp_path / name)


ASKED = f"<image>\n{QUESTION}"


BROKEN = [
    ("not a record", b"{half a line"),
    ("not a record", ["no", "object"]),
    ("not a record", record(7)),
    ("not a record", record([""])),
    ("empty conversation", {"image": "image.png"}),
    ("empty conversation", {"image": "image.png", "conversations": []}),
    ("not a record", {"conversations": ["Hello?", "Yes."]}),
    ("not a record", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "Yes."}]}),
    ("roles out of order", record("image.png", ASKED)),
    ("roles out of order", {"conversations": record(None)["conversations"][::-1]}),
    ("roles out of order", {"conversations": record(None)["conversations"][:1] * 2}),
    ("not text", record(None, "\ud800?", "Yes.")),
    ("empty question", record("image.png", "<image>\n ", "42")),
    ("empty answer", record("image.png", ASKED, " \n")),
    ("image tag in an answer", record("image.png", QUESTION, "<image>")),
    ("image tag without an image", record(None, ASKED, "42")),
    ("image tag without an image", record("image.png", ASKED + "<image>", "42")),
    ("image tag in an image tag", record(["image.png"] * 2, "<image>\nWhich <ima<image>ge>?", "42")),
    ("image without an image tag", record("image.png", QUESTION, "42")),
    ("image without an image tag", record(["image.png"] * 2, ASKED, "42")),
    ("missing image", record("nowhere.png")),
    ("missing image", record("no\0name.png")),
    ("missing image", record(["image.png", "nowhere.png"], "<image><image>" + QUESTION, "42")),
    ("unreadable image", record("damaged.png")),
    ("unreadable image", record("empty.png")),
    ("unreadable image", record("text.png")),
    ("unreadable image", record(".")),
    ("unreadable image", record("image.png/beyond.png")),
    ("answer too long", record("image.png", ASKED, "words " * 400)),
    ("record too long", record("image.png", ASKED + "words " * 400, "42")),
]


FINE = [
    record("image.png"),
    record(["image.png", "image.png"], "<image><image>" + QUESTION, "42"),
    record("image.png", QUESTION + "<image>", "42", id=[], others={}),
    record("image.png", ASKED, "42", "And on the blue one?", "7"),
    record(None, "Hello?", "Yes.") | {"image": None},
]


def check(records, folder, **options):
    one = processor()
    return data.check(records, folder, lambda conversation: data.encode(one, conversation, 300), **options).broken


def test_every_broken_record_is_named_with_its_number_and_no_other(folder):
    records = [one for broken, fine in zip(BROKEN, FINE * len(BROKEN)) for one in (fine, broken[1])]
    found = check(records, folder)
    assert [one.record for one in found] == list(range(1, len(records), 2))
    for one, (kind, _) in zip(found, BROKEN):
        assert one.kind == kind, one
        assert "\n" not in str(one) and str(one).startswith(f"record {one.record}: {kind}: ")


def test_a_conversation_that_the_processor_refuses_is_listed(folder):
    def encode(conversation):
        if not conversation.images:
            raise InputError("there is\nno image")

    found = data.check([record("image.png"), record(), record("image.png")], folder, encode).broken
    assert list(map(str, found)) == ["record 1: conversation that cannot be asked: there is no image"]


def test_broken_records_are_reported_as_they_are_found(folder, capsys):
    check([record("nowhere.png"), record("image.png"), record(None, "Hello?", " ")], folder, progress=True)
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in told] == [["record 2", " empty answer"], ["record 0", " missing image"]]


def test_an_image_is_read_again_only_when_it_has_changed(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(
        checks, "open_image", lambda path, real=checks.open_image: (opened.append(path.name), real(path))[1]
    )
    records = [record("image.png"), record("image.png"), record("damaged.png")]
    known = folder / "images.jsonl"
    first = check(records, folder, verdicts=known)
    assert sorted(opened) == ["damaged.png", "image.png"]
    with open(known, "a") as file:
        file.write('{"path": "image.p')  # a run was ended while it wrote
    opened.clear()
    assert check(records, folder, verdicts=known) == first and opened == []
    Image.new("RGB", (70, 40)).save(folder / "damaged.png")
    assert check(records, folder, verdicts=known) == [] and opened == ["damaged.png"]
    opened.clear()
    assert check(records, folder, verdicts=known) == [] and opened == []
