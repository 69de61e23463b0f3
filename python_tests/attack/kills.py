"""Runs that are killed, or whose disk is full or locked, at any call that changes a file; and two runs at once.

Each case ends a run so, resumes it, and asks for what an uninterrupted run gives: nothing that had been finished may be
done again, nothing may be missing, and what a user is told is one sentence.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import question_files
import tiny_checkpoint
import torch
import training_data
from train_runs import furthest, weights

from flexattn_cuda.tasks import ask as answering
from flexattn_cuda.tasks import load as loading
from flexattn_cuda.tasks.ask_batch import answer_file, journal
from flexattn_cuda.tasks.ask_batch.lines import Results
from flexattn_cuda.tasks.train import run as training
from flexattn_cuda.tasks.train import trainer
from python_tests.attack.syscalls import Child, Ended, Strike, arm, calls_seen
from python_tests.attack.verdicts import LostError, Verdict, WrongError, is_a_sentence

Tell = Callable[[Any], None]
STRIKES = tuple(Strike)


class _Runs:
    """What both kinds of runs have in common: `_run` is one run in a folder, `_check` looks at what it has left."""

    def __init__(self, folder: Path):
        torch.set_num_threads(1)
        self._folder = folder
        self._model = tiny_checkpoint.save(folder / "model")
        self._prepare()
        (folder / "whole").mkdir()
        ended = Child(self._run_whole).end()
        assert not ended.error, ended.error
        self._calls = ended.told[-1]

    def _run_whole(self, tell: Tell) -> None:
        arm(1 << 40, Strike.KILL)  # never, but its calls are counted
        self._run(self._folder / "whole", tell)
        tell(calls_seen())

    def run(self, number: int, rng: random.Random) -> Verdict:
        target = self._folder / "target"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        if number % 8 == 7:
            return self._two_at_once(target, rng)
        first = self._struck(target, number, rng)
        if first.error and (not first.is_ours or not is_a_sentence(first.error)):
            raise RuntimeError(f"{self._shown(number)}: {first.error}")
        second = Child(lambda tell: self._run(target, tell)).end()
        self._check(target, first, second)
        return Verdict.REFUSED if first.error else Verdict.RIGHT

    def _struck(self, target: Path, number: int, rng: random.Random) -> Ended:
        """Strike at every call in turn, or kill at any time."""
        if number % 8 == 6:
            child = Child(lambda tell: self._run(target, tell))
            time.sleep(rng.uniform(0.0, self.seconds))
            child.kill()
            return child.end()
        strike = STRIKES[(number % 8) % len(STRIKES)]
        at = 1 + (number // 8 * 7 + number) % self._calls
        return Child(lambda tell: (arm(at, strike), self._run(target, tell))).end()

    def _shown(self, number: int) -> str:
        return f"{STRIKES[(number % 8) % len(STRIKES)].name} at call {1 + (number // 8 * 7 + number) % self._calls}"

    def _two_at_once(self, target: Path, rng: random.Random) -> Verdict:
        runs = [Child(lambda tell: self._run(target, tell)), None]
        time.sleep(rng.uniform(0.0, self.seconds / 2))
        runs[1] = Child(lambda tell: self._run(target, tell))
        ended = [run.end() for run in runs if run is not None]
        for one in ended:
            if one.error and (not one.is_ours or not is_a_sentence(one.error)):
                raise RuntimeError(f"two at once: {one.error}")
        if all(one.error for one in ended):
            raise LostError(f"both of two runs were refused: {[one.error for one in ended]}")
        self._check(target, Ended(False, "", True, []), Child(lambda tell: self._run(target, tell)).end())
        return Verdict.RIGHT


class KilledAnswers(_Runs):
    """Runs of `ask-batch`."""

    seconds = 0.5

    def _prepare(self) -> None:
        self._questions = self._folder / "questions"
        self._questions.mkdir()
        for number in range(3):
            question_files.image(96, 64, seed=number).save(self._questions / f"{number}.png")
        question_files.write(self._questions / "q.jsonl", question_files.some(5))
        self._loaded = loading.load(self._model, "cpu")

    def _run(self, target: Path, tell: Tell) -> None:
        generate, append = answering.generate_answers, journal.Journal.append_results

        def asked(model: Any, processor: Any, images: Any, questions: list[str], *rest: Any) -> Any:
            tell({"asked": questions})
            return generate(model, processor, images, questions, *rest)

        def appended(self: Any, results: Results) -> None:
            append(self, results)
            tell({"kept": sum(result.answer is not None for result in results.values())})

        answering.generate_answers, journal.Journal.append_results = asked, appended
        loading.load = lambda *_, **__: self._loaded
        options = dict(device="cpu", max_new_tokens=2, batch_size=1)
        answer_file(self._questions / "q.jsonl", target / "a.jsonl", self._model, **options)

    def _check(self, target: Path, first: Ended, second: Ended) -> None:
        if second.error and not ("already exists" in second.error and (target / "a.jsonl").exists()):
            raise RuntimeError(f"the second run: {second.error}")
        if question_files.read(target / "a.jsonl") != question_files.read(self._folder / "whole" / "a.jsonl"):
            raise WrongError("the answers are not those of a run that nothing interrupted")
        kept = sum(one.get("kept", 0) for one in first.told)
        again = sum(len(one.get("asked", ())) for one in second.told)
        if again > 5 - kept:
            raise LostError(f"{kept} answers were kept, but {again} of 5 questions were asked again")


class KilledTraining(_Runs):
    """Runs of `train`."""

    seconds = 4.0

    def _prepare(self) -> None:
        (self._folder / "data").mkdir()
        self._files = training_data.write(self._folder / "data")

    def _run(self, target: Path, tell: Tell) -> None:
        complete, resume = trainer.mark_complete, training.TrainingRun.resume

        def marked(folder: Path) -> None:
            complete(folder)
            tell({"complete": int(folder.name.rpartition("-")[2])})

        def resumed(self: Any, checked: Any) -> Path | None:
            found = resume(self, checked)
            tell({"resumed": 0 if found is None else int(found.name.rpartition("-")[2])})
            return found

        trainer.mark_complete, training.TrainingRun.resume = marked, resumed
        options = dict(steps=3, save_every=1, batch_size=2, learning_rate=1e-2, device="cpu")
        training_data.train_on(self._files, target, self._model, **options)

    def _check(self, target: Path, first: Ended, second: Ended) -> None:
        if second.error:
            raise RuntimeError(f"the second run: {second.error}")
        complete = max((one.get("complete", 0) for one in first.told), default=0)
        resumed = max(one.get("resumed", 0) for one in second.told)
        if resumed < complete:
            raise LostError(f"the checkpoint of step {complete} was complete, but step {resumed} was resumed from")
        if furthest(weights(target), weights(self._folder / "whole")) != 0:
            raise WrongError("the weights are not those of a run that nothing interrupted")
