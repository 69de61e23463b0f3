"""A file of questions: the answers of `ask`, each line on its own, and nothing lost when a run ends in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint
import torch
from PIL import Image

from flexattn_cuda import ask, load
from flexattn_cuda.errors import InputError
from flexattn_cuda.inputs.images import open_image
from flexattn_cuda.runs import progress as report
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import ask_batch as batch
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.ask_batch import Totals, answer_file

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SIGNS = json.loads((EXAMPLES / "questions.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def default():
    return load(device="cpu")


@pytest.fixture
def folder(tmp_path):
    """A folder with photographs 0.png, 1.png, 2.png of different shapes."""
    random = np.random.default_rng(5)
    for number, (width, height) in enumerate([(20, 15), (15, 20), (12, 12)]):
        values = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(values).resize((8 * width, 8 * height)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(path: Path, records: list[dict | str]) -> Path:
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in records) + "\n")
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def some(count: int) -> list[dict]:
    """Questions of different lengths about different photographs."""
    return [{"image": f"{number % 3}.png", "question": "why" * (1 + number * 7 % 5)} for number in range(count)]


def signs() -> list[dict]:
    """Questions for the default model: the example photographs, each with its own question and two of other lengths."""
    records = [{"image": str(EXAMPLES / one["file"]), "question": one["question"]} for one in SIGNS]
    colours = [
        "Which digits are on the sign that is blue?",
        "What does the sign say that is red?",
        "black?",
    ]
    return records + [{"image": records[n % 4]["image"], "question": colours[n % 3]} for n in range(5)]


@pytest.fixture
def asked(monkeypatch):
    """The batches of questions that the model was asked."""
    batches, generate = [], answering.generate_answers

    def recorded(model, processor, images, questions, *rest):
        batches.append(questions)
        return generate(model, processor, images, questions, *rest)

    monkeypatch.setattr(answering, "generate_answers", recorded)
    return batches


def interrupt(monkeypatch, after: int) -> None:
    """Ends the run, as Ctrl-C would, when `after` batches are answered."""
    generate, left = answering.generate_answers, iter(range(after))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(answering, "generate_answers", interrupted)


# ---------------------------------------------------------------------------------------------------------------- answers


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


@pytest.mark.slow
def test_a_long_question_takes_no_room_from_the_answers_of_others(checkpoint, folder, monkeypatch):
    model, processor = load(checkpoint, "cpu")
    questions, image = ["x", "x" * 200, "x" * 202], open_image(folder / "0.png")
    lengths = [answering.prompt_length(model, processor, one) for one in questions]
    monkeypatch.setattr(model.config.text_config, "max_position_embeddings", lengths[1] + 4)
    alone = [ask(model, processor, image, one, max_new_tokens=9).tokens for one in questions]
    assert answering.generate_answers(model, processor, [image] * 3, questions, 9) == alone
    assert [len(tokens) for tokens in alone] == [9, 4, 2]


def test_an_answer_ends_at_its_own_end(checkpoint, folder, monkeypatch):
    model, processor = load(checkpoint, "cpu")
    questions, images = (
        ["why", "whywhy", "x"],
        [open_image(folder / f"{number}.png") for number in range(3)],
    )
    whole = answering.generate_answers(model, processor, images, questions, 8)
    monkeypatch.setattr(model.generation_config, "eos_token_id", [2, whole[1][3]])
    ended = answering.generate_answers(model, processor, images, questions, 8)
    expected = [row[: row.index(whole[1][3])] if whole[1][3] in row else row for row in whole]
    assert ended == expected and len({len(row) for row in ended}) > 1


def test_batches_hold_prompts_of_about_the_same_length(checkpoint, folder, asked):
    records = some(11)
    answer_file(
        write(folder / "q.jsonl", records),
        folder / "a.jsonl",
        checkpoint,
        "cpu",
        max_new_tokens=1,
        batch_size=4,
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

    monkeypatch.setattr(batch, "open_image", opened)
    answer_file(
        write(folder / "q.jsonl", some(7)),
        folder / "a.jsonl",
        checkpoint,
        "cpu",
        max_new_tokens=1,
        batch_size=2,
    )
    assert len(images) == 7 and max(most) == 2


# ----------------------------------------------------------------------------------------------------------- broken lines

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
    ({"image": "0.png", "question": "\ud800"}, "no character"),
    ({"image": "0.png", "question": "why", "id": [1]}, '"id" is neither'),
    ({"image": "0.png", "question": "long " * 300}, "the question is too long"),
    ({"image": "nowhere.png", "question": "why"}, "there is no image"),
    ({"image": "", "question": "why"}, "is not an image file"),
    ({"image": "cut.png", "question": "why"}, "is damaged"),
    ({"image": "a\0b\ud800.png", "question": "why"}, "there is no image"),
    ({"image": "n" * 300, "question": "why"}, "cannot be read"),
]


def test_a_broken_line_costs_itself_alone(checkpoint, folder):
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


# ---------------------------------------------------------------------------------------------------------- interruptions


def uninterrupted(checkpoint: Path, questions: Path) -> list[dict]:
    output = questions.with_name("uninterrupted.jsonl")
    answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    return read(output)


@pytest.mark.slow
def test_a_killed_run_goes_on(folder, asked):
    records = signs() * 4
    questions, output, journal = (
        write(folder / "q.jsonl", records),
        folder / "a.jsonl",
        folder / "a.jsonl.partial.0",
    )
    command = [
        sys.executable,
        "-m",
        "flexattn_cuda.cli",
        "ask-batch",
        questions,
        "-o",
        output,
        "--batch-size",
        "1",
    ]
    run = subprocess.Popen([*command, "--device", "cpu"], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while run.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
            time.sleep(0.01)
    finally:
        run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and not output.exists()
    done = [json.loads(line)["line"] for line in journal.read_bytes().split(b"\n")[1:-1]]
    assert 3 <= len(done) < len(records)

    assert answer_file(questions, output, device="cpu") == Totals(len(records), 0)
    assert sum(map(len, asked)) == len(records) - len(done)
    assert [one["answer"] for one in read(output)[: len(SIGNS)]] == [one["answer"] for one in SIGNS]
    texts = [one["answer"] for one in read(output)]
    assert texts == texts[: len(signs())] * 4
    assert not journal.exists()


@pytest.mark.slow
def test_a_journal_cut_anywhere_is_continued(checkpoint, folder, monkeypatch, asked):
    questions, output, journal = (
        write(folder / "q.jsonl", some(6)),
        folder / "a.jsonl",
        folder / "a.jsonl.partial.0",
    )
    expected = uninterrupted(checkpoint, questions)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=4)
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
    content = journal.read_bytes()
    header = content.index(b"\n") + 1
    assert not output.exists() and content.count(b"\n") == 5
    last = content.rindex(b"\n", 0, -1) + 1
    cuts = [0, 1, header - 1, header, *range(last, len(content), 5), len(content) - 1, len(content)]
    model = load(checkpoint, "cpu")
    monkeypatch.setattr(loading, "load", lambda *_: model)
    for torn in [content[:cut] for cut in cuts] + [
        content[:last] + b"\0" * 9,
        content + b'{"line"\n',
    ]:
        journal.write_bytes(torn)
        asked.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt(patch, after=1)
            answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
        assert read(output) == expected
        whole = [line for line in content[header:].splitlines(keepends=True) if line in torn]
        assert sum(map(len, asked)) == 6 - len(whole)
        output.unlink()


def test_nothing_is_left_to_ask_when_a_run_was_ended_before_the_output(checkpoint, folder, monkeypatch, asked):
    questions, output = write(folder / "q.jsonl", some(5)), folder / "a.jsonl"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(batch, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    assert len(asked) == 1
    assert answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2) == Totals(5, 0) and len(asked) == 1


def test_another_input_model_or_setting_is_refused(checkpoint, folder, monkeypatch):
    questions, output = write(folder / "q.jsonl", some(4)), folder / "a.jsonl"
    settings = dict(model=checkpoint, device="cpu", max_new_tokens=2, batch_size=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=1)
        answer_file(questions, output, **settings)
    for changed, what in [
        (dict(max_new_tokens=3), "max_new_tokens"),
        (dict(model=None), "model"),
        (dict(dtype="float16"), "dtype"),
    ]:
        with pytest.raises(InputError, match=f"begun with another {what};.*--restart"):
            answer_file(questions, output, **settings | changed)
    with pytest.raises(InputError, match="begun with another input"):
        answer_file(write(folder / "other.jsonl", some(4)), output, **settings)
    write(questions, some(5))
    with pytest.raises(InputError, match="begun with another input"):
        answer_file(questions, output, **settings)
    assert answer_file(questions, output, **settings, restart=True) == Totals(5, 0)


def test_an_output_is_not_overwritten(checkpoint, folder, asked):
    questions, output = write(folder / "q.jsonl", some(2)), folder / "a.jsonl"
    output.write_text("dear to me")
    with pytest.raises(InputError, match="is there already"):
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    assert output.read_text() == "dear to me" and not asked
    assert answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2, restart=True) == Totals(2, 0)


def test_what_is_no_journal_is_neither_read_nor_discarded(checkpoint, folder):
    questions, stranger = write(folder / "q.jsonl", some(2)), folder / "a.jsonl.partial.0"
    stranger.write_text("dear to me")
    for restart in (False, True):
        with pytest.raises(InputError, match="is not a journal"):
            answer_file(questions, folder / "a.jsonl", checkpoint, "cpu", restart=restart)
    assert stranger.read_text() == "dear to me"


def test_two_runs_at_a_time_are_refused(checkpoint, folder, monkeypatch):
    questions, output, refused = write(folder / "q.jsonl", some(2)), folder / "a.jsonl", []

    def meanwhile(*_):
        for restart in (False, True):
            with pytest.raises(InputError, match="another run is writing"):
                answer_file(questions, output, checkpoint, "cpu", restart=restart)
            refused.append(restart)
        raise KeyboardInterrupt

    monkeypatch.setattr(answering, "generate_answers", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        answer_file(questions, output, checkpoint, "cpu")
    assert refused == [False, True]


def test_a_gpu_that_is_too_small(checkpoint, folder, monkeypatch):
    def generate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(answering, "generate_answers", generate)
    with pytest.raises(InputError, match="2 questions at a time; use a smaller batch size"):
        answer_file(write(folder / "q.jsonl", some(2)), folder / "a.jsonl", checkpoint, "cpu")


# ------------------------------------------------------------------------------------------------------ several processes


# The command line, which also keeps the questions that each process asked its model.
PROGRAM = """
import os
from pathlib import Path
from flexattn_cuda import cli
from flexattn_cuda.tasks import ask as answering

