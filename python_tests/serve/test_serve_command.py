"""flexattn serve as a command: what it refuses to start with, and how it ends."""

from __future__ import annotations

import signal
import socket
import sys
import threading
import time

import httpx
import pytest
import served
from served import NAME, sign


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines; set FLEXATTN_TOKEN"),
        (["--host", "::"], "can be reached from other machines"),
        (["--host", "no such host"], "cannot listen on no such host"),
        (["--host", "192.0.2.1", "--token", "secret"], "cannot listen on 192.0.2.1"),
        (["--port", "70000"], "it must be less than 65536"),
        (["--token", " "], "the token is empty"),
        (["--token", "é"], "printable ASCII"),
        (["--files", "/no/such/folder"], "is not a folder"),
        (["--allow-private-urls"], "needs --allow-urls"),
        (["--batch-size", "0"], "at least 1"),
        (["--timeout", "0"], "more than 0"),
        (["--model", "/no/such/model"], "no checkpoint"),
    ],
)
def test_what_cannot_be_served_is_refused_in_a_sentence(flexattn, monkeypatch, arguments, says):
    monkeypatch.delenv("FLEXATTN_TOKEN", raising=False)
    code, _, err = flexattn("serve", "--port", "0", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1


def test_a_port_in_use_is_told_before_the_model_is_loaded(flexattn, monkeypatch):
    monkeypatch.setattr("flexattn_cuda.serve.run.load", lambda *_, **__: pytest.fail("the model was loaded"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = flexattn("serve", "--port", port)
    assert code == 2 and f"port {port}: Address already in use; choose another" in err


def test_a_package_that_is_missing_is_named(flexattn, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "flexattn_cuda.serve.run", raising=False)
    code, _, err = flexattn("serve")
    assert code == 2 and "pip install 'flexattn_cuda[serve]'" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_answers_under_way_are_finished_before_it_ends(number):
    with served.Process() as process:
        answers = []
        asking = [
            threading.Thread(
                target=lambda n=n: answers.append(
                    process.served.post(dict(model=NAME, messages=[sign(n)[0]])).status_code
                )
            )
            for n in range(24)
        ]
        for thread in asking:
            thread.start()
        while process.served.metric("flexattn_batch_size_count") < 1:
            time.sleep(0.01)
        begun = time.monotonic()
        code = process.end(number)
        for thread in asking:
            thread.join(30)
        assert code == (130 if number == signal.SIGINT else -signal.SIGTERM)
        assert time.monotonic() - begun < 15 and len(answers) == 24 and set(answers) == {200}
        assert "Traceback" not in "".join(process.lines)
        with pytest.raises(httpx.ConnectError):
            process.served.get("")
