"""`flexattn chat`: questions and commands from a pipe and from a terminal."""

from __future__ import annotations

import importlib.util
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from question_files import EXAMPLES, ROOT, SIGNS
from refusals import refused

from flexattn_cuda import load
from flexattn_cuda.cli.answers import AnswerPrinter
from flexattn_cuda.tasks.conversation import Conversation

ANSWER = 4  # tokens
ON_A_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # whose Ctrl-C is a signal to this process
from flexattn_cuda.cli import main
main()
"""
READY = "\x1b[?2004h"  # what prompt_toolkit sends when it begins to read a line


@pytest.fixture
def talk(flexattn, checkpoint, monkeypatch):
    """talk(lines, *arguments) -> (exit code, stdout, stderr) of a chat whose questions are piped in."""

    def run(lines: list[str | bytes], *arguments) -> tuple[int, str, str]:
        encoded = [line if isinstance(line, bytes) else line.encode() for line in lines]
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(encoded)), encoding="utf-8"))
        options = () if "--model" in arguments else ("--model", checkpoint)
        return flexattn("chat", *arguments, *options, "--device", "cpu", "--max-new-tokens", ANSWER)

    return run


@pytest.fixture
def answers(checkpoint):
    """answers(image, *questions, **options) -> the answers of a conversation with the small checkpoint."""

    def ask(image, *questions, **options) -> list[str]:
        conversation = Conversation(*load(checkpoint, "cpu", **options), image)
        return [conversation.ask(question, ANSWER).text for question in questions]

    return ask


def test_the_answers_of_piped_questions_are_those_of_a_conversation(talk, answers, image):
    code, out, err = talk(["why", "", "  how  ", "why"], image)
    assert (code, err) == (0, "")
    assert out.splitlines() == answers(image, "why", "how", "why")


def test_reset_and_another_image_begin_again(talk, answers, folder):
    first, second = folder / "0.png", folder / "1.png"
    code, out, _ = talk(["why", "why", "/reset", "why", f"/image {second}", "why", "/quit", "why"], first)
    once, twice = answers(first, "why", "why")
    assert code == 0 and out.splitlines() == [once, twice, once, *answers(second, "why")] and once != twice


def test_another_system_is_the_one_that_ask_loads(talk, answers, image):
    code, out, err = talk(["why", "/system llava", "why", "/map", "/system nothing", "/system flexattn", "why"], image)
    plain = answers(image, "why", system="llava")
    assert code == 0 and out.splitlines()[1] == plain[0] != out.splitlines()[0]
    assert out.splitlines()[2] == answers(image, "why", system="flexattn")[0]
    loaded, no_map, no_system, again = err.splitlines()
    assert (loaded, again) == ("loaded as llava", "loaded as flexattn")
    assert "no FlexAttention" in no_map and "there is no system 'nothing'; allowed: llava, hd," in no_system


def test_a_system_that_cannot_be_loaded_leaves_the_one_before(talk, answers, image):
    code, out, err = talk(["/system llava", "why"], image, "--threshold", 100)
    assert code == 0 and len(out.splitlines()) == 1
    as_before, sentence = err.splitlines()
    assert "loaded as before" in as_before and "without FlexAttention" in sentence
    assert out.splitlines() != answers(image, "why", system="llava")


def test_the_map_of_the_last_answer_is_drawn_and_overwrites_nothing(talk, checkpoint, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = talk(["/map", "why", "/map", "how", "/map", "/map own.png", f"/map {image}", "/map own.txt"], image)
    early, first, second, own, overwrites, kind = err.splitlines()
    assert code == 0 and (first, second, own) == ("wrote map-1.png", "wrote map-2.png", "wrote own.png")
    assert "no answer to draw yet" in early and "would be overwritten" in overwrites and "extension" in kind
    conversation = Conversation(*load(checkpoint, "cpu"), image)
    for name, question in (("map-1.png", "why"), ("map-2.png", "how")):
        drawn = np.asarray(conversation.ask(question, ANSWER).draw())
        assert np.array_equal(np.asarray(Image.open(name)), drawn)
    assert np.array_equal(np.asarray(Image.open("own.png")), drawn)


@pytest.mark.parametrize(
    "line, says",
    [
        ("/image nowhere.png", "there is no image nowhere.png"),
        ("/image", "/image needs the path or URL"),
        ("/image text.png", "is not an image that can be read"),
        ("/image empty.png", "is an empty file"),
        ("/image .", "is not an image file"),
        ("/image -", "there is no image -"),
        ("/images", "there is no command /images; /help lists them"),
        ("/", "there is no command /; /help lists them"),
        ("/quit now", "/quit takes nothing after it"),
        ("/system", "there is no system ''"),
        (b"what is \xff?", "half of a surrogate pair"),
        ("what is <image>?", "contains <image>"),
        ("long " * 400, "the model has 512 positions"),
        ("/map no/folder/map.png", "there is no folder"),
    ],
)
def test_an_error_is_a_sentence_and_the_chat_goes_on(talk, answers, image, tmp_path, monkeypatch, line, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    code, out, err = talk(["why", line, "how"], image)
    assert code == 0 and err.startswith("flexattn: ") and err.count("\n") == 1 and says in err
    assert out.splitlines() == answers(image, "why", "how")


def test_a_chat_may_begin_without_an_image(talk, answers, image):
    code, out, err = talk(["why", f"/image {image}", "why"])
    assert code == 0 and "there is no image to ask about" in err and out.splitlines() == answers(image, "why")


def test_help_lists_every_command(talk):
    code, out, err = talk(["/help"])
    assert (code, out) == (0, "")
    assert [line.split()[0] for line in err.splitlines()] == ["/image", "/map", "/system", "/reset", "/help", "/quit"]


@pytest.mark.slow
def test_a_model_that_keeps_no_conversation_says_so_once(talk, image):
    default = load.__globals__["DEFAULT_MODEL"]
    first, second = (EXAMPLES / one["file"] for one in SIGNS[:2])
    questions = [one["question"] for one in SIGNS[:2]]
    lines = [questions[0], "/reset", questions[0], f"/image {second}", questions[1]]
    code, out, err = talk(lines, first, "--model", default)
    assert code == 0 and out.splitlines() == [SIGNS[0]["answer"], SIGNS[0]["answer"], SIGNS[1]["answer"]]
    assert err == "this model takes one question at a time, so a question cannot refer to those before it\n"


def test_ctrl_c_stops_the_answer_and_not_the_chat(talk, image, monkeypatch):
    printed = AnswerPrinter.__call__

    def interrupting(self, text: str) -> None:
        first = not self._started
        printed(self, text)
        if first:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(AnswerPrinter, "__call__", interrupting)
        code, out, err = talk(["why", "why"], image)
    whole = talk(["why"], image)[1].strip()
    first = out.splitlines()[0]
    assert code == 0 and err == "stopped\nstopped\n" and len(out.splitlines()) == 2
    assert whole.startswith(first) and len(first) < len(whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere.png"], "there is no image nowhere.png"),
        (["-"], "standard input holds the questions"),
        ([""], "the name of the image is empty"),
        (["--system", "best"], "allowed: llava"),
        (["--max-new-tokens", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(flexattn, arguments, says, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert says in refused(flexattn("chat", *arguments))


def test_a_terminal_needs_prompt_toolkit(flexattn, image, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "prompt_toolkit is not installed; run: pip install 'flexattn_cuda[chat]'" in refused(flexattn("chat", image))


# ------------------------------------------------------------------------------------------------------ on a terminal


def completions(text: str) -> list[str]:
    """Return the lines that a text may be completed to."""
    pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    from flexattn_cuda.cli.chat_terminal import LineCompleter

    found = LineCompleter().get_completions(Document(text), CompleteEvent())
    return [text[: len(text) + one.start_position] + one.text for one in found]


def test_commands_systems_and_file_names_are_completed(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert completions("/") == ["/image", "/map", "/system", "/reset", "/help", "/quit"]
    assert completions("/re") == ["/reset"] and completions("/system flex") == [
        "/system flexattn",
        "/system flexattn-paper",
    ]
    assert completions("/image 1") == ["/image 1.png"] and completions("/map 2.") == ["/map 2.png"]
    assert completions("what") == completions("") == completions("/reset ") == []


class Terminal:
    """`flexattn` in a process of its own, on a terminal."""

    def __init__(self, *arguments: str):
        self._shown = ""  # and not waited for
        self._own, other = pty.openpty()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PROMPT_TOOLKIT_NO_CPR": "1",
            "TERM": "xterm",
        }
        command = [sys.executable, "-c", ON_A_TERMINAL, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._own)

    def type(self, text: str) -> None:
        os.write(self._own, text.encode())

    def until(self, text: str, seconds: float = 180) -> None:
        """Read until some text is shown."""
        end = time.monotonic() + seconds
        while text not in self._shown:
            ready, _, _ = select.select([self._own], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} is not shown, but {self._shown!r}"
            self._shown += os.read(self._own, 1024).decode(errors="replace")
        self._shown = self._shown.partition(text)[2]


@pytest.mark.slow
def test_on_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_ends_the_chat(checkpoint, image):
    pytest.importorskip("prompt_toolkit")
    with Terminal("chat", image, "--model", checkpoint, "--device", "cpu", "--max-new-tokens", 300) as terminal:
        terminal.until(READY)
        terminal.type("why\r")
        terminal.until("float")  # a word of its answer
        terminal.type("\x03")
        terminal.until("stopped")
        terminal.until(READY)
        terminal.type("half a question\x03")  # discards the line
        terminal.until(READY)
        terminal.type("/he")
        terminal.until("List the commands")  # what may come is shown while it is typed
        terminal.type("\t")
        terminal.until("lp")
        terminal.type("\r")
        terminal.until("End the chat")
        terminal.until(READY)
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
