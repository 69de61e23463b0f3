"""`flexattn` itself: version, usage, options, and how little it imports."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest

import flexattn_cuda
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
        (["ask"], 2),
        (["ask", "nowhere.png", "What is it?"], 2),
        (["ask", "nowhere.png", " "], 2),
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


# --------------------------------------------------------------------------------------------------------- options

COMMANDS = {
    "ask": task_options.AskOptions,
    "ask-batch": task_options.BatchOptions,
    "train": task_options.TrainOptions,
    "demo": task_options.DemoOptions,
    "info": task_options.InfoOptions,
    "flops": task_options.FlopsOptions,
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
