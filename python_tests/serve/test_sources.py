"""What images may come from, and what they may not."""

from __future__ import annotations

import http.server
import os
import socket
import threading
import time

import pytest

from flexattn_cuda.serve.errors import RequestError
from flexattn_cuda.serve.sources import Sources, is_public

CONTENT = b"an image"


@pytest.fixture
def folder(tmp_path):
    """A folder that is allowed, beside a secret that is not."""
    allowed = tmp_path / "images"
    (allowed / "inside").mkdir(parents=True)
    (allowed / "a b.png").write_bytes(CONTENT)
    (allowed / "inside" / "c.png").write_bytes(CONTENT)
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "images-too").mkdir()
    (tmp_path / "images-too" / "secret.png").write_bytes(b"secret")
    (allowed / "link.png").symlink_to(tmp_path / "secret.png")
    (allowed / "up").symlink_to(tmp_path)
    (allowed / "good-link.png").symlink_to(allowed / "inside" / "c.png")
    (allowed / "loop").symlink_to(allowed / "loop")
    os.mkfifo(allowed / "pipe")
    return allowed


@pytest.mark.parametrize("name", ["a%20b.png", "inside/c.png", "inside/../a b.png", "good-link.png"])
def test_files_inside_the_folder_are_read(folder, name):
    for host in ("", "localhost"):
        assert Sources(1000, files=folder).read(f"file://{host}{folder}/{name}") == CONTENT


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "%2e%2e/secret.png",
        "inside/../../secret.png",
        "..%2fsecret.png",
        "link.png",
        "up/secret.png",
        "../images-too/secret.png",
        "loop",
        "pipe",
        "inside",
        "",
        "no-such.png",
        "a b.png%00.jpg",
        "x" * 5000,
        "x/" * 3000,
    ],
)
def test_nothing_else_is_read_and_all_refusals_are_alike(folder, name):
    begun = time.monotonic()
    with pytest.raises(RequestError) as refused:
        Sources(1000, files=folder).read(f"file://{folder}/{name}")
    assert refused.value.message == "this file is not a readable file inside the folder that the server allows"
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "file://host/etc/passwd",
        "file:etc/passwd",
        "file:///dev/zero",
        "file:///proc/self/environ",
    ],
)
def test_files_elsewhere_are_not_read(folder, url):
    for files in (folder, None):
        with pytest.raises(RequestError):
            Sources(1000, files=files).read(url)


def test_a_file_that_is_too_large_is_refused(folder):
    (folder / "large.png").write_bytes(b"x" * 1001)
    with pytest.raises(RequestError, match="more than 1000 bytes"):
        Sources(1000, files=folder).read(f"file://{folder}/large.png")


@pytest.mark.parametrize(
    "url", ["ftp://a/b", "gopher://a", "/etc/passwd", "", "javascript:1", "data:", "data:image/png;base64,*"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(RequestError):
        Sources(1000, urls=True, private=True).read(url)


# ----------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses(address):
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.1.2.3",
        "10.0.0.1",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "240.0.0.1",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "ff02::1",
        "fec0::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2001:0:1::1",
    ],
)
def test_private_addresses(address):
    assert not is_public(address)


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves what the path asks for."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/to?"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/no" else 200)
        self.end_headers()
        if self.path == "/endless":
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                return
        if self.path == "/slow":
            try:
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.1)
            except OSError:
                return
        self.wfile.write(CONTENT)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web():
    """A web server on a loopback address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()


def test_a_private_address_is_read_with_its_switch_alone(web):
    assert Sources(1000, urls=True, private=True).read(f"{web.url}/a.png") == CONTENT
    for sources, says in ((Sources(1000), "not allowed; send"), (Sources(1000, urls=True), "private address")):
        with pytest.raises(RequestError, match=says):
            sources.read(f"{web.url}/b.png")
    assert web.asked == ["/a.png"]


@pytest.mark.parametrize("host", ["localhost", "0", "0x7f000001", "2130706433", "127.1", "[::1]", "[::ffff:127.0.0.1]"])
def test_other_names_of_a_private_address_are_refused(web, host):
    with pytest.raises(RequestError):
        Sources(1000, urls=True).read(f"http://{host}:{web.server_port}/a.png")
    assert web.asked == []


def test_a_public_address_that_redirects_to_a_private_one_is_refused(web, monkeypatch):
    """A name resolves to what it does once: what was checked is what is connected to."""
    public, resolve, connect = "93.184.216.34", socket.getaddrinfo, socket.create_connection
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda host, *rest, **options: (
            [(2, 1, 6, "", (public, 80))] if host == "public.example" else resolve(host, *rest, **options)
        ),
    )
    reached = []

    def to_the_test_server(address, *rest):
        reached.append(address[0])
        return connect(("127.0.0.1", web.server_port) if address[0] == public else address, *rest)

    monkeypatch.setattr(socket, "create_connection", to_the_test_server)
    sources = Sources(1000, urls=True)
    assert sources.read("http://public.example/a.png") == CONTENT
    assert sources.read("http://public.example/to?/a.png") == CONTENT
    for target in (
        f"{web.url}/b.png",
        "http://169.254.169.254/latest",
        "file:///etc/passwd",
        "gopher://x",
        "http://[::1]/",
    ):
        with pytest.raises(RequestError):
            sources.read(f"http://public.example/to?{target}")
    with pytest.raises(RequestError, match="more than 3 times"):
        sources.read("http://public.example/to?/to?/to?/to?/to?/a.png")
    assert set(reached) == {public}


def test_a_name_with_a_public_and_a_private_address_is_refused(monkeypatch):
    answers = [(2, 1, 6, "", (address, 80)) for address in ("93.184.216.34", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answers)
    with pytest.raises(RequestError, match="private address"):
        Sources(1000, urls=True).read("http://both.example/a.png")


@pytest.mark.parametrize(
    "path, says", [("/endless", "more than 1000 bytes"), ("/slow", "cannot be downloaded"), ("/no", "status 404")]
)
def test_a_download_has_limits(web, path, says):
    begun = time.monotonic()
    with pytest.raises(RequestError, match=says):
        Sources(1000, urls=True, private=True, seconds=1).read(f"{web.url}{path}")
    assert time.monotonic() - begun < 4


@pytest.mark.parametrize(
    "url",
    ["http://", "http://user:pass@127.0.0.1/", "http://a b/", "http://127.0.0.1:99999/", "http://[::1", "http://é/"],
)
def test_a_url_that_is_none_is_refused(url):
    with pytest.raises(RequestError):
        Sources(1000, urls=True, private=True).read(url)


def test_a_download_that_cannot_connect_is_told(web):
    web.server_close()
    with pytest.raises(RequestError, match="cannot be downloaded"):
        Sources(1000, urls=True, private=True, seconds=1).read(f"{web.url}/a.png")
