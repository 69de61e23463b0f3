"""`flexattn` itself: version, usage, options, and how little it imports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable

import documents
import pytest

import flexattn_cuda
from flexattn_cuda.cli.app import COMMANDS as FUNCTIONS
from flexattn_cuda.cli.options import examples_of
from flexattn_cuda.mechanism.config import SYSTEMS
from flexattn_cuda.runs.options import declared_options
from flexattn_cuda.tasks import options as task_options

HEAVY = {"torch", "transformers", "matplotlib"}
PROGRAM = """
import json, sys
from flexattn_cuda.cli import main
try:
    main()
except SystemExit as ended:
    print()
    print(json.dumps([ended.code or 0, sorted(sys.modules)]))
"""


def code_and_modules(*arguments: str) -> tuple[int, set[str]]:
    """Run `flexattn` in a process of its own; return the exit code and the modules that it imported."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    code, modules = json.loads(ended.stdout.splitlines()[-1])
    return code, set(modules)


def test_the_version_is_printed(flexattn):
    assert flexattn("--version") == (0, f"flexattn {flexattn_cuda.__version__}\n", "")


def test_wrong_usage_ends_with_exit_code_2():
    wrong = subprocess.run([sys.executable, "-m", "flexattn_cuda.cli", "ask"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert "Missing argument 'IMAGE'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


# --------------------------------------------------------------------------------------------------------- imports


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["--version"], 0),
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "-h"], 0),
        (["ask"], 2),
        (["ask", "nowhere.png", "What is it?"], 2),
        (["ask", "nowhere.png", " "], 2),
        (["chat", "nowhere.png"], 2),
        (["ask-batch", "nowhere.jsonl", "-o", "answers.jsonl"], 2),
        (["train", "--data", "nowhere.json", "--images", "b", "--output", "c"], 2),
        (["ask", "nowhere.png", "What is it?", "--map", "map.txt"], 2),
        (["train", "--data", "a", "--images", "b", "--output", "c", "--batch-size", "0"], 2),
        (["demo", "--examples", "nowhere"], 2),
    ],
)
def test_what_needs_no_model_imports_neither_torch_nor_transformers(arguments, code):
    ended, modules = code_and_modules(*arguments)
    assert ended == code and not modules & HEAVY


@pytest.mark.slow
def test_what_needs_a_model_imports_them():
    ended, modules = code_and_modules("info")
    assert ended == 0 and {"torch", "transformers"} <= modules  # so the test above can fail


@pytest.mark.slow
def test_the_operators_import_neither_transformers_nor_the_command_line():
    program = "import json, sys, flexattn_cuda.ops; print(json.dumps(sorted(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    modules = set(json.loads(ended.stdout))
    assert "torch" in modules and not modules & {"transformers", "typer", "flexattn_cuda.cli", "flexattn_cuda.tasks"}


# ------------------------------------------------------------------------------------------------------ completion


def completed(line: str, monkeypatch) -> tuple[list[str], set[str]]:
    """Return what bash would propose for the last word of a line, and the modules that it imported for it."""
    monkeypatch.setenv("_FLEXATTN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    ended = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    *proposed, told = ended.stdout.splitlines()
    code, modules = json.loads(told)
    assert code == 0, ended.stderr
    return [one for one in proposed if one], set(modules)


@pytest.mark.parametrize(
    "line, proposed",
    [
        ("flexattn ", [function.__name__.replace("_", "-") for function in FUNCTIONS]),
        ("flexattn as", ["ask", "ask-batch"]),
        ("flexattn ask --ma", ["--max-new-tokens", "--map", "--map-tokens", "--map-layers"]),
        ("flexattn ask image.jpg --system ", [*SYSTEMS, "crop"]),
        ("flexattn chat --system fl", ["flexattn", "flexattn-paper"]),
        ("flexattn ask --preset ", ["paper", "released"]),
        ("flexattn ask imag", []),  # the shell completes names of files
    ],
)
def test_a_shell_completes_commands_options_and_values_without_torch(line, proposed, monkeypatch):
    found, modules = completed(line, monkeypatch)
    assert sorted(found) == sorted(proposed) and not modules & HEAVY


# ------------------------------------------------------------------------------------------------------------ help


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_the_help_of_a_command_ends_with_examples_that_it_takes(function: Callable, flexattn, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = function.__name__.replace("_", "-")
    short, long = flexattn(command, "-h"), flexattn(command, "--help")
    examples = examples_of(function)
    assert short == long and long[0] == 0 and 2 <= len(examples) <= 3
    assert [line.strip() for line in long[1].partition("Examples:")[2].splitlines() if line.strip()] == examples
    for example in examples:
        assert command in example
        documents.check_shell(example.partition(" <")[0].partition(" >")[0], flexattn)


# --------------------------------------------------------------------------------------------------------- options

COMMANDS = {
    "ask": task_options.AskOptions,
    "chat": task_options.ChatOptions,
    "ask-batch": task_options.BatchOptions,
    "train": task_options.TrainOptions,
    "eval": task_options.EvalOptions,
    "demo": task_options.DemoOptions,
    "info": task_options.InfoOptions,
    "flops": task_options.FlopsOptions,
    "predict": task_options.PredictOptions,
    "bench": task_options.BenchOptions,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_shows_every_option_that_its_class_declares(flexattn, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "400")
    code, out, _ = flexattn(command, "--help")
    text = " ".join(out.replace("│", " ").split())
    assert code == 0
    for declared in declared_options(COMMANDS[command]):
        option = declared.option
        shown = option.metavar or declared.name if option.positional else f"--{declared.name.replace('_', '-')}"
        for flag in option.flags or (shown,):
            assert flag in text
        assert " ".join(option.help.split()) in text
        if declared.default not in (dataclasses.MISSING, None, False):
            assert f"[default: {declared.default}]" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_an_option_is_one_sentence(command):
    for declared in declared_options(COMMANDS[command]):
        text = declared.option.help
        assert text[0].isupper() and text.endswith("."), (declared.name, text)
