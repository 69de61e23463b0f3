"""Lines that are typed on a terminal, with history and completion; prompt_toolkit is imported here alone."""

from __future__ import annotations

from collections.abc import Iterator

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from flexattn_cuda.cli.chat import COMMANDS
from flexattn_cuda.mechanism.config import PRESETS, SYSTEMS


def typed_lines() -> Iterator[str]:
    """Yield the lines that are typed, until Ctrl-D; Ctrl-C discards the line."""
    session: PromptSession[str] = PromptSession(completer=LineCompleter())
    while True:
        try:
            line = session.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        yield line


class LineCompleter(Completer):
    """Completes commands, and what follows them: names of files and of systems."""

    _paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Yield what the text before the cursor may become."""
        name, space, argument = document.text_before_cursor.partition(" ")
        if not space:
            for one, command in COMMANDS.items():
                if name and one.startswith(name):
                    yield Completion(one, -len(name), display_meta=command.help)
        elif name in ("/image", "/map"):
            yield from self._paths.get_completions(Document(argument), complete_event)
        elif name == "/system":
            yield from (Completion(one, -len(argument)) for one in (*SYSTEMS, *PRESETS) if one.startswith(argument))
