"""A thousand requests that nobody should send: each is refused, and nothing that is not allowed is read."""

from __future__ import annotations

import http.server
import io
import json
import random
import socket
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import served
from PIL import Image
from served import HELD_OUT, NAME, QUESTIONS, data_url, message, sign

pytestmark = pytest.mark.slow
TOKEN = "the token of the thousand"
SECRET = "nobody may read this"
COUNT = 1000
JUNK: list[Any] = [
    None,
    True,
    0,
    -1,
    1e308,
    10**30,
    "",
    "x",
    "\0",
    "\u202e",
    "é" * 50,
    [],
    [[]],
    {},
    {"type": "text"},
    ["x"] * 50,
    {"$ref": "#"},
    "../../etc/passwd",
    "' OR 1=1 --",
    "{{7*7}}",
    "<image>",
    "</s>",
    "%s%n",
    [None],
    {"": ""},
]


PRIVATE_HOSTS = [
    "127.0.0.1",
    "localhost",
    "127.1",
    "0",
    "0.0.0.0",
    "2130706433",
    "0x7f.1",
    "017700000001",
    "[::1]",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "[64:ff9b::7f00:1]",
    "LOCALHOST",
    "127.0.0.1.",
    "localhost.",
    "user@127.0.0.1",
    "a:b@localhost",
    "127.0.0.1#@a",
    "127.0.0.1\\@a",
    "10.0.0.1",
    "169.254.169.254",
    "192.168.0.1",
    "[fe80::1]",
    "[fd00::1]",
    "①②⑦.⓪.⓪.①",
]
METHODS = ["GET", "POST", "PUT", "DELETE", "TRACE", "CONNECT", "OPTIONS", "G\0T", "X" * 3000]
PATHS = [
    *["/", "/v1/models", "/v1/chat/completions", "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/page/../run.py"],
    *["/app.js/../../run.py", "//etc/passwd", "/\\..\\..", "/v1/models/%00", "*", "http://evil.example/"],
    "/" + "x" * 70_000,
]
HEADS = [
    "Content-Length: -1",
    "Content-Length: 99999999999999",
    "Content-Length: x",
    "Host: ",
    "Transfer-Encoding: chunked\r\nContent-Length: 5",
    "Transfer-Encoding: x",
    "X: " + "y" * 90_000,
    "Expect: 100-continue",
    "Upgrade: websocket\r\nConnection: Upgrade",
    "\0: \0",
    "a b: c",
    "Content-Encoding: gzip\r\nContent-Length: 3",
]
BAD_DATA = ["data:", "data:,", "data:image/png;base64,%%%", "data:image/png;base64,A", 1e308]
FIELDS = ["stream", "temperature", "tools", "stop", "n", "flexattn", "no_such"]


def valid(**changes: Any) -> dict[str, Any]:
    return dict(model=NAME, messages=[sign(0)[0]], max_tokens=2) | changes


def with_image(url: Any) -> dict[str, Any]:
    return valid(messages=[message("What does it say?", url)])


# ------------------------------------------------------------------------------------------------------- what is sent


def wrong_types(random: random.Random) -> dict[str, Any]:
    """Put something else somewhere into a valid request."""
    body = json.loads(json.dumps(valid()))
    holders = list(_holders(body))
    holder, key = random.choice(holders)
    holder[key] = random.choice([junk for junk in JUNK if junk != holder[key]])
    if random.random() < 0.3:
        body[random.choice(FIELDS)] = random.choice(JUNK)
    return body


