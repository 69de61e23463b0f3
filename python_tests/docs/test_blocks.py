"""What the documentation tells a user to type works; what cannot run here names programs and options that exist."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from pathlib import Path

import documents
import pytest
from documents import ROOT, Block

from flexattn_cuda.tasks.options import TrainOptions

ALL = documents.all_blocks()
MARKED = [block for block in ALL if block.mark]
RUNNABLE = sorted({block.document for block in ALL if not block.mark and block.language in ("sh", "python")})
QUESTION = "What does the sign say that is purple?"


@pytest.fixture
def folder(tmp_path) -> Path:
    """The files that the pages speak of: an image, questions, training records, and a checkpoint."""
    folder = tmp_path / "user"
    images = folder / "images"
    images.mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "photographs" / "1_picosdeeuropa.jpg", folder / "image.jpg")
    (folder / "questions.jsonl").write_text(json.dumps({"image": "image.jpg", "question": QUESTION}) + "\n")
    shutil.copytree(ROOT / "flexattn_cuda" / "assets" / "default", folder / "my-model")
    held_out = ROOT / "python_tests" / "data" / "held_out"
    records = []
    for one in json.loads((held_out / "questions.json").read_text())[:4]:
        name = Path(one["file"]).name
        shutil.copy(held_out / name, images / name)
        conversation = [
            {"from": "human", "value": f"<image>\n{one['question']}"},
            {"from": "gpt", "value": one["answer"]},
        ]
        records.append({"image": name, "conversations": conversation})
    (folder / "records.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("block", ALL, ids=str)
def test_every_block_says_what_it_is(block):
    assert block.language in documents.LANGUAGES, f"{block} is {block.language!r}"
    assert block.mark is None or block.mark in documents.MARKS, f"{block} is marked {block.mark!r}"
    if block.language == "json":
        json.loads(block.text)


@pytest.mark.slow
@pytest.mark.parametrize("document", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_runs_as_it_is_written(document, folder, tmp_path):
    output = documents.run_page(documents.blocks(document), folder, tmp_path / "shims")
    if document.name in ("README.md", "ask.md"):
        assert re.match(r"89\n", output), "the first command asks for the number in the image at the top"
        assert (folder / "overlay.png").exists()
        assert json.loads((folder / "answers.jsonl").read_text())["answer"] == "89"


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
        documents.run_page([Block(ROOT / "README.md", 1, language, None, text)], tmp_path, tmp_path / "shims")


@pytest.mark.parametrize("document", documents.DOCUMENTS[:2], ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#:]+)[^):]*\)", document.read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing, f"{document.name} links to {missing}"
