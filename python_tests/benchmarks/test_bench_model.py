"""The benchmark of the model, on a tiny one: what it writes, and the ratios that do not depend on time."""

from __future__ import annotations

import csv
import json

import bench_model
import pytest
import torch
from model_cost.results import LIMITS
from model_cost.systems import SYSTEMS

from flexattn_cuda.mechanism import context


@pytest.mark.slow
def test_it_writes_ratios_and_a_row_for_every_system(tmp_path, capsys):
    real = context.select
    csv_file, json_file = tmp_path / "model.csv", tmp_path / "model.json"
    arguments = ["--shape", "quick", "--repetitions", "1", "--new-tokens", "2", "--zooms", "1"]
    assert bench_model.main([*arguments, "--csv", str(csv_file), "--json", str(json_file)]) == 0
    assert context.select is real
    ratios = json.loads(json_file.read_text())["ratios"]
    assert list(ratios) == list(LIMITS)
    assert ratios["tiles_encoded_2_of_9"] == 2 and all(ratio > 0 for ratio in ratios.values())
    rows = {row["system"]: row for row in csv.DictReader(csv_file.open()) if row["zoom"] == "3"}
    assert list(rows) == [system.name for system in SYSTEMS]
    # In every layer, each token once; "off": again at the prompt and both new tokens.
    tokens, layers = 72 * 72, 2
    projected = {name: int(row["hr_tokens_projected"]) for name, row in rows.items()}
    assert projected["M = 100 %"] == layers * tokens and projected["M = 100 %, off"] == 3 * layers * tokens
    assert projected["M = 10 %"] == layers * 518 and projected["M = 10 %, churn"] == layers * (518 + 2 * 52)
    assert projected["LLaVA"] == projected["M = 0"] == 0
    assert "prefill_m10_over_hd" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_told(capsys):
    with pytest.raises(SystemExit):
        bench_model.main(["--device", "cuda"])
    assert "there is no GPU" in capsys.readouterr().err
