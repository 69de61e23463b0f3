"""Options are declared once, and what they do not allow is refused in one sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from flexattn_cuda.cli.options import as_command
from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.fingerprint import Fingerprint
from flexattn_cuda.runs.options import STREAM, Option, Options, declared_options
from flexattn_cuda.tasks.options import AskOptions, BatchOptions, FlopsOptions, TrainOptions


@dataclass(frozen=True, kw_only=True)
class GreetOptions(Options):
    name: Annotated[str, Option("Who to greet.", positional=True)]
    times: Annotated[int, Option("Number of greetings.", minimum=1, below=10, fixed=True)] = 1
    volume: Annotated[float, Option("Volume.", above=0)] = 1.0
    manner: Annotated[str, Option("Manner.", choices=("kind", "rude"), fixed=True)] = "kind"
    card: Annotated[Path | None, Option("Card to read from.", flags=("--card", "-c"))] = None
    guests: Annotated[Path | None, Option("List to write.", stream=True)] = None
    twice: Annotated[bool, Option("Greet twice.")] = False


@pytest.mark.parametrize(
    "wrong, says",
    [
        (dict(name=5), "name is 5; it must be text"),
        (dict(name=None), "name is None; it must be text"),
        (dict(times=0), "times is 0; it must be at least 1"),
        (dict(times=10), "times is 10; it must be less than 10"),
        (dict(times=2.5), "times is 2.5; it must be a whole number"),
        (dict(times=True), "times is True; it must be a whole number"),
        (dict(times=None), "times is None; it must be a whole number"),
        (dict(volume=0), "volume is 0; it must be more than 0"),
        (dict(volume=float("nan")), "volume is nan; it must be a finite number"),
        (dict(volume="loud"), "volume is 'loud'; it must be a finite number"),
        (dict(manner="odd"), "manner is 'odd'; allowed: kind, rude"),
        (dict(card=5), "card is 5; it must be a path"),
        (dict(card=""), "card is empty; it must be a path"),
        (dict(card="-"), "card is '-', but standard input and output cannot be used; name a path"),
        (dict(twice="no"), "twice is 'no'; it must be True or False"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(wrong, says):
    with pytest.raises(InputError, match=f"^{re.escape(says)}$"):
        GreetOptions(**{"name": "Ada"} | wrong)


def test_a_stream_is_what_is_declared_as_one_and_a_file_may_have_its_name():
    assert GreetOptions(name="Ada", guests="-").guests == STREAM
    assert GreetOptions(name="Ada", guests="./-").guests == Path("-").absolute() != STREAM


def test_values_keep_their_types_and_paths_may_be_text():
    options = GreetOptions(name=Path("Ada"), card="card.txt", volume=2)
    assert (options.name, options.card, options.volume) == ("Ada", Path("card.txt"), 2)


def test_a_command_line_makes_the_same_object_as_python():
    made = []

    def greet(options: GreetOptions) -> None:
        """Greet."""
        made.append(options)

    app = typer.Typer()
    app.command()(as_command(greet))
    line = ["Ada", "--times", "3", "--volume", "0.5", "--manner", "rude", "-c", "card.txt", "--twice"]
    for arguments in (["Ada"], line):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    everything = GreetOptions(name="Ada", times=3, volume=0.5, manner="rude", card=Path("card.txt"), twice=True)
    assert made == [GreetOptions(name="Ada"), everything]


def test_an_empty_path_is_not_the_current_folder():
    app = typer.Typer()
    app.command()(as_command(_print_card))
    result = CliRunner().invoke(app, ["Ada", "--card", ""])
    assert isinstance(result.exception, InputError) and "card is empty" in str(result.exception)


def _print_card(options: GreetOptions) -> None:
    """Print the card."""
    print(options.card)


def test_the_paragraphs_of_a_docstring_are_wrapped_by_the_terminal_alone():
    def greet(options: GreetOptions) -> None:
        """Greet.

        A second paragraph
        of two lines.
        """

    assert as_command(greet).__doc__ == "Greet.\n\nA second paragraph of two lines."


def test_a_field_without_an_option_is_a_mistake():
    @dataclass(frozen=True, kw_only=True)
    class Forgotten(Options):
        name: str = "Ada"

    with pytest.raises(TypeError, match="Forgotten.name is not annotated with an Option"):
        Forgotten()


# ----------------------------------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_holds_the_fixed_options_and_more_facts():
    fingerprint = GreetOptions(name="Ada", times=2).fingerprint().with_facts(set_of_guests=[1])
    assert fingerprint.facts == {"times": 2, "manner": "kind", "set of guests": [1]}


def test_a_run_of_another_fingerprint_is_refused_and_its_differences_are_named(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(GreetOptions(name="Ada").fingerprint().to_json())
    GreetOptions(name="Bob", volume=2.0).fingerprint().require_same(Fingerprint.read(path), "the party")
    with pytest.raises(InputError, match=r"^the party was started with other options \(times, manner\); .*--restart$"):
        GreetOptions(name="Ada", times=2, manner="rude").fingerprint().require_same(Fingerprint.read(path), "the party")


def test_what_a_resumed_run_must_repeat():
    def fixed(options: type) -> set[str]:
        return {declared.name for declared in declared_options(options) if declared.option.fixed}

    free = {"output", "gradient_checkpointing", "broken", "check_only", "save_every", "keep", "log_every", "workers"}
    free |= {"device", "tensorboard", "restart", "data"}  # the data by what it holds, not by its path
    assert {declared.name for declared in declared_options(TrainOptions)} - fixed(TrainOptions) == free
    assert fixed(BatchOptions) == {"model", "adapter", "quantize", "dtype", "max_new_tokens"}


# ------------------------------------------------------------------------------------------------- particular tasks


@pytest.mark.parametrize(
    "tokens, layers, chosen",
    [
        (None, None, ([0], None)),
        ("first", "first", ([0], None)),
        ("all", "all", ("all", "all")),
        ("0,2", "1", ([0, 2], [1])),
    ],
)
def test_tokens_and_layers_to_draw(tokens, layers, chosen):
    options = AskOptions(images=["a.png"], question="?", map="b.png", map_tokens=tokens, map_layers=layers)
    assert (options.tokens_to_draw, options.layers_to_draw) == chosen


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: AskOptions(images=["a.png"], question="?", map="./a.png"), "would overwrite the image"),
        (lambda: AskOptions(images=["a.png"], question="?", map_tokens="first"), "--map-tokens needs --map"),
        (lambda: AskOptions(images=["a.png"], question="?", map_layers="all"), "--map-layers needs --map"),
        (lambda: FlopsOptions(model="m", shape="7b"), "exclude each other"),
        (
            lambda: TrainOptions(data="d", images="i", output="o", epochs=1.0, steps=3),
            "--epochs and --steps exclude each other",
        ),
        (
            lambda: TrainOptions(data="d", images="i", output="o", save_every=5, log_every=2),
            "a checkpoint must fall on an entry of the loss",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(make, says):
    with pytest.raises(InputError, match=says):
        make()
