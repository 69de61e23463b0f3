"""What the documentation tells a user to type works; what cannot run here names programs and options that exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import documents
import pytest
from documents import ROOT, Block

from flexattn_cuda.tasks.options import TrainOptions

ALL = documents.all_blocks()
MARKED = [block for block in ALL if block.mark]
RUNNABLE = sorted({block.document for block in ALL if not block.mark and block.language in ("sh", "python")})
RUNNABLE.remove(ROOT / "README.md")  # the others are read after it
README = ROOT / "README.md"
DEMO = "flexattn-demo"  # the folder that the README leaves the reader with
IN_DEMO = {f"{DEMO}/{name}" for name in ("1_picosdeeuropa.jpg", "3_free.jpg", "questions.jsonl", "records.json")}
WRITTEN = {"overlay.png", "compared.png", "answers.jsonl", "more_answers.jsonl"}


class Reader(NamedTuple):
    """A reader who has run the README.

    Attributes:
        folder: Where.
        programs: The folder of programs of the virtual environment.
        output: What the README printed.
    """

    folder: Path
    programs: Path
    output: str


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Path:
    """The programs of a new virtual environment, after `pip install .`."""
    folder = tmp_path_factory.mktemp("installed")
    return documents.install(documents.copy_of_sources(folder / "sources"), folder / "venv")


@pytest.fixture(scope="module")
def in_clone(programs, tmp_path_factory) -> Reader:
    """A reader in the root of a fresh clone."""
    folder = documents.copy_of_sources(tmp_path_factory.mktemp("clone"))
    return Reader(folder, programs, documents.run_page(documents.blocks(README), folder, programs))


@pytest.fixture(scope="module")
def elsewhere(programs, tmp_path_factory) -> Reader:
    """A reader in an empty folder."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return Reader(folder, programs, documents.run_page(documents.blocks(README), folder, programs))


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_says_what_it_is(block):
    assert block.language in documents.LANGUAGES, f"{block} is {block.language!r}"
    assert block.mark is None or block.mark in documents.MARKS, f"{block} is marked {block.mark!r}"
    if block.language == "json":
        json.loads(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("place, examples", [("in_clone", 4), ("elsewhere", 2)])
def test_the_readme_runs_as_it_is_written(request, place, examples):
    folder, _, output = request.getfixturevalue(place)
    lines = output.splitlines()
    assert f"{examples} of {examples} answers are right" in lines
    assert lines.count("89") == 2, "asked in the shell and in Python for the number in the image at the top"
    assert {name for name in IN_DEMO if (folder / name).exists()} == IN_DEMO and (folder / "overlay.png").exists()
    answers = [json.loads(line)["answer"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert answers[0] == "89" and len(answers) == examples


@pytest.mark.slow
@pytest.mark.parametrize("document", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_runs_as_it_is_written(elsewhere, document, tmp_path):
    shutil.copytree(elsewhere.folder / DEMO, tmp_path / DEMO)
    documents.run_page(documents.blocks(document), tmp_path, elsewhere.programs)


@pytest.mark.slow
def test_in_the_root_of_a_clone_the_sources_use_what_is_installed(in_clone):
    program = "import flexattn_cuda.native as native; print(native.__file__, native.compiled.__file__)"
    python, compiled = documents.run(["python", "-c", program], in_clone.folder, in_clone.programs).split()
    assert python.startswith(str(in_clone.folder)) and compiled.startswith(str(in_clone.programs.parent))
    torchrun = ["python", "-m", "torch.distributed.run", "--standalone", "-m", "flexattn_cuda.cli", "info"]
    assert "CPU path" in documents.run(torchrun, in_clone.folder, in_clone.programs)


@pytest.mark.parametrize("block", [one for one in ALL if one.language in ("sh", "python")], ids=str)
def test_files_that_a_reader_has_are_those_that_are_named(block):
    named = re.findall(r"[\w./-]+\.(?:jpe?g|png|jsonl)\b|\b[\w./-]*records\.json\b", block.text)
    assert set(named) <= IN_DEMO | WRITTEN, f"{block} names a file that nothing writes"


@pytest.mark.parametrize("block", MARKED, ids=str)
def test_a_block_that_cannot_run_here_names_what_exists(block, flexattn):
    if block.language == "python":
        documents.check_python(block.text)
    else:
        documents.check_shell(block.text, flexattn)


@pytest.mark.parametrize(
    "line",
    [
        "flexattn ask image.jpg question --no-such-option 3",
        "flexattn no-such-command",
        "torchrun --nproc-per-node 4 -m flexattn_cuda.cli train --no-such-option",
        "FLEXATTN_NVTX=1 nsys profile flexattn ask image.jpg question --no-such-option 3",
        "python benchmarks/no_such_file.py",
        "python tools/house.py --no-such-option",
        "python -m pytest python_tests/no_such_test.py",
        "make no-such-target",
        "make test NO_SUCH_VARIABLE=1",
        'pip install ".[no-such-extra]"',
        "build/native/flexattn_bench attention --no-such-flag",
        ".ci/run no-such-step",
        "no-such-program",
    ],
)
def test_the_check_finds_what_does_not_exist(line, flexattn):
    with pytest.raises(AssertionError):
        documents.check_shell(line, flexattn)


def test_the_page_of_tasks_shows_every_option_of_training_with_its_default():
    spec = importlib.util.spec_from_file_location("docs_options", ROOT / "docs" / "options.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown((ROOT / "docs" / "reference" / "tasks.md").read_text())
    assert "{{" not in page
    for field in dataclasses.fields(TrainOptions):
        default = "required" if field.default is dataclasses.MISSING else f"`{json.dumps(field.default)}`"
        assert f"| `{field.name}` | {default.replace('null', 'None').replace('false', 'False')} |" in page


def test_the_check_finds_an_import_that_does_not_exist():
    with pytest.raises(AssertionError, match="no no_such_name"):
        documents.check_python("from flexattn_cuda import no_such_name")


@pytest.mark.parametrize(("language", "text"), [("sh", "false; true"), ("python", "1 / 0")])
def test_a_page_that_fails_is_found(language, text, tmp_path):
    with pytest.raises(AssertionError):
        documents.run_page([Block(README, 1, language, None, text)], tmp_path, Path(sys.executable).parent)


@pytest.mark.parametrize("document", documents.DOCUMENTS[:2], ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", document.read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"{document.name} links to {missing}"


@pytest.mark.parametrize("document", documents.DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(document):
    assert not documents.missing_paths(document.read_text())


def test_the_check_finds_a_file_that_does_not_exist():
    text = "`csrc/torch/library.cpp`, `mechanism/pool.py`, `csrc/cpu/NAME.cpp`, `csrc/cpu/NAME.rs`, `no_such_file.py`"
    assert documents.missing_paths(text) == ["csrc/cpu/NAME.rs", "csrc/torch/library.cpp", "no_such_file.py"]
