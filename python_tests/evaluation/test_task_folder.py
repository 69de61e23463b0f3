"""`python -m flexattn_cuda.evaluation`, which tells lmms-eval where the tasks are."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest
from documents import ROOT

MAIN = ROOT / "flexattn_cuda" / "evaluation" / "__main__.py"


def test_the_folder_of_the_tasks_is_printed(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    runpy.run_path(str(MAIN), run_name="__main__")
    assert Path(capsys.readouterr().out.strip(), "vstar_bench_loss.yaml").is_file()


def test_without_lmms_eval_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"lmms_eval is not installed; run: pip install 'flexattn_cuda\[eval\]'"):
        runpy.run_path(str(MAIN), run_name="__main__")
