"""flexattn chat"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flexattn_cuda.cli.answers import AnswerPrinter, open_named
from flexattn_cuda.cli.runner import print_error, require, sentence_of, silence_transformers
from flexattn_cuda.errors import InputError
from flexattn_cuda.mechanism.config import PRESETS, SYSTEMS
from flexattn_cuda.tasks.options import ChatOptions

if TYPE_CHECKING:
    from PIL import Image

    from flexattn_cuda.tasks.ask import Answer
    from flexattn_cuda.tasks.conversation import Conversation


def chat(options: ChatOptions) -> None:
    """Ask one question after another about an IMAGE, with the model loaded once.

    A line is a question, or one of the commands that /help lists. Ctrl-C stops an answer, Ctrl-D ends the chat. Where
    standard input is no terminal, its lines are read and the answers printed.

    Examples:
        flexattn chat image.jpg
        flexattn chat image.jpg --model llava-hf/llava-1.5-7b-hf --quantize 4bit
        flexattn chat image.jpg < questions.txt > answers.txt
    """
    terminal = sys.stdin.isatty()
    if terminal:
        require("chat", "prompt_toolkit")
    image = None if options.image is None else open_named(options.image)  # before the model is loaded
    silence_transformers()
    talk = Chat(options, image)
    if terminal:
        from flexattn_cuda.cli.chat_terminal import typed_lines

        talk.run(typed_lines())
    else:
        talk.run(_piped_lines())


def _piped_lines() -> Iterator[str]:
    sys.stdin.reconfigure(errors="surrogateescape")  # a question in another encoding is refused, and the next one read
    yield from sys.stdin


class Chat:
    """A model, the image that it is asked about, and what was said.

    Answers are printed on stdout, everything else on stderr.
    """

    def __init__(self, options: ChatOptions, image: Image.Image | None):
        self._name, self._image = options.image, image
        self._conversation: Conversation | None = None
        self._answer: Answer | None = None
        self._told = False
        self._load(options)

    def run(self, lines: Iterable[str]) -> None:
        """Take one line after another; an error in one is a sentence, and the next line is taken."""
        for line in lines:
            try:
                self._take(line.strip())
            except EOFError:
                return
            except KeyboardInterrupt:
                print(flush=True)
            except Exception as error:
                sentence = sentence_of(error)
                if sentence is None:
                    raise
                print_error(sentence)

    def _take(self, line: str) -> None:
        name, _, argument = line.partition(" ")
        if not line.startswith("/"):
            if line:
                self._ask(line)
        elif name not in COMMANDS:
            raise InputError(f"there is no command {name}; /help lists them")
        elif argument and not COMMANDS[name].argument:
            raise InputError(f"{name} takes nothing after it; leave {argument.strip()} out")
        else:
            COMMANDS[name].run(self, argument.strip())

    def _ask(self, question: str) -> None:
        if self._conversation is None:
            raise InputError("there is no image to ask about; name one: /image PATH")
        with _stopped_by_ctrl_c() as stop:
            self._answer = self._conversation.ask(question, self._options.max_new_tokens, AnswerPrinter(), stop)
            print(flush=True)
            if stop():
                _tell("stopped")

    def _load(self, options: ChatOptions) -> None:
        """Load the model as options say, and begin a conversation with it."""
        from flexattn_cuda.tasks import load as loading

        self._loaded = loading.load_chosen(options)
        self._options = options
        if self._image is not None:
            self._look_at(self._image)

    def _look_at(self, image: Image.Image) -> None:
        """Begin a conversation about an image."""
        from flexattn_cuda.tasks.conversation import Conversation

        self._conversation, self._image = Conversation(*self._loaded, image), image
        if not self._conversation.remembers and not self._told:
            self._told = True
            _tell("this model takes one question at a time, so a question cannot refer to those before it")

    # ------------------------------------------------------------------------------------------------------- commands

    def image(self, name: str) -> None:
        """Begin a conversation about another image."""
        if not name:
            raise InputError("/image needs the path or URL of an image")
        name = os.path.expanduser(name)
        self._look_at(open_named(name))
        self._name = name

    def map(self, name: str) -> None:
        """Draw what the last answer looked at."""
        if self._answer is None:
            raise InputError("there is no answer to draw yet; ask a question first")
        if self._answer.trace is None:
            raise InputError("this model has no FlexAttention, so there is no map to draw")
        path = Path(name).expanduser() if name else _free_name()
        if path.resolve() == Path(self._name or "").resolve():
            raise InputError(f"{path} is the image, which would be overwritten; choose another name")
        self._answer.draw(path)
        _tell(f"wrote {path}")

    def system(self, name: str) -> None:
        """Load the model as another system, or with a preset."""
        changed, before = self._options.as_system(name), self._options
        self._loaded = self._conversation = None  # two models may not fit into the memory
        try:
            self._load(changed)
        except BaseException:
            self._load(before)
            _tell("the model is loaded as before; what was said is forgotten")
            raise
        _tell(f"loaded as {name}")

    def reset(self, _: str) -> None:
        """Forget what was said about the image."""
        if self._conversation is not None:
            self._conversation.reset()

    def help(self, _: str) -> None:
        """List the commands."""
        for name, command in COMMANDS.items():
            _tell(f"{f'{name} {command.argument}':<15}  {command.help}")

    def quit(self, _: str) -> None:
        """End the chat."""
        raise EOFError


@dataclass(frozen=True)
class Command:
    """A line that is no question.

    Attributes:
        argument: What follows the name, for the help.
        help: One sentence.
        run: Takes the chat and what follows the name.
    """

    argument: str
    help: str
    run: Callable[[Chat, str], None]


COMMANDS = {
    "/image": Command("PATH", "Ask about another image; the conversation begins again.", Chat.image),
    "/map": Command("[FILE]", "Draw what the last answer looked at; by default to map-1.png and so on.", Chat.map),
    "/system": Command("NAME", f"Load the model as {', '.join((*SYSTEMS, *PRESETS))}; begin again.", Chat.system),
    "/reset": Command("", "Forget what was said about the image.", Chat.reset),
    "/help": Command("", "List the commands.", Chat.help),
    "/quit": Command("", "End the chat; Ctrl-D does, too.", Chat.quit),
}


@contextlib.contextmanager
def _stopped_by_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C was pressed; pressed again, it interrupts what runs."""
    pressed = threading.Event()

    def press(*_: object) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _free_name() -> Path:
    """Return the first of map-1.png, map-2.png, ... that is no file yet."""
    return next(path for number in itertools.count(1) if not (path := Path(f"map-{number}.png")).exists())


def _tell(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)
