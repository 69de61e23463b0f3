"""A server in this process or in another, and what clients send it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from openai import OpenAI

from flexattn_cuda.serve.app import create_app
from flexattn_cuda.serve.service import Service
from flexattn_cuda.tasks.load import load
from flexattn_cuda.tasks.options import ServeOptions

ROOT = Path(__file__).parents[2]
HELD_OUT = ROOT / "python_tests" / "data" / "held_out"
QUESTIONS = json.loads((HELD_OUT / "questions.json").read_text())
NAME = "flexattn-default"
TINY = "tiny"


def data_url(path: Path | bytes, kind: str = "image/jpeg") -> str:
    """Return a file as a data URL."""
    content = path if isinstance(path, bytes) else path.read_bytes()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def message(question: str, *urls: str, role: str = "user") -> dict[str, Any]:
    """Return a message with images."""
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": role, "content": [*images, {"type": "text", "text": question}]}


def sign(number: int) -> tuple[dict[str, Any], str]:
    """Return the message that asks a held-out question, and its image's file name."""
    record = QUESTIONS[number % len(QUESTIONS)]
    return message(record["question"], data_url(HELD_OUT / record["file"])), record["file"]


class Served:
    """A server that listens.

    Attributes:
        url: Of its page, with a slash at the end.
        service: What it serves, where it runs in this process.
    """

    def __init__(self, url: str, name: str, token: str | None = None, service: Service | None = None):
        self.url, self.name, self.token, self.service = url, name, token, service
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(timeout=60, verify=False)  # to read certificates takes longer than an answer

    def client(self, **options: Any) -> OpenAI:
        """Return the official client, which does not try again."""
        return OpenAI(
            base_url=f"{self.url}v1", **({"api_key": self.token or "none", "max_retries": 0, "timeout": 60} | options)
        )

    def post(self, body: Any, path: str = "v1/chat/completions", **options: Any) -> httpx.Response:
        """Send a request as it is."""
        return self._http.post(f"{self.url}{path}", **({"json": body, "headers": self._headers} | options))

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Send a request without a body, and without the token."""
        return self._http.get(f"{self.url}{path}", **options)

    def metric(self, name: str) -> float:
        """Return the value of a metric, with its labels in its name."""
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def metrics(self) -> str:
        return self.get("metrics", headers=self._headers).text


@contextlib.contextmanager
def in_this_process(model: Path | None = None, **options: Any) -> Iterator[Served]:
    """Serve a model in a thread of this process."""
    chosen = ServeOptions(**({"device": "cpu", "max_new_tokens": 32} | options))
    name = NAME if model is None else TINY
    service = Service(*load(model, "cpu"), chosen, name)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="warning", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}/", name, chosen.token, service)
        finally:
            server.should_exit = True
            thread.join()


class Process:
    """`flexattn serve` as a user starts it."""

    def __init__(self, *arguments: str, port: int = 0, token: str | None = None):
        command = [sys.executable, "-m", "flexattn_cuda.cli", "serve", "--port", str(port), "--device", "cpu"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)} | ({"FLEXATTN_TOKEN": token} if token else {})
        self.process = subprocess.Popen(
            [*command, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        url = self._address()
        self.port = int(url.rstrip("/").rpartition(":")[2])
        self.served = Served(f"http://127.0.0.1:{self.port}/", NAME, token)
        threading.Thread(target=self._listen, daemon=True).start()

    def _address(self) -> str:
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"serving (http://\S+)", line):
                return found[1]
        raise AssertionError(f"the server ended: {''.join(self.lines)}")

    def _listen(self) -> None:
        self.lines += list(self.process.stderr)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.end(signal.SIGKILL)

    def end(self, number: int) -> int:
        """Send a signal, and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(60)

    @property
    def memory(self) -> int:
        """Peak of the resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
