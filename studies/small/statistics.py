"""Shares of right answers and their paired differences, over several seeds.

What a system answered is given as `Marks`: seed -> number of the question -> right or not. All systems of a seed are asked
the same questions, so differences are taken question by question; the questions of two seeds are different ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

Marks = Mapping[int, Mapping[int, bool]]


@dataclass(frozen=True)
class Accuracy:
    """Shares in [0, 1].

    accuracy, deviation: Mean and standard deviation (of a sample) over the seeds; the deviation is nan for one seed.
    wilson_low, wilson_high: Wilson's 95 % interval over the questions of all seeds.
    """

    accuracy: float
    deviation: float
    wilson_low: float
    wilson_high: float
    questions: int
    seeds: int


@dataclass(frozen=True)
class Difference:
    """Of two systems' accuracies, over the questions that both answered.

    difference: Mean over all paired questions, in [-1, 1]; by_seed: seed -> its mean.
    error_questions: Standard error of the mean, from the spread of the paired questions.
    error_seeds: The same from the spread of the seeds' means; nan for one seed.
    """

    difference: float
    by_seed: Mapping[int, float]
    error_questions: float
    error_seeds: float
    questions: int

    @property
    def error(self) -> float:
        """The larger of the two standard errors: that of the seeds counts what training leaves to chance."""
        return float(np.nanmax([self.error_questions, self.error_seeds]))

    @property
    def same_sign(self) -> bool:
        return all(part > 0 for part in self.by_seed.values()) or all(part < 0 for part in self.by_seed.values())

    @property
    def over_two_standard_errors(self) -> bool:
        return abs(self.difference) > 2 * self.error

    @property
    def above(self) -> bool:
        """Greater than zero in all seeds, and by more than two standard errors."""
        return self.difference > 0 and self.same_sign and self.over_two_standard_errors

    @property
    def level(self) -> bool:
        """Not below zero by more than two standard errors."""
        return self.difference >= 0 or not self.over_two_standard_errors


@dataclass(frozen=True)
class Verdict:
    """An expectation and what was found; `found` is None without answers."""

    other: str
    objects: str
    task: str
    expected: str
    found: Difference | None

    @property
    def holds(self) -> bool | None:
        return self.found and getattr(self.found, self.expected)


def wilson(right: int, questions: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's interval of a share (E. B. Wilson, 1927), by default of 95 %."""
    share, extra = right / questions, z * z / questions
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(share * (1 - share) * extra + extra * extra / 4) / (1 + extra)
    return middle - half, middle + half


def accuracy(marks: Marks) -> Accuracy | None:
    """None without answers."""
    seeds = [list(by_number.values()) for by_number in marks.values() if by_number]
    if not seeds:
        return None
    shares, questions = [np.mean(seed) for seed in seeds], sum(map(len, seeds))
    return Accuracy(
        float(np.mean(shares)),
        _deviation(shares),
        *wilson(sum(map(sum, seeds)), questions),
        questions,
        len(seeds),
    )


def paired_difference(one: Marks, other: Marks) -> Difference | None:
    """One minus other; None where they have fewer than two questions in common."""
    pairs = {
        seed: np.array([int(one[seed][number]) - int(other[seed][number]) for number in common])
        for seed in sorted(one.keys() & other.keys())
        if (common := one[seed].keys() & other[seed].keys())
    }
    values = np.concatenate([*pairs.values(), []])
    if len(values) < 2:
        return None
    means = {seed: float(part.mean()) for seed, part in pairs.items()}
    return Difference(
        float(values.mean()), means, _deviation(values) / math.sqrt(len(values)),
        _deviation(list(means.values())) / math.sqrt(len(means)), len(values),
    )  # fmt: skip


def _deviation(values) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
