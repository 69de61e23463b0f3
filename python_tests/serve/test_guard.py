"""Who may ask, how much, how many, and for how long."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import served
from PIL import Image, PngImagePlugin
from served import NAME, data_url, message, sign

from flexattn_cuda.serve.rows import Rows

TOKEN = "a long and secret token"


def body(**changes) -> dict:
    return dict(model=NAME, messages=[sign(0)[0]]) | changes


@pytest.fixture(scope="module")
def locked():
    """A server with a token and small limits."""
    with served.in_this_process(token=TOKEN, max_request=0.5, max_megapixels=1.0, batch_size=2, queue=2) as server:
        yield server


# -------------------------------------------------------------------------------------------------------------- tokens


def test_the_token_opens_the_api(locked):
    assert locked.client().chat.completions.create(**body()).choices[0].message.content == "29"
    assert locked.get("health").status_code == 200
    assert locked.get("").status_code == 200, "the page holds nothing secret"


@pytest.mark.parametrize("given", ["", "none", TOKEN[:-1], TOKEN + "x", TOKEN.upper()])
def test_another_token_does_not(locked, given):
    with pytest.raises(openai.AuthenticationError, match="token is missing or wrong"):
        locked.client(api_key=given or "x").chat.completions.create(**body())


@pytest.mark.parametrize("header", [None, TOKEN, f"Basic {TOKEN}", "Bearer", f"Bearer {TOKEN} {TOKEN}", "Bearer \xe9"])
@pytest.mark.parametrize("path", ["v1/models", "metrics", "v1/no_such"])
def test_a_header_that_is_not_the_token_does_not(locked, header, path):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    answer = locked.get("{path}", headers=headers)
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"


def test_without_the_token_a_body_is_not_even_read(locked):
    with socket.create_connection(("127.0.0.1", int(locked.url.rstrip("/").rpartition(":")[2]))) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n")
        assert b"401" in connection.recv(100)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", ""]
)
def test_without_a_token_only_this_machines_names_are_served(signs, host):
    """A page of another site can have its own name lead to 127.0.0.1; its requests carry that name."""
    answer = signs.get("v1/models", headers={"Host": host})
    assert answer.status_code == 403 and "localhost alone" in answer.json()["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]", "[::1]:80"])
def test_names_of_this_machine_are_served(signs, host):
    assert signs.get("v1/models", headers={"Host": host}).status_code == 200


# --------------------------------------------------------------------------------------------------------------- sizes


def test_a_large_request_is_refused_with_a_sentence(locked):
    large = body(messages=[message("What?", data_url(b"x" * 600_000))])
    with pytest.raises(openai.APIStatusError, match="send a smaller image") as refused:
        locked.client().chat.completions.create(**large)
    assert refused.value.status_code == 413


def test_a_large_request_without_a_declared_length_is_refused(locked):
    chunks = (b" " * 10_000 for _ in range(70))
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    answer = locked.post(None, content=chunks, headers=headers)
    assert answer.status_code == 413


def test_an_image_of_many_pixels_is_refused_before_it_is_decoded(locked):
    buffer = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(buffer, "PNG")
    begun = time.monotonic()
    answer = locked.post(body(messages=[message("What?", data_url(buffer.getvalue()))]))
    assert answer.status_code == 400 and "12000 x 12000 pixels" in answer.json()["error"]["message"]
    assert time.monotonic() - begun < 2


def test_a_bomb_in_a_comment_of_an_image_is_refused(locked):
    info = PngImagePlugin.PngInfo()
    info.add(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 200_000_000))
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG", pnginfo=info)
    answer = locked.post(body(messages=[message("What?", data_url(buffer.getvalue()))]))
    assert answer.status_code == 400


@pytest.mark.parametrize("form", ["TIFF", "EPS", "PDF", "ICO", "PPM"])
def test_other_formats_are_not_opened(locked, form):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, form)
    answer = locked.post(body(messages=[message("What?", data_url(buffer.getvalue()))]))
    assert answer.status_code == 400 and "not an image" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", ["[" * 100_001, "[" * 50_000 + "]" * 50_000, '{"a":' * 30_000, "[],", "", "null", "[]", '"a"']
)
def test_json_that_is_no_request_is_refused(locked, text):
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    answer = locked.post(None, content=text.encode(), headers=headers)
    assert answer.status_code in (400, 413) and answer.json()["error"]["message"]


def test_a_body_that_does_not_arrive_is_given_up():
    with served.in_this_process(timeout=1.0) as server:
        port = int(server.url.rstrip("/").rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 1000\r\n\r\n{"
            )
            connection.settimeout(10)
            assert b"408" in connection.recv(100)


# --------------------------------------------------------------------------------------------------- how many, how long


@contextlib.contextmanager
def held(monkeypatch):
    """Hold the model up until the block ends."""
    step, free = Rows.__call__, threading.Event()
    monkeypatch.setattr(Rows, "__call__", lambda *arguments: (free.wait(30), step(*arguments))[1])
    try:
        yield
    finally:
        free.set()


def test_more_requests_than_the_queue_holds_are_refused_at_once(locked, monkeypatch):
    with ThreadPoolExecutor(9) as pool:
        with held(monkeypatch):
            sent = [pool.submit(locked.post, body()) for _ in range(4)]  # two in the batch, two that wait
            while locked.service.engine.waiting < 2:
                time.sleep(0.01)
            refused = [pool.submit(locked.post, body()).result() for _ in range(5)]
        answers = [one.result() for one in sent]
    assert all(one.status_code == 503 and one.headers["retry-after"] == "1" for one in refused)
    assert all(one.json()["choices"][0]["message"]["content"] == "29" for one in answers)


def test_the_size_of_all_requests_is_limited(monkeypatch):
    one = body(messages=[message("What?", data_url(b"x" * 400_000))])
    with served.in_this_process(max_pending=1.0) as server, ThreadPoolExecutor(4) as pool:
        with held(monkeypatch):
            assert server.post(one).status_code == 400  # not an image, and pending no more
            pending = [pool.submit(server.post, body(user="x" * 400_000)) for _ in range(2)]
            while server.service.engine.waiting + len(pending) < 2 or server.metric("flexattn_batch_size_count") < 1:
                time.sleep(0.01)
            time.sleep(0.5)
            assert server.post(body(user="x" * 400_000)).status_code == 503
        assert [each.result().status_code for each in pending] == [200, 200]
        assert server.post(body(user="x" * 400_000)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(locked, monkeypatch, stream):
    with held(monkeypatch):
        for _ in range(6):  # more than there are places
            with pytest.raises(httpx.ReadTimeout):
                locked.post(body(stream=stream), timeout=0.4)
            time.sleep(0.1)
    assert locked.post(body()).status_code == 200


def test_a_request_has_a_time(monkeypatch):
    with served.in_this_process(timeout=3.0) as server:
        step = Rows.__call__
        monkeypatch.setattr(Rows, "__call__", lambda *arguments: (time.sleep(1.8), step(*arguments))[1])
        answer = server.post(body())
        assert answer.status_code == 504 and "3 seconds" in answer.json()["error"]["message"]
        streamed = server.post(body(stream=True))
        *_, last = [line for line in streamed.text.splitlines() if line]
        assert streamed.status_code == 200 and json.loads(last[6:])["error"]["code"] == "timeout"
        with pytest.raises(openai.APIError, match="longer than"):
            list(server.client().chat.completions.create(**body(stream=True)))


# ------------------------------------------------------------------------------------------------------------- metrics


def test_metrics_count(signs):
    before = {
        name: signs.metric(name)
        for name in (
            'flexattn_requests_total{path="/v1/chat/completions",status="200"}',
            'flexattn_requests_total{path="other",status="404"}',
            'flexattn_images_total{source="kept"}',
            "flexattn_tokens_total",
        )
    }
    for _ in range(2):
        assert signs.post(body()).status_code == 200
    signs.get("no_such")
    after = [signs.metric(name) - value for name, value in before.items()]
    assert after[0] == 2 and after[1] == 1 and after[2] >= 1 and after[3] == 6  # with the token that ends each
    assert signs.metric("flexattn_image_cache_bytes") > 0 and signs.metric("flexattn_waiting") == 0


def test_an_image_is_kept_by_its_content(signs):
    encoded = 'flexattn_images_total{source="encoded"}'
    signs.post(body(messages=[sign(7)[0]]))
    before = signs.metric(encoded)
    signs.post(body(messages=[sign(7)[0]]))
    assert signs.metric(encoded) == before
    signs.post(body(messages=[sign(8)[0]]))
    assert signs.metric(encoded) == before + 1
