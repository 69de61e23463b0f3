"""A saved checkpoint under transformers' Auto classes, in a process that does not import this package itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tiny_checkpoint

PROGRAM = """
import sys, transformers
assert "flexattn_cuda" not in sys.modules
folder = sys.argv[1]
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
print(type(model).__name__, type(processor).__name__, len(list(model.config.hr_layers)))
"""


@pytest.mark.slow  # a process that imports transformers
def test_auto_classes_load_a_saved_checkpoint(tmp_path):
    folder = tiny_checkpoint.save(tmp_path / "model")
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    model, processor, layers = done.stdout.split()[-3:]
    assert (model, processor) == ("FlexAttnLlavaForConditionalGeneration", "FlexAttnLlavaProcessor") and int(layers) > 0
    assert (folder / "README.md").read_text().startswith("---")
