"""Training data: what is broken is named with its number, and what is learned is what `generate` continues."""

from __future__ import annotations

import json

import pytest
import tiny
import tiny_checkpoint
import torch
from PIL import Image
from training_data import QUESTION, record, write

from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.processor import FlexAttnLlavaProcessor
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import training_data as data
from flexattn_cuda.tasks.load import DEFAULT_MODEL
from flexattn_cuda.tasks.training_data import BrokenRecord, Collator, Conversation, Conversations

SIZE = tiny.SIDE * tiny.PATCH


def processor(split_at_images=False, prefix_everywhere=True, chat_template=None) -> FlexAttnLlavaProcessor:
    """Of LLaVA's format, where <image> is a token, or of the released one, which knows none and splits the text there."""
    tokenizer = tiny_checkpoint.tokenizer(() if split_at_images else ("<image>",), prefix_everywhere)
    images = tiny_checkpoint.image_processor()
    return FlexAttnLlavaProcessor(images, tokenizer, tiny_checkpoint.IMAGE_ID, split_at_images, chat_template)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (60, 40), "red").save(tmp_path / "image.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "image.png").read_bytes()[:60])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    return tmp_path


# -------------------------------------------------------------------------------------------------------------- records


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
        ("a.json", "{}", "holds no list"),
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
    ("no text", record(None, "\ud800?", "Yes.")),
    ("empty question", record("image.png", "<image>\n ", "42")),
    ("empty answer", record("image.png", ASKED, " \n")),
    ("image tag in an answer", record("image.png", QUESTION, "<image>")),
    ("image tag without an image", record(None, ASKED, "42")),
    ("image tag without an image", record("image.png", ASKED + "<image>", "42")),
    (
        "image tag in an image tag",
        record(["image.png"] * 2, "<image>\nWhich <ima<image>ge>?", "42"),
    ),
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
    return data.check(records, folder, lambda conversation: data.encode(one, conversation, 300), **options)


def test_every_broken_record_is_named_with_its_number_and_no_other(folder):
    records = [one for broken, fine in zip(BROKEN, FINE * len(BROKEN)) for one in (fine, broken[1])]
    found = check(records, folder)
    assert [one.record for one in found] == list(range(1, len(records), 2))
    for one, (kind, _) in zip(found, BROKEN):
        assert one.kind == kind, one
        assert "\n" not in str(one) and str(one).startswith(f"record {one.record}: {kind}: ")


def test_a_conversation_that_the_processor_refuses_costs_its_record_alone(folder):
    def encode(conversation):
        if not conversation.images:
            raise InputError("there is\nno image")

    found = data.check([record("image.png"), record(), record("image.png")], folder, encode)
    assert list(map(str, found)) == ["record 1: conversation that cannot be asked: there is no image"]


def test_broken_records_are_told_as_they_are_found(folder, capsys):
    check(
        [record("nowhere.png"), record("image.png"), record(None, "Hello?", " ")],
        folder,
        progress=True,
    )
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[:2] for line in told] == [
        ["record 2", " empty answer"],
        ["record 0", " missing image"],
    ]


