"""A request that is refused: the status, why, and when it may be sent again."""

from __future__ import annotations

from pynq_kgrc.errors import DeviceError, KgrcError, ProgramError, VideoError


class Refusal(KgrcError):
    """Becomes the answer ``{"error": text}`` with that status.

    Args:
        status: of HTTP, 400 to 599.
        text: what was wrong, which value, what would be accepted.
        retry_after: seconds after which it is worth another try; none: never.
        close: whether the connection is of no more use (part of the body was not read).
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
    """How a client hears of an error of this package."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, VideoError):
        return Refusal(422, str(error))
    if isinstance(error, ProgramError):
        return Refusal(400, str(error))
    if isinstance(error, DeviceError):
        return Refusal(503, f"the device did not answer as it should: {error}", retry_after=5)
    return Refusal(500, str(error))
