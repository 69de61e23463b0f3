"""Accuracies and their paired differences, over several seeds.

A system's answers are given as `Marks`. All systems of a seed are asked the same questions, so differences are taken
question by question; two seeds ask different questions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from flexattn_cuda.analysis.intervals import wilson

Marks = Mapping[int, Mapping[int, bool]]
"""By seed and number of the question, whether the answer is right."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy over several seeds, in [0, 1].

    Attributes:
        accuracy: Mean over the seeds.
        deviation: Sample standard deviation over the seeds; NaN for one seed.
        wilson_low: Lower end of Wilson's 95 % interval over the questions of all seeds.
        wilson_high: Upper end.
        questions: Number of questions of all seeds.
        seeds: Number of seeds.
    """

    accuracy: float
    deviation: float
    wilson_low: float
    wilson_high: float
    questions: int
    seeds: int


@dataclass(frozen=True)
class Difference:
    """Difference of two systems' accuracies, over the questions that both answered, in [-1, 1].

    Attributes:
        difference: Mean over all paired questions.
        by_seed: Mean over those of each seed.
        error_questions: Standard error of the mean, from the spread of the paired questions.
        error_seeds: The same from the spread of the seeds' means; NaN for one seed.
        questions: Number of paired questions.
    """

    difference: float
    by_seed: Mapping[int, float]
    error_questions: float
    error_seeds: float
    questions: int

    @property
    def error(self) -> float:
        """The larger of the two standard errors: that of the seeds includes the variance between trainings."""
        return float(np.nanmax([self.error_questions, self.error_seeds]))

    @property
    def same_sign(self) -> bool:
        """Whether all seeds agree on which system is better."""
        return all(part > 0 for part in self.by_seed.values()) or all(part < 0 for part in self.by_seed.values())

    @property
    def over_two_standard_errors(self) -> bool:
        """Whether the difference is more than two standard errors from zero."""
        return abs(self.difference) > 2 * self.error

    @property
    def above(self) -> bool:
        """Whether the difference is positive in every seed and more than two standard errors from zero."""
        return self.difference > 0 and self.same_sign and self.over_two_standard_errors

    @property
    def level(self) -> bool:
        """Whether the difference is not below zero by more than two standard errors."""
        return self.difference >= 0 or not self.over_two_standard_errors


@dataclass(frozen=True)
class Verdict:
    """An expectation of FlexAttention against another system, and what was found.

    Attributes:
        other: The other system.
        objects: Size of the objects, or "all".
        task: The task, or "all".
        expected: "above" or "level".
        found: None without answers.
    """

    other: str
    objects: str
    task: str
    expected: str
    found: Difference | None

    @property
    def holds(self) -> bool | None:
        """Whether the expectation holds; None without answers."""
        if self.found is None:
            return None
        return self.found.above if self.expected == "above" else self.found.level


def accuracy(marks: Marks) -> Accuracy | None:
    """Return a system's accuracy; None without answers."""
    seeds = [list(by_number.values()) for by_number in marks.values() if by_number]
    if not seeds:
        return None
    shares, questions = [np.mean(seed) for seed in seeds], sum(map(len, seeds))
    low, high = wilson(sum(map(sum, seeds)), questions)
    return Accuracy(float(np.mean(shares)), _deviation(shares), low, high, questions, len(seeds))


def paired_difference(one: Marks, other: Marks) -> Difference | None:
    """Return one system's accuracy minus the other's; None if they share fewer than two questions."""
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
        difference=float(values.mean()),
        by_seed=means,
        error_questions=_deviation(values) / math.sqrt(len(values)),
        error_seeds=_deviation(list(means.values())) / math.sqrt(len(means)),
        questions=len(values),
    )


def _deviation(values: Sequence[float] | np.ndarray) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