def test_a_image_is_read_again_only_when_it_has_changed(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(
        data,
        "open_image",
        lambda path, real=data.open_image: (opened.append(path.name), real(path))[1],
    )
    records = [record("image.png"), record("image.png"), record("damaged.png")]
    known = folder / "images.jsonl"
    first = check(records, folder, known_images=known)
    assert sorted(opened) == ["damaged.png", "image.png"]
    with open(known, "a") as file:
        file.write('{"path": "image.p')  # a run was ended while it wrote
    opened.clear()
    assert check(records, folder, known_images=known) == first and opened == []
    Image.new("RGB", (70, 40)).save(folder / "damaged.png")
    assert check(records, folder, known_images=known) == [] and opened == ["damaged.png"]
    opened.clear()
    assert check(records, folder, known_images=known) == [] and opened == []


# --------------------------------------------------------------------------------------------------------------- labels

# As published with llava-hf/llava-1.5-7b-hf: no end after an answer. And one with a line break after the end.
PLAIN = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LINES = (
    "{% for message in messages %}{{ '[' + message['role'] + ']\n' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '</s>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
PROCESSORS = {
    "image is a token": {},
    "split at images": {"split_at_images": True},
    "no prefix inside": {"split_at_images": True, "prefix_everywhere": False},
    "a template without ends": {"chat_template": PLAIN},
    "split, a template without ends": {"chat_template": PLAIN, "split_at_images": True},
    "a template with lines": {"chat_template": LINES},
}
TURNS = [
    (QUESTION, 1, "42"),
    ("And on the blue one?", 0, "There is no blue sign."),
    ("Compare the next.", 1, "é 漢"),
]


def learned(labels: list[int]) -> list[list[int]]:
    """The runs of labels, each an answer."""
    runs: list[list[int]] = [[]]
    for label in labels:
        runs[-1].append(label) if label != data.IGNORED else runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_answer_is_learned_with_its_end_where_generate_would_begin_it(options, count):
    one = processor(**options)
    ids, labels = data.labelled_ids(one, TURNS[:count])
    assert len(ids) == len(labels) and all(label in (data.IGNORED, id) for id, label in zip(ids, labels))
    runs = learned(labels)
    assert [answering.answer_text(one, run) for run in runs] == [answer for _, _, answer in TURNS[:count]]
    assert all(run[-1] == 2 and run.count(2) == 1 for run in runs)
    begin = next(place for place, label in enumerate(labels) if label != data.IGNORED)
    assert ids[:begin] == one(text=one.prompt(QUESTION), images=Image.new("RGB", (9, 9)))["input_ids"][0].tolist()
    assert ids.count(tiny_checkpoint.IMAGE_ID) == sum(images for _, images, _ in TURNS[:count]) * tiny.SIDE**2


@pytest.mark.parametrize("options", PROCESSORS.values(), ids=PROCESSORS.keys())
def test_later_answers_follow_the_prompt_of_the_conversation_so_far(options):
    one = processor(**options)
    ids, labels = data.labelled_ids(one, TURNS[:2])
    begin = max(place for place, label in enumerate(labels) if label == data.IGNORED) + 1
    end = "" if options.get("chat_template") != PLAIN else "</s>"
    content = [
        [{"type": "image"}, {"type": "text", "text": QUESTION}],
        [{"type": "text", "text": TURNS[0][2] + end}],
    ]
    content.append([{"type": "text", "text": TURNS[1][0]}])
    messages = [dict(role=role, content=part) for role, part in zip(("user", "assistant", "user"), content)]
    prompt = one.apply_chat_template(messages, add_generation_prompt=True)
    assert ids[:begin] == one(text=prompt, images=Image.new("RGB", (9, 9)))["input_ids"][0].tolist()


def test_a_template_that_writes_questions_alone_gets_the_answer_and_its_end():
    one = FlexAttnLlavaProcessor.from_pretrained(DEFAULT_MODEL)
    ids, labels = data.labelled_ids(one, [(QUESTION, 1, "42")])
    digits = one.tokenizer.convert_tokens_to_ids(["4", "2"])
    assert learned(labels) == [[*digits, one.tokenizer.eos_token_id]]
    assert ids[:-3] == one(text=one.prompt(QUESTION), images=Image.new("RGB", (9, 9)))["input_ids"][0].tolist()
    with pytest.raises(BrokenRecord, match="writes single questions; this conversation has 2"):
        data.labelled_ids(one, TURNS[:2])
    with pytest.raises(BrokenRecord, match="makes 144 image tokens for 0 images"):
        data.encode(one, Conversation([], [("Hello?", 0, "Yes.")]), 500)


def test_the_longest_record_that_fits_is_fine():
    one, conversation = processor(), Conversation(["image.png"], [(QUESTION, 1, "42")])
    length = len(data.labelled_ids(one, conversation.turns)[0])
    assert len(data.encode(one, conversation, length)[0]) == length
    with pytest.raises(BrokenRecord, match=f"takes {length} positions, .* the limit is {length - 1}"):
        data.encode(one, conversation, length - 1)


# -------------------------------------------------------------------------------------------------------------- tensors


def test_a_batch_is_padded_on_the_right_and_its_images_follow_each_other(tmp_path):
    file, images = write(tmp_path)
    one, records = processor(), data.read_records(file)
    dataset = Conversations(records, [1, 3, 5], images, one, lambda conversation: data.encode(one, conversation, 300))
    items = [dataset[number] for number in range(3)]
    batch = Collator(one.pad_id)(items)
    longest = max(len(item["input_ids"]) for item in items)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, longest)
    for row, item in enumerate(items):
        length = len(item["input_ids"])
        assert (
            torch.equal(batch["input_ids"][row, :length], item["input_ids"])
            and (batch["input_ids"][row, length:] == one.pad_id).all()
        )
        assert (
            torch.equal(batch["labels"][row, :length], item["labels"]) and (batch["labels"][row, length:] == -100).all()
        )
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (longest - length)
    assert "pixel_values" not in items[1] and "pixel_values" not in Collator(0)(items[1:2])
    for name in ("pixel_values", "pixel_values_hr", "valid_rect"):
        assert torch.equal(batch[name], torch.cat([items[0][name], items[2][name]]))


def test_a_image_that_is_gone_later_costs_its_record_alone(tmp_path):
    file, images = write(tmp_path)
    one, told = processor(), []
    records = data.read_records(file)
    encode = lambda conversation: data.encode(one, conversation, 300)  # noqa: E731
    dataset = Conversations(records, range(8), images, one, encode, told.append)
    (images / "1.png").unlink()
    (images / "2.png").write_bytes(b"")
    for _ in range(2):
        assert torch.equal(dataset[1]["input_ids"], dataset[3]["input_ids"])
    assert [broken.record for broken in told] == [1, 2]
    for number in range(8):
        (images / f"{number}.png").unlink(missing_ok=True)
    gone = Conversations(records, [0, 1], images, one, encode)
    with pytest.raises(InputError, match="no image of the training data can be read any more"):
        gone[0]
