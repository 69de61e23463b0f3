"""The rows of a batch while the model generates: each is streamed, and ends, by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria

from flexattn_cuda.mechanism.trace import Trace
from flexattn_cuda.serve import traces
from flexattn_cuda.serve.errors import RequestError, timed_out
from flexattn_cuda.serve.jobs import Done, Event, Failed, Job, Piece
from flexattn_cuda.tasks.ask import TextPieces


class VisibleText:
    """The part of a growing text that can be shown: without white space around it, up to a stop text.

    Args:
        stops: Texts that end it. What might be the beginning of one is held back.
    """

    def __init__(self, stops: Sequence[str] = ()):
        self._stops = [stop for stop in stops if stop]
        self._text, self._shown = "", ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """Return what a piece adds to the part that can be shown."""
        if self.stopped:
            return ""
        self._text += piece
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        self.stopped = bool(found)
        return self._show(self._text[: min(found)] if found else self._text[: len(self._text) - self._held_back()])

    def end(self) -> str:
        """Return what was held back, since nothing follows."""
        return "" if self.stopped else self._show(self._text)

    def _show(self, text: str) -> str:
        visible = text.strip()
        added = visible[len(self._shown) :]
        self._shown += added
        return added

    def _held_back(self) -> int:
        """Return the length of the longest end of the text that a stop text begins with."""
        lengths = range(max((len(stop) - 1 for stop in self._stops), default=0), 0, -1)
        return next((n for n in lengths if any(stop.startswith(self._text[-n:]) for stop in self._stops)), 0)


class Row:
    """One job while it is answered.

    Args:
        job: The job.
        number: Of the row in the batch.
        tokenizer: Decodes the answer.
        ends: Token ids that end it.
    """

    def __init__(self, job: Job, number: int, tokenizer: Any, ends: Sequence[int]):
        self._job, self._number, self._ends = job, number, ends
        self._pieces, self._visible = TextPieces(tokenizer), VisibleText(job.wanted.stop)
        self.finished = False

    def take(self, token: int, step: traces.Step) -> None:
        """Take the next token, unless the answer is finished; `step` is what the call that predicted it looked at."""
        if self.finished:
            return
        if self._job.cancelled:
            self.finished = True
        elif self._job.late:
            self.fail(timed_out(self._job.timeout))
        elif token in self._ends:
            self._emit(self._visible.add(self._rest()) + self._visible.end(), "", step, end=True)
            self._finish("stop")
        else:
            text = self._visible.add(self._pieces.add(token))
            cut = len(self._pieces.pieces) >= self._job.wanted.max_tokens
            if cut and not self._visible.stopped:
                text += self._visible.add(self._pieces.end()) + self._visible.end()
            self._emit(text, self._pieces.pieces[-1], step)
            if self._visible.stopped or cut:
                self._finish("stop" if self._visible.stopped else "length")

    def fail(self, error: RequestError) -> None:
        """End the answer with an error, unless it is finished."""
        if not self.finished:
            self.finished = True
            self._job.emit(Failed(error))

    def _rest(self) -> str:
        return self._pieces.end() if self._pieces.pieces else ""

    def _emit(self, text: str, piece: str, step: traces.Step, end: bool = False) -> None:
        token = None
        if self._job.wanted.trace:
            token = traces.token_view(step, self._number, self._job.prompt.images, piece, end)
        if text or token is not None:
            self._job.emit(Piece(text, token))

    def _finish(self, reason: str) -> None:
        self.finished = True
        event: Event = Done(reason, len(self._pieces.pieces))
        self._job.emit(event)


class Rows(StoppingCriteria):
    """Follows a batch through `generate`, which asks after every step which rows are finished.

    A streamer would hear of each token too, but in some versions of transformers only when the next is on its way.

    Args:
        rows: In the order of the batch.
        trace: What `generate` records, if it does; a step is forgotten as soon as it was passed on.
        on_tokens: Called with the number of tokens of each step.
    """

    def __init__(self, rows: Sequence[Row], trace: Trace | None, on_tokens: Callable[[int], None]):
        self._rows, self._trace, self._on_tokens = rows, trace, on_tokens

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Pass the last token of each row on, and return which rows are finished, [B] bool."""
        step = {} if self._trace is None else self._trace.steps.pop()
        self._on_tokens(sum(not row.finished for row in self._rows))
        for row, token in zip(self._rows, input_ids[:, -1].tolist()):
            row.take(token, step)
        return torch.tensor([row.finished for row in self._rows], device=input_ids.device)
