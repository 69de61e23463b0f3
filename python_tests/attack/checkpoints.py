"""Checkpoints damaged value by value and byte by byte: they answer, or say in one sentence why not."""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import attached_checkpoint
import tiny
import torch
from PIL import Image

from flexattn_cuda.tasks.ask import ask
from flexattn_cuda.tasks.load import load
from python_tests.attack.damage import damaged
from python_tests.attack.verdicts import SENTENCES, Verdict, WrongError
from python_tests.checkpoints import test_damaged

# Values that no field of a checkpoint should have.
VALUES = (
    *test_damaged.VALUES,
    10**6,
    10**30,
    -(10**9),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "\ud800",
    "../x",
    [None],
)
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = (
    "{{ 'x' * 999999 }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages | tojson }}",
)
ATTACHED = "internvl_qwen2"


class Checkpoints:
    """One damage a case, to a checkpoint of each format and one that FlexAttention is attached to."""

    def __init__(self, folder: Path):
        warnings.simplefilter("ignore")
        torch.set_num_threads(1)
        self._folder = folder
        for form, save in test_damaged.FORMATS.items():
            save(folder / form)
        attached_checkpoint.CHECKPOINTS[ATTACHED].save(folder / ATTACHED)
        for form in (*test_damaged.FORMATS, ATTACHED):
            _answer(folder / form, form)

    def run(self, number: int, rng: random.Random) -> Verdict:
        form = rng.choice((*test_damaged.FORMATS, ATTACHED))
        target = self._folder / "damaged"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self._folder / form, target)
        what = _damage(target, number, rng)
        try:
            _answer(target, form)
        except SENTENCES as error:
            if not test_damaged.is_a_sentence(str(error)):
                raise WrongError(f"{form}: {what}: {error}") from error
            raise
        except Exception as error:
            raise RuntimeError(f"{form}: {what}") from error
        return Verdict.RIGHT


def _answer(folder: Path, form: str) -> None:
    model, processor = load(folder, device="cpu", flexattn=tiny.settings() if form == "llava" else None)
    ask(model, processor, Image.linear_gradient("L").resize((60, 40)), "Which one?", max_new_tokens=2)


def _damage(folder: Path, number: int, rng: random.Random) -> str:
    """Damage a file of a checkpoint; return what was done."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    texts = [path for path in files if path.suffix == ".json"]
    match number % 8:
        case 0 | 1 | 2 | 3:
            return _replace_value(rng.choice(texts), rng)
        case 4 | 5:
            path = rng.choice(files)
            path.write_bytes(damaged(path.read_bytes(), rng))
            return f"{path.name} damaged"
        case 6:
            template = ENDLESS if number % 128 == 6 else rng.choice(TEMPLATES)  # that takes its time
            (folder / "chat_template.jinja").write_text(template)
            return template
        case _:
            return _replace_file(rng.choice(files), rng)


def _replace_value(path: Path, rng: random.Random) -> str:
    text = path.read_text()
    at = rng.choice(list(test_damaged.fields(json.loads(text))))
    value = rng.choice((test_damaged.DELETED, *VALUES))
    path.write_text(test_damaged.replaced(text, at, value))
    return f"{path.name} {at} = {value!r}"


def _replace_file(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file."""
    path.unlink()
    content: Any = rng.choice(
        ("fifo", "folder", "device", "missing", *test_damaged.TEXTS, b'{"a":' * 50_000, b"1" * 5000)
    )
    match content:
        case "fifo":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "missing":
            pass
        case _:
            path.write_bytes(content)
    return f"{path.name} is {content[:20]!r}"
