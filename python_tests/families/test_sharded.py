"""An attached model whose parameters are sharded over two processes (FSDP, on the CPU) trains like one that is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_families import FAMILIES

import flexattn_cuda

FAMILY = FAMILIES["internvl_qwen3"]
ROWS = 2  # of the batch, one for each process


def attached() -> torch.nn.Module:
    return flexattn_cuda.attach(FAMILY.model(), FAMILY.settings("paper"))


def row(number: int) -> dict:
    """Return one prompt with its image and labels."""
    inputs = FAMILY.inputs((1,), seed=number)
    return inputs | {"labels": inputs["input_ids"].masked_fill(torch.arange(inputs["input_ids"].shape[1]) < 18, -100)}


def train_sharded(out: Path) -> None:
    """In each of two processes: one step on the process's own row. Process 0 writes loss and gradients."""
    from torch.distributed import all_reduce, destroy_process_group, get_rank, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo")
    mesh, model = init_device_mesh("cpu", (2,)), attached()
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(**row(get_rank())).loss
    loss.backward()
    mean = loss.detach() / 2
    all_reduce(mean)
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    if get_rank() == 0:
        torch.save({"loss": mean, "gradients": gradients}, out)
    destroy_process_group()


@pytest.mark.slow  # two processes start
def test_two_processes_equal_one(tmp_path):
    out = tmp_path / "step.pt"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, __file__, str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    sharded = torch.load(out)

    model = attached()
    losses = [model(**row(number)).loss for number in range(ROWS)]
    torch.stack(losses).mean().backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    torch.testing.assert_close(sharded["loss"], torch.stack(losses).mean().detach(), rtol=1e-6, atol=0)
    assert sharded["gradients"].keys() == own.keys() and any("k_proj_hd" in name for name in own)
    for name, gradient in own.items():
        assert (sharded["gradients"][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


if __name__ == "__main__":
    train_sharded(Path(sys.argv[1]))
