"""MagnifierBench: questions about small details, with four options, answered by a letter.

A row of `Otter-AI/MagnifierBench` has `images`, an `instruction` that ends in its options, and a letter as `answer`:

    {"id": "...", "images": [...], "instruction": "What is on the sign? A. 7, B. 8, C. 12, D. 42", "answer": "C"}
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from flexattn_cuda.errors import InputError

BY_LETTER = "Answer with the option's letter from the given choices directly."
_INSTRUCTION = re.compile(r"(.+?)\s+(A\. .+?),?\s+(B\. .+?),?\s+(C\. .+?),?\s+(D\. .+)", re.DOTALL)
_LETTER = re.compile(r"\b[A-D]\b")


def images(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Return the images of a question."""
    return list(doc["images"])


def prompt(doc: Mapping[str, Any]) -> str:
    """Return what is asked: the question, each option on a line of its own, and the request for a letter.

    Raises:
        InputError: If the instruction does not end in four options.
    """
    found = _INSTRUCTION.fullmatch(doc["instruction"].strip())
    if found is None:
        raise InputError(
            f"the instruction of question {doc.get('id')} is {doc['instruction']!r}; it must end in options "
            "'A. ..., B. ..., C. ..., D. ...'"
        )
    return "\n".join([*found.groups(), BY_LETTER])


def accuracy(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the first letter that stands alone in the answer is the right one."""
    found = _LETTER.search(results[0])
    return {"magnifier_acc": float(found is not None and found.group() == doc["answer"].strip().upper())}
