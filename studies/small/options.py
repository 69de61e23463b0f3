"""The study's options, for its command and for Python."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.options import Option, Options
from studies.small.presets import PRESETS, Preset


@dataclass(frozen=True, kw_only=True)
class StudyOptions(Options):
    """What a study runs on, compares and shows. Each field's help text is that of the command's option.

    Raises:
        InputError: If an option has a value that is not allowed.
    """

    photographs: Annotated[
        list[Path], Option("Folder of JPEG photographs, the backgrounds; may be repeated.", metavar="DIR")
    ]
    output: Annotated[Path, Option("Folder for models and results.", flags=("--output", "-o"), metavar="DIR")]
    preset: Annotated[
        str,
        Option(
            "small, or tiny, which runs in minutes and learns nothing; internvl for another model.",
            choices=tuple(PRESETS),
        ),
    ] = "small"
    seeds: Annotated[str, Option("Comma-separated seeds.")] = "0,1,2"
    systems: Annotated[str, Option("all, or comma-separated names, such as llava,flexattn.")] = "all"
    jobs: Annotated[int | None, Option("Number of single-threaded processes; one per core by default.", minimum=1)] = (
        None
    )
    examples: Annotated[
        str | None, Option("Comma-separated numbers, in answers.csv, of the questions that the report shows.")
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        systems = self.settings.systems
        if unknown := [name for name in self.system_names if name not in systems]:
            allowed = f"allowed with --preset {self.preset}: all, or some of {', '.join(systems)}"
            raise InputError(f"--systems has {unknown[0]!r}; {allowed}")
        _numbers("--seeds", self.seeds)
        for number in self.example_numbers or ():
            if not 0 <= number < self.settings.questions:
                raise InputError(
                    f"--examples has {number}; the preset {self.preset!r} has the questions 0 to "
                    f"{self.settings.questions - 1}"
                )

    @property
    def settings(self) -> Preset:
        """The preset."""
        return PRESETS[self.preset]

    @property
    def seed_numbers(self) -> list[int]:
        """The seeds, each once."""
        return list(dict.fromkeys(_numbers("--seeds", self.seeds)))

    @property
    def system_names(self) -> list[str]:
        """The systems, each once."""
        return list(self.settings.systems if self.systems == "all" else dict.fromkeys(self.systems.split(",")))

    @property
    def example_numbers(self) -> list[int] | None:
        """The questions to show; None for the first of each task about small objects."""
        return None if self.examples is None else _numbers("--examples", self.examples)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"{option} is {text!r}; give comma-separated numbers, such as 0,1,2") from None