def _holders(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _holders(inner)


def png_header(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG that claims a size, and perhaps has data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


BOMB = zlib.compress(zlib.compress(b"\0" * 30_000_000))


def bad_images(random: random.Random) -> dict[str, Any]:
    """Name an image that is damaged, huge, or none."""
    good = (HELD_OUT / QUESTIONS[random.randrange(48)]["file"]).read_bytes()
    kind = random.randrange(9)
    if kind == 0:
        content = good[: random.randrange(1, len(good) // 2)]
    elif kind == 1:
        content = bytes(random.randrange(256) for _ in range(random.randrange(1, 3000)))
    elif kind == 2:
        content = png_header(random.choice([0, 1, 2**31 - 1, 60_000]), random.choice([0, 2**31 - 1, 60_000]))
    elif kind == 3:
        content = png_header(7000, 7000, b"\0" * 100_000)
    elif kind == 4:
        content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    elif kind == 5:
        content = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    elif kind == 6:
        content = BOMB
    elif kind == 7:
        content = _saved(random.choice(["TIFF", "ICO", "PDF", "PPM", "TGA"]))
    else:
        return with_image(random.choice(BAD_DATA))
    return with_image(data_url(content, random.choice(["image/png", "text/html", "x"])))


def _saved(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, form)
    return buffer.getvalue()


class Tricks:
    """URLs of what may not be read: a file beside the allowed folder, and a web server on this machine.

    Args:
        folder: That is allowed.
        port: Of the web server.
    """

    def __init__(self, folder: Any, port: int):
        self.folder, self.port = folder, port

    def files(self, random: random.Random) -> dict[str, Any]:
        """Name a file outside of the folder."""
        secret = random.choice(["secret.png", "secret.txt"])
        dots = random.choice(["..", "%2e%2e", ".%2e", "..%2f.", "inside/../..", "link-up", "%2e%2e%2f%2e"])
        prefix = random.choice(["file://", "file://localhost", "FILE://", "file:", "file:///", "file://127.0.0.1"])
        middle = "/" * random.randrange(1, 4)
        path = random.choice(
            [
                f"{self.folder}{middle}{dots}{middle}{secret}",
                f"{self.folder.parent}{middle}{secret}",
                f"{self.folder}/link.png",
                f"{self.folder}/pipe",
                f"{self.folder}",
                f"{self.folder}/{'x' * 5000}",
                f"{self.folder}{secret}",
                "/etc/passwd",
                "/dev/zero",
                "/dev/stdin",
                "/proc/self/environ",
                "/proc/self/mem",
                f"{self.folder}/ok.png%00",
                f"{self.folder}/../{secret}%00.png",
                "etc/passwd",
                "//etc/passwd",
            ]
        )
        return with_image(prefix + path)

    def addresses(self, random: random.Random) -> dict[str, Any]:
        """Name an address that is private, however it is written."""
        host = random.choice(PRIVATE_HOSTS)
        scheme = random.choice(["http", "https", "HTTP", "ftp", "gopher", "ws"])
        return with_image(f"{scheme}://{host}:{self.port}/{random.choice(['', 'a.png', '?q', '%0d%0aX: y', ' '])}")


def raw_bodies(random: random.Random) -> bytes:
    """Return a body that is no JSON of a request."""
    text = json.dumps(valid()).encode()
    return random.choice(
        [
            text[: random.randrange(len(text))],
            b"[" * random.choice([10, 5000, 200_000]),
            b'{"a":' * 3000,
            b"\xff\xfe" + text,
            b"",
            b"null",
            b"NaN",
            b'"x"',
            b"[]," * 50_000,
            text + text,
            b'{"model": "\\ud800"}',
            b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}',
            b"\0" * 1000,
            b"x" * 1_500_000,
            text.replace(b"max_tokens", b"max_tokens\\u0000"),
            b'{"messages":' + b"9" * 6000 + b"}",
        ]
    )


def raw_requests(random: random.Random) -> bytes:
    """Return bytes that are hardly HTTP."""
    path, method, head = random.choice(PATHS), random.choice(METHODS), random.choice(HEADS)
    return f"{method} {path} HTTP/{random.choice(['1.1', '1.0', '9.9', 'x'])}\r\n{head}\r\n\r\nabc".encode()


# ----------------------------------------------------------------------------------------------------------- the test


class Canary(http.server.BaseHTTPRequestHandler):
    """Notices whoever comes."""

    def handle(self) -> None:
        self.server.visits.append(self.client_address)


@pytest.fixture
def canary() -> Iterator[Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    server.visits = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """A folder that is allowed, and secrets beside it."""
    import os

    allowed = tmp_path / "images"
    (allowed / "inside").mkdir(parents=True)
    first = HELD_OUT / QUESTIONS[0]["file"]
    (allowed / "ok.png").write_bytes(first.read_bytes())
    for secret in (tmp_path / "secret.png", tmp_path / "imagessecret.png"):
        secret.write_bytes(first.read_bytes())  # an answer about it would give it away
    (tmp_path / "secret.txt").write_text(SECRET)
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    (allowed / "link-up").symlink_to(tmp_path)
    os.mkfifo(allowed / "pipe")
    return allowed


def test_a_thousand_malformed_requests(folder, canary):
    chance = random.Random(16)
    tricks = Tricks(folder, canary.server_port)
    kinds: list[Callable[[random.Random], Any]] = [
        wrong_types,
        bad_images,
        tricks.files,
        tricks.addresses,
        raw_bodies,
        raw_requests,
        wrong_tokens,
    ]
    arguments = ["--files", str(folder), "--allow-urls", "--max-request", "1", "--queue", "64"]
    with served.Process(*arguments, token=TOKEN) as process:
        server = process.served
        expected = server.client().chat.completions.create(**valid()).choices[0].message.content
        before = process.memory
        with ThreadPoolExecutor(8) as pool:
            requests = [(kind, kind(chance)) for kind in (kinds[number % len(kinds)] for number in range(COUNT))]
            answers = list(pool.map(lambda one: (one[0], *send(server, *one)), requests))
        assert process.process.poll() is None, "".join(process.lines)
        allowed = with_image(f"file://{folder}/ok.png")
        assert server.client().chat.completions.create(**allowed).choices[0].message.content
        assert server.client().chat.completions.create(**valid()).choices[0].message.content == expected
        print(f"\n{Counter((kind.__name__, status) for kind, status, _ in answers)}")
        print(f"peak memory {before >> 20} MiB before, {process.memory >> 20} MiB after")
        assert process.memory < before + (1 << 30)
        assert "Traceback" not in "".join(process.lines)
    assert len(answers) == COUNT and not canary.visits
    for kind, status, text in answers:
        assert SECRET not in text and "root:" not in text and "import" not in text
        assert status in (0, 200) or 400 <= status < 500, (kind.__name__, status, text)
        if kind.__name__ in ("bad_images", "files", "addresses", "wrong_tokens"):
            assert 400 <= status < 500, (kind.__name__, status, text)
    assert sum(status == 200 for _, status, _ in answers) < COUNT / 10, "most are refused"


def wrong_tokens(random: random.Random) -> str:
    """Return an Authorization header that does not hold the token."""
    return random.choice(
        [
            "",
            "Bearer",
            f"Bearer {TOKEN}x",
            f"Bearer {TOKEN[:-1]}",
            f"Basic {TOKEN}",
            TOKEN,
            "Bearer \xff",
            f"Bearer {TOKEN.upper()}",
            f"Bearer {TOKEN}, Bearer x",
            "Bearer " + "x" * 20_000,
            f"Bearer\t{TOKEN} x",
        ]
    )


def send(server: served.Served, kind: Callable[..., Any], what: Any) -> tuple[int, str]:
    """Send one of the thousand; return the status, 0 if the connection was closed, and the text of the answer."""
    if kind is raw_requests:
        return raw(server, what)
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    content = what if isinstance(what, bytes) else json.dumps(valid() if kind is wrong_tokens else what).encode()
    if kind is wrong_tokens:
        headers["Authorization"] = what.encode("latin-1")
    try:
        answer = server.post(None, content=content, headers=headers)
    except (httpx.RemoteProtocolError, httpx.WriteError, httpx.ReadError):
        return 0, ""
    return answer.status_code, answer.text


def raw(server: served.Served, content: bytes) -> tuple[int, str]:
    port = int(server.url.rstrip("/").rpartition(":")[2])
    received = b""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(3)
        try:
            connection.sendall(content)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                received += part
        except OSError:
            pass
    words = received.split(b" ", 2)
    return int(words[1]) if len(words) > 1 and words[1].isdigit() else 0, received.decode("latin-1")
