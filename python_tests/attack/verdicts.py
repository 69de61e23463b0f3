"""What has become of an attack's case."""

from __future__ import annotations

import enum
import traceback
from collections import Counter
from collections.abc import Callable

from flexattn_cuda.errors import CheckpointError, InputError, PoolOverflow

SENTENCES = (CheckpointError, InputError, PoolOverflow)  # what the package raises on purpose
MAX_SENTENCE = 1500  # characters


class Verdict(str, enum.Enum):
    """The first two are good, the others must not happen."""

    RIGHT = "right"
    REFUSED = "refused in one sentence"
    TRACEBACK = "traceback"
    CRASH = "crash"
    HANG = "hang"
    WRONG = "silently wrong"
    LOST = "lost"


BAD = (Verdict.TRACEBACK, Verdict.CRASH, Verdict.HANG, Verdict.WRONG, Verdict.LOST)


class WrongError(AssertionError):
    """Something was answered, selected or written that is not right, and nobody said so."""


class LostError(AssertionError):
    """Something was lost that had been finished."""


def is_a_sentence(text: str) -> bool:
    """Return whether a message is one that a user can read."""
    return bool(text.strip()) and "\n" not in text and len(text) < MAX_SENTENCE


def judge(case: Callable[[], Counter[Verdict] | Verdict]) -> tuple[Counter[Verdict], str]:
    """Run a case; return its verdicts, of one or of several calls, and what was said."""
    try:
        found = case()
        return (found if isinstance(found, Counter) else Counter([found])), ""
    except LostError as error:
        return Counter([Verdict.LOST]), str(error)
    except AssertionError as error:
        return Counter([Verdict.WRONG]), f"{error}\n{traceback.format_exc(limit=-4)}"
    except SENTENCES as error:
        if is_a_sentence(str(error)):
            return Counter([Verdict.REFUSED]), str(error)
        return Counter([Verdict.TRACEBACK]), f"not a sentence: {error!r}"
    except Exception:
        return Counter([Verdict.TRACEBACK]), traceback.format_exc(limit=-6)
