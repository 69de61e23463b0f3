"""Errors that a client gets, as OpenAI's API writes them."""

from __future__ import annotations

from typing import Any


class RequestError(Exception):
    """A request that is not answered.

    Args:
        message: One sentence: what was given, what is allowed, what to do.
        status: Of HTTP.
        code: For programs.
        param: The field of the request that is at fault.
    """

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.message, self.status, self.code, self.param = " ".join(message.split()), status, code, param

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the response."""
        if self.status == 503:
            return {"Retry-After": "1"}
        return {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the response."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def timed_out(seconds: float) -> RequestError:
    """Return the error of a request that took too long."""
    return RequestError(
        f"the request took longer than the {seconds:g} seconds that are allowed; ask for fewer tokens, or try again",
        status=504,
        code="timeout",
    )
