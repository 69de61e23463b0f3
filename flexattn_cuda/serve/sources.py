"""The bytes that an image's URL stands for: a data URL or, where the server allows it, a file or a web address."""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import ipaddress
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from flexattn_cuda.serve.errors import RequestError

_REDIRECTS = 3
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Sources:
    """What images may come from.

    Attributes:
        max_bytes: Maximum size of an image file.
        files: Folder that file: URLs may lead into; None: they are refused.
        urls: Whether http(s) URLs are allowed.
        private: Whether those may lead to private addresses.
        seconds: That a download may take.
    """

    max_bytes: int
    files: Path | None = None
    urls: bool = False
    private: bool = False
    seconds: float = 10.0

    def read(self, url: str) -> bytes:
        """Return the file that a URL stands for.

        Raises:
            RequestError: If it is not allowed, cannot be read, or is too large.
        """
        scheme = url.partition(":")[0].lower()
        readers: dict[str, Callable[[str], bytes]] = {
            "data": _inline,
            "file": self._file,
            "http": self._download,
            "https": self._download,
        }
        if scheme not in readers:
            raise _refused("the URL of an image must be a data: URL, or http:, https: or file: where those are allowed")
        return readers[scheme](url)

    # ---------------------------------------------------------------------------------------------------------- files

    def _file(self, url: str) -> bytes:
        if self.files is None:
            raise _refused("files of the server are not allowed; send the image as a data: URL")
        parts = urlsplit(url)
        name = unquote(parts.path)
        # One answer for all that cannot be read: what exists outside of the folder is nobody's business.
        refused = _refused("this file is not a readable file inside the folder that the server allows")
        if parts.netloc not in ("", "localhost") or "\0" in name:
            raise refused
        try:
            path = Path(name).resolve(strict=True)
            if not path.is_relative_to(self.files.resolve()):
                raise refused
            # Without waiting for a named pipe; and the last part of the path is no link any more.
            with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise refused
                return self._limited(file.read(self.max_bytes + 1))
        except (OSError, RuntimeError, ValueError):  # a loop of links, a name that is too long, ...
            raise refused from None

    # -------------------------------------------------------------------------------------------------------- downloads

    def _download(self, url: str) -> bytes:
        if not self.urls:
            raise _refused("web addresses are not allowed; send the image as a data: URL")
        deadline = time.monotonic() + self.seconds
        try:
            for _ in range(_REDIRECTS + 1):
                found = self._fetch(_web_address(url), deadline)
                if isinstance(found, bytes):
                    return found
                url = urljoin(url, found)
        except (OSError, http.client.HTTPException, ValueError):
            raise _refused("the image cannot be downloaded from its URL; send it as a data: URL") from None
        raise _refused(f"the URL of the image redirects more than {_REDIRECTS} times; pass the final one")

    def _fetch(self, parts: SplitResult, deadline: float) -> bytes | str:
        """Return the file at an address, or the address that it redirects to."""
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        connection = _Connection(host, port, self._address(host, port), parts.scheme == "https")
        alarm = threading.Timer(max(0.0, deadline - time.monotonic()), connection.abort)
        alarm.start()
        try:
            path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            connection.request("GET", path, headers={"User-Agent": "flexattn", "Accept": "image/*"})
            response = connection.getresponse()
            if response.status in (301, 302, 303, 307, 308):
                return response.headers.get("Location") or ""
            if response.status != 200:
                raise _refused(f"the URL of the image answers with status {response.status}")
            content = bytearray()
            while len(content) <= self.max_bytes and (chunk := response.read1(_CHUNK)):
                content += chunk
            if connection.aborted:
                raise TimeoutError
            return self._limited(bytes(content))
        finally:
            alarm.cancel()
            connection.close()

    def _address(self, host: str, port: int) -> str:
        """Return an address of a host; what is checked is what is connected to, so that no later answer counts."""
        addresses = [str(one[4][0]) for one in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        allowed = [address for address in addresses if self.private or is_public(address)]
        if not allowed or len(allowed) < len(addresses):
            raise _refused("the URL of the image leads to a private address, which is not allowed")
        return allowed[0]

    def _limited(self, content: bytes) -> bytes:
        if len(content) > self.max_bytes:
            raise _refused(f"the image file has more than {self.max_bytes} bytes; make it smaller", status=413)
        return content


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the internet, also where another is hidden in it."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return is_public(str(ip.ipv4_mapped))
        if ip.sixtofour is not None or ip.teredo is not None or ip in _TRANSLATED or ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses behind a translator


class _Connection(http.client.HTTPConnection):
    """A connection to an address that was checked, for a host by name."""

    def __init__(self, host: str, port: int, address: str, encrypted: bool):
        super().__init__(host, port, timeout=5)
        self._address, self._encrypted = address, encrypted
        self.aborted = False
        self._socket: socket.socket | None = None  # http.client gives its own up as soon as a response begins

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._encrypted:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
        self._socket = self.sock

    def abort(self) -> None:
        """End whatever waits for the other side."""
        self.aborted = True
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


def _web_address(url: str) -> SplitResult:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise _refused("the URL of the image, or one that it redirects to, is not a plain http(s) URL")
    if not url.isascii() or any(character.isspace() for character in url):
        raise _refused("the URL of the image holds characters that must be percent-encoded")
    return parts


def _inline(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise _refused("the data: URL of an image must be data:image/TYPE;base64,DATA")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise _refused("the data: URL of an image is not valid base64") from None


def _refused(message: str, status: int = 400) -> RequestError:
    return RequestError(message, status, code="invalid_image_url" if status == 400 else "image_too_large")
