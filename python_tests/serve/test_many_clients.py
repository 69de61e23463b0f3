"""The server under load: nothing is lost, nothing is mixed, batches pay, and kill -9 hurts nobody for long."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
import served
from served import HELD_OUT, NAME, QUESTIONS, data_url, message

import flexattn_cuda

pytestmark = pytest.mark.slow
CLIENTS, REQUESTS = 64, 500


def bodies() -> list[tuple[dict[str, Any], str, str]]:
    """Return requests that all have answers of their own, with their file and question."""
    made = []
    for record in QUESTIONS:
        url = data_url(HELD_OUT / record["file"])
        for question in (record["question"], f"What does the sign say that is {'red' if len(made) % 4 else 'blue'}?"):
            made.append((dict(model=NAME, messages=[message(question, url)]), record["file"], question))
    return made


async def ask_all(
    url: str, requests: Sequence[dict[str, Any]], clients: int, on_answer: Callable[[], None] = lambda: None
) -> list[str | Exception]:
    """Send requests, so many at a time; return the answer or the error of each."""
    answers: list[Any] = [None] * len(requests)
    numbers = iter(range(len(requests)))

    async def client() -> None:
        async with httpx.AsyncClient(timeout=120) as session:
            for number in numbers:
                try:
                    answer = await session.post(f"{url}v1/chat/completions", json=requests[number])
                    answer.raise_for_status()
                    answers[number] = answer.json()["choices"][0]["message"]["content"]
                    on_answer()
                except Exception as error:
                    answers[number] = error

    await asyncio.gather(*(client() for _ in range(clients)))
    return answers


def test_five_hundred_requests_of_sixty_four_clients():
    model, processor = flexattn_cuda.load(device="cpu")
    asked = bodies()
    alone = [flexattn_cuda.ask(model, processor, HELD_OUT / file, question).text for _, file, question in asked]
    assert len(set(alone)) > 40, "answers that are mixed up are noticed"
    with served.Process("--batch-size", "32", "--queue", "128") as process:
        url = process.served.url
        warm = asyncio.run(ask_all(url, [body for body, *_ in asked], 8))
        assert warm == alone
        numbers = [number * 7 % len(asked) for number in range(REQUESTS)]
        requests = [asked[number][0] for number in numbers]
        begun = time.monotonic()
        assert asyncio.run(ask_all(url, requests[:100], 1)) == [alone[number] for number in numbers[:100]]
        single = 100 / (time.monotonic() - begun)
        batches, rows = (process.served.metric(f"flexattn_batch_size_{what}") for what in ("count", "sum"))
        begun = time.monotonic()
        answers = asyncio.run(ask_all(url, requests, CLIENTS))
        together = REQUESTS / (time.monotonic() - begun)
        batches = process.served.metric("flexattn_batch_size_count") - batches
        rows = process.served.metric("flexattn_batch_size_sum") - rows
    print(
        f"\n{REQUESTS} requests of {CLIENTS} clients: {together:.1f}/s, one at a time {single:.1f}/s, "
        f"ratio {together / single:.2f}, {rows / batches:.1f} requests a batch"
    )
    assert not [error for error in answers if isinstance(error, Exception)], "none is lost"
    assert answers == [alone[number] for number in numbers], "none is mixed"
    assert rows == REQUESTS and rows / batches > 4 and together / single > 1.3


def test_kill_9_under_load():
    asked = [body for body, *_ in bodies()]
    with served.Process() as process:
        port, url = process.port, process.served.url

        async def killed_meanwhile() -> list[str | Exception]:
            several = asyncio.Semaphore(0)
            asking = asyncio.ensure_future(ask_all(url, asked * 6, CLIENTS, several.release))
            for _ in range(40):
                await several.acquire()
            process.process.send_signal(signal.SIGKILL)
            return await asyncio.wait_for(asking, 60)

        answers = asyncio.run(killed_meanwhile())
        failed = [answer for answer in answers if isinstance(answer, Exception)]
        assert process.process.wait(10) == -signal.SIGKILL
        assert len(failed) > CLIENTS // 2 and len(answers) - len(failed) >= 40
        assert all(isinstance(error, httpx.TransportError) for error in failed)
        assert all(isinstance(answer, str | httpx.TransportError) for answer in answers), "none hangs"
    with served.Process(port=port) as again:
        first = asyncio.run(ask_all(again.served.url, asked[:8], 8))
        assert again.port == port and first[0] == QUESTIONS[0]["answer"]
    print(f"\n{len(answers) - len(failed)} answered before, {len(failed)} failed, the port was free at once")
