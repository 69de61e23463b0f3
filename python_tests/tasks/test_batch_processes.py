"""A file of questions that several processes share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from question_files import ROOT, interrupted_answers, read, some, uninterrupted, write

from flexattn_cuda.errors import InputError
from flexattn_cuda.runs.processes import Processes
from flexattn_cuda.tasks.ask_batch import answer_file

# The command line, which also keeps the questions that each process asked its model.
PROGRAM = """
import os
from pathlib import Path
from flexattn_cuda import cli
from flexattn_cuda.tasks import ask as answering

generate = answering.generate_answers

def recorded(model, processor, images, questions, *rest):
    with open(Path(__file__).with_name("asked." + os.environ["RANK"]), "a") as file:
        print(*questions, file=file)
    return generate(model, processor, images, questions, *rest)

answering.generate_answers = recorded
cli.main()
"""


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(checkpoint, folder, monkeypatch):
    records = [*some(9), {"image": "nowhere.png", "question": "y"}]
    questions, output = write(folder / "q.jsonl", records), folder / "a.jsonl"
    expected = uninterrupted(checkpoint, questions)
    interrupted_answers(monkeypatch, 2, questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (folder / "program.py").write_text(PROGRAM)
    options = ["--model", checkpoint, "--max-new-tokens", "2", "--batch-size", "2", "--device", "cpu"]
    run = subprocess.run(
        [*launcher, folder / "program.py", "ask-batch", questions, "-o", output, *options],
        cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stderr.splitlines() == [
        "resuming: 2 questions are answered, 8 are left",
        f"wrote {output}: answers 9, errors 1",
    ]
    assert read(output) == expected
    assert not list(folder.glob("a.jsonl.partial*"))
    asked = [(folder / f"asked.{rank}").read_text().split() for rank in range(2)]
    assert min(map(len, asked)) >= 3 and len(asked[0] + asked[1]) == 7


@pytest.mark.slow
def test_one_process_resumes_a_run_of_several(checkpoint, folder, monkeypatch, asked):
    questions, output = write(folder / "q.jsonl", some(9)), folder / "a.jsonl"
    expected = uninterrupted(checkpoint, questions)
    interrupted_answers(monkeypatch, 6, questions, output, checkpoint, "cpu", max_new_tokens=2, batch_size=1)
    header, *lines = (folder / "a.jsonl.partial.0").read_bytes().splitlines(keepends=True)
    for rank in range(3):
        (folder / f"a.jsonl.partial.{rank}").write_bytes(header + b"".join(lines[rank::3]))
    asked.clear()
    answer_file(questions, output, checkpoint, "cpu", max_new_tokens=2)
    assert read(output) == expected and sum(map(len, asked)) == 3
    assert not list(folder.glob("a.jsonl.partial*"))


@pytest.mark.slow
def test_workers_end_when_their_launcher_is_killed(tmp_path):
    """They would wait for the others, which never come."""
    worker = "import os; print(os.getpid(), flush=True); from flexattn_cuda.runs.processes import Processes; "
    worker += "Processes().__enter__()"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {worker!r}])"
    environment = {"PYTHONPATH": str(ROOT), "RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    with socket.create_server(("localhost", 0)) as store:  # which never answers
        environment["MASTER_PORT"] = str(store.getsockname()[1])
        run = subprocess.Popen([sys.executable, "-c", launcher], env=os.environ | environment, stdout=subprocess.PIPE)
        pid = int(run.stdout.readline())
        store.settimeout(120)
        store.accept()  # the worker has begun to wait
        run.kill()
        run.wait()
        run.stdout.close()
        end = time.monotonic() + 30
        while is_running(pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_each_of_several_processes_takes_the_gpu_of_its_local_rank(monkeypatch):
    reason = "there is no GPU 2"
    monkeypatch.setattr(
        "flexattn_cuda.build.cuda_unavailable_reason", lambda index=None: reason if index == 2 else None
    )
    assert Processes().device("auto") == torch.device("cuda")
    for name, value in dict(RANK="5", LOCAL_RANK="1", WORLD_SIZE="8").items():
        monkeypatch.setenv(name, value)
    devices = [Processes().device(wanted) for wanted in (None, "auto", "cuda", "cuda:0", "cpu")]
    assert [str(device) for device in devices] == ["cuda:1", "cuda:1", "cuda:1", "cuda:0", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="there is no GPU 2"):
        Processes().device("auto")
