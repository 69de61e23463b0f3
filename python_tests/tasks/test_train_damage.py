"""`train`: checkpoints that are damaged, images that changed, disks that are full."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
from question_files import image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from train_runs import furthest, weights
from training_data import train_on

from flexattn_cuda.errors import InputError
from flexattn_cuda.tasks.train import last_complete_checkpoint
from flexattn_cuda.tasks.train.checkpoints import writing

SETTINGS = dict(steps=4, save_every=2, batch_size=4, learning_rate=1e-2, device="cpu", keep=3)


def flip(path, bit: int = 8 * 40):
    content = bytearray(path.read_bytes())
    content[bit // 8 % len(content)] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_and_it_is_said(checkpoint, files, tmp_path, capsys):
    whole = train_on(files, tmp_path, checkpoint, **SETTINGS)
    expected, last = weights(tmp_path), tmp_path / "checkpoint-4"
    listed = json.loads((last / "complete.json").read_text())
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"} <= listed.keys()
    for name in listed:
        flip(last / name)
        assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2", name
        flip(last / name)
        assert last_complete_checkpoint(tmp_path) == last
    flip(last / "optimizer.pt", bit=8 * 3000)
    capsys.readouterr()
    assert train_on(files, tmp_path, checkpoint, **SETTINGS, progress=True).losses == whole.losses
    said = capsys.readouterr().err
    assert f"{last} is not as it was written, and was removed" in said and "resuming from" in said
    assert furthest(weights(tmp_path), expected) == 0


@pytest.mark.slow
def test_a_run_whose_images_were_replaced_is_refused(checkpoint, files, tmp_path):
    output, changed = tmp_path / "out", files[1] / "2.png"
    train_on(files, output, checkpoint, **SETTINGS)
    before = changed.read_bytes()
    image(seed=77).save(changed)
    with pytest.raises(InputError, match=r"was started with other options \(content of images\); "):
        train_on(files, output, checkpoint, **SETTINGS)
    changed.write_bytes(before)  # at another time, with the same content
    train_on(files, output, checkpoint, **SETTINGS)


@pytest.mark.slow
@pytest.mark.parametrize("room", [9_000, 60_000, 400_000])
def test_a_full_disk_is_reported_and_the_run_resumed(checkpoint, files, tmp_path, room):
    """The limit on the size of a file fails as a full disk does: in the middle of a file."""
    whole = train_on(files, tmp_path / "whole", checkpoint, **SETTINGS)
    output, limits = tmp_path / "full", resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = [path.stat().st_size for path in (tmp_path / "whole" / "checkpoint-2").iterdir()]
    assert any(size > room for size in sizes)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        with pytest.raises(
            InputError, match=r"cannot be written: .*; make room there, then repeat the command"
        ) as error:
            train_on(files, output, checkpoint, **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert train_on(files, output, checkpoint, **SETTINGS).losses == whole.losses
    assert furthest(weights(output), weights(tmp_path / "whole")) == 0


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_reported():
    tokenizer = Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>"))
    says = "^out cannot be written: No space left on device .*; make room there, then repeat"
    with pytest.raises(InputError, match=says), writing(Path("out")):
        tokenizer.save("/dev/full")
    with pytest.raises(KeyError), writing(Path("out")):  # a mistake of the program stays one
        raise KeyError("name")
