"""Flipped bits and cut tails in what runs are resumed from: journals of `ask-batch` and checkpoints of `train`."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks.ask_batch.journal import read_journal
from flexattn_cuda.tasks.train.checkpoints import keep_last_complete_checkpoint, mark_complete
from python_tests.attack.damage import damaged, flipped
from python_tests.attack.verdicts import LostError, Verdict, WrongError, is_a_sentence
from python_tests.tasks.test_journal import ANSWERS, RUN, written

FLIPS, CHECKPOINTS = 100, 40  # of a case


class Journals:
    """Damaged journals: every answer that is read is one that was written."""

    def __init__(self, folder: Path):
        self._path = folder / "journal"
        self._content = written(self._path)

    def run(self, number: int, rng: random.Random) -> Counter[Verdict]:
        return Counter(self._read(rng) for _ in range(FLIPS))

    def _read(self, rng: random.Random) -> Verdict:
        is_flip = rng.random() < 0.8
        bit = rng.randrange(8 * len(self._content))
        self._path.write_bytes(flipped(self._content, bit) if is_flip else damaged(self._content, rng))
        try:
            found = read_journal(self._path, RUN)
        except InputError as error:
            if is_flip or not is_a_sentence(str(error)):
                raise LostError(f"bit {bit}: {error}") from error
            return Verdict.REFUSED
        if any(ANSWERS.get(line) != answer for line, answer in found.answers.items()):
            raise WrongError(f"bit {bit}: {found.answers}")
        lost = len(ANSWERS) - len(found.answers)
        if is_flip and lost > 2:  # two, where the line break between them was hit
            raise LostError(f"bit {bit} costs {lost} answers")
        if is_flip and lost and not found.damaged and bit // 8 != len(self._content) - 1:
            raise WrongError(f"bit {bit} costs {lost} answers, and nobody says so")
        return Verdict.RIGHT


class TrainingCheckpoints:
    """Damaged checkpoints: the one before is taken."""

    def __init__(self, folder: Path):
        self._folder = folder
        rng = random.Random(0)
        for step in (2, 4):
            for name in ("model.safetensors", "optimizer.pt", "trainer_state.json", "global_step4/states.pt"):
                path = folder / "whole" / f"checkpoint-{step}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(rng.randbytes(3000))
            mark_complete(folder / "whole" / f"checkpoint-{step}")

    def run(self, number: int, rng: random.Random) -> Counter[Verdict]:
        return Counter(self._resume(rng) for _ in range(CHECKPOINTS))

    def _resume(self, rng: random.Random) -> Verdict:
        target = self._folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(self._folder / "whole", target)
        last, before = target / "checkpoint-4", target / "checkpoint-2"
        path = rng.choice([path for path in last.rglob("*") if path.is_file()])
        content = path.read_bytes()
        changed = flipped(content, rng.randrange(8 * len(content))) if rng.random() < 0.8 else damaged(content, rng)
        path.write_bytes(changed)
        found = keep_last_complete_checkpoint(target)
        if changed == content:
            return Verdict.RIGHT
        if found.checkpoint == last:
            raise WrongError(f"{path.name} is damaged, and resumed from")
        if found.checkpoint != before:
            raise LostError(f"{path.name} is damaged, and {before.name} is not resumed from")
        if found.damaged != [last]:
            raise WrongError("nobody says that a checkpoint is damaged")
        return Verdict.RIGHT