generate = answering.generate_answers

def recorded(model, processor, images, questions, *rest):
    with open(Path(__file__).with_name("asked." + os.environ["RANK"]), "a") as file:
        print(*questions, file=file)
    return generate(model, processor, images, questions, *rest)

answering.generate_answers = recorded
cli.main()
"""


@pytest.mark.slow
def test_two_processes_go_on_where_one_was_ended(checkpoint, folder, monkeypatch):
    questions, output = (
        write(folder / "q.jsonl", some(9) + [{"image": "nowhere.png", "question": "y"}]),
        folder / "a.jsonl",
    )
    expected = uninterrupted(checkpoint, questions)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=2)
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    (folder / "program.py").write_text(PROGRAM)
    options = [
        "--model",
        checkpoint,
        "--max-new-tokens",
        "2",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    run = subprocess.run(
        [*launcher, folder / "program.py", "ask-batch", questions, "-o", output, *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(Path(batch.__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "2 questions were answered before, 8 are left",
        f"wrote {output}: answers 9, errors 1",
    ]
    assert read(output) == expected
    assert not list(folder.glob("a.jsonl.partial*"))
    asked = [(folder / f"asked.{rank}").read_text().split() for rank in range(2)]
    assert min(map(len, asked)) >= 3 and len(asked[0] + asked[1]) == 7


def test_one_process_goes_on_where_several_were_ended(checkpoint, folder, monkeypatch, asked):
    questions, output = write(folder / "q.jsonl", some(9)), folder / "a.jsonl"
    expected = uninterrupted(checkpoint, questions)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, after=6)
        answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
    header, *lines = (folder / "a.jsonl.partial.0").read_bytes().splitlines(keepends=True)
    for rank in range(3):
        (folder / f"a.jsonl.partial.{rank}").write_bytes(header + b"".join(lines[rank::3]))
    asked.clear()
    answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    assert read(output) == expected and sum(map(len, asked)) == 3
    assert not list(folder.glob("a.jsonl.partial*"))


def test_each_of_several_processes_takes_the_gpu_of_its_local_rank(monkeypatch):
    reason = "there is no GPU 2"
    monkeypatch.setattr(
        "flexattn_cuda.build.cuda_unavailable_reason",
        lambda index=None: reason if index == 2 else None,
    )
    assert Processes().device("auto") == torch.device("cuda")
    for name, value in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    devices = [Processes().device(wanted) for wanted in (None, "auto", "cuda", "cuda:0", "cpu")]
    assert [str(device) for device in devices] == ["cuda:1", "cuda:1", "cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="there is no GPU 2"):
        Processes().device("auto")


# ----------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.jsonl", "-o", "a.jsonl"], "nowhere.jsonl cannot be read: No such file"),
        (["empty.jsonl", "-o", "a.jsonl"], "empty.jsonl holds no questions"),
        (["q.jsonl", "-o", "no/folder/a.jsonl"], "there is no folder"),
        (["q.jsonl", "-o", "."], "it is a folder"),
        (["q.jsonl", "-o", "./q.jsonl"], "would overwrite the questions"),
        (["q.jsonl", "-o", "./q.jsonl", "--restart"], "would overwrite the questions"),
        (["q.jsonl", "-o", "a.jsonl", "--batch-size", "0"], "the batch size is 0"),
        (["q.jsonl", "-o", "a.jsonl", "--max-new-tokens", "0"], "must be at least 1"),
        (["q.jsonl", "-o", "a.jsonl", "--device", "tpu"], "allowed: auto, cpu, cuda"),
        (["q.jsonl", "-o", "a.jsonl", "--dtype", "int8"], "allowed: auto, float32"),
        (["q.jsonl", "-o", "a.jsonl", "--model", "nowhere"], "no checkpoint 'nowhere'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flexattn, folder, monkeypatch, arguments, says):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loading, "load", lambda *_: pytest.fail("the model was loaded"))
    before = write(folder / "q.jsonl", some(2)).read_bytes()
    (folder / "empty.jsonl").write_text("\n\n")
    code, out, err = flexattn("ask-batch", *arguments)
    assert code == 2 and out == "" and err.startswith("flexattn: ") and err.count("\n") == 1 and says in err
    assert (folder / "q.jsonl").read_bytes() == before and not list(folder.glob("*.partial*"))


@pytest.mark.parametrize("terminal", [False, True])
def test_the_command_tells_how_far_it_is(flexattn, checkpoint, folder, monkeypatch, terminal):
    monkeypatch.setattr(report, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setenv("FORCE_COLOR", "1" if terminal else "")
    questions, output = write(folder / "q.jsonl", some(3)), folder / "a.jsonl"
    options = ("--model", checkpoint, "--max-new-tokens", 1, "--batch-size", 2)
    code, out, err = flexattn("ask-batch", questions, "-o", output, *options)
    assert (code, out) == (0, "") and err.endswith(f"wrote {output}: answers 3, errors 0\n")
    assert len(read(output)) == 3
    if terminal:
        assert "3/3" in err and "a second" in err and "left" in err
    else:
        first, second, _ = err.splitlines()
        assert first.startswith("2 of 3 questions, ") and second.startswith("3 of 3 questions, ")
        assert " a second, 0:00:0" in first and second.endswith(" a second, 0:00:00 left")
