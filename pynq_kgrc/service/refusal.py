"""Errors as HTTP answers: status, text, and Retry-After."""

from __future__ import annotations

from pynq_kgrc.errors import DeviceError, KgrcError, ProgramError, VideoError


class Refusal(KgrcError):
    """An error that becomes the answer ``{"error": text}`` with that status.

    Args:
        status: HTTP status, 400 to 599.
        text: what was wrong, which value, what would be accepted.
        retry_after: seconds after which the client may try again; None: trying again is no use.
        close: whether to close the connection, because part of the body was not read.
    """

    def __init__(
        self, status: int, text: str, retry_after: int | None = None, close: bool = False
    ) -> None:
        super().__init__(text)
        self.status, self.text, self.close = status, text, close
        self.headers: dict[str, str] = {}
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)
        if close:
            self.headers["connection"] = "close"
        if status == 401:
            self.headers["www-authenticate"] = "Bearer"


def refusal_of(error: KgrcError) -> Refusal:
    """The HTTP answer for an error of this package."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, VideoError):
        return Refusal(422, str(error))
    if isinstance(error, ProgramError):
        return Refusal(400, str(error))
    if isinstance(error, DeviceError):
        return Refusal(503, f"the device failed: {error}", retry_after=5)
    return Refusal(500, str(error))
