"""Waiting with a limit, without losing a cancellation.

Before Python 3.12 `asyncio.wait_for` forgets that it was cancelled if what it waits for is done in
the same moment, and whoever was to stop goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(work: Awaitable[T], seconds: float) -> T:
    """What is awaited, if it comes in time; else it is cancelled.

    Raises:
        asyncio.TimeoutError: it did not.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
    except asyncio.CancelledError:
        stop(task)
        raise
    if not task.done():
        stop(task)
        raise asyncio.TimeoutError
    return task.result()


def stop(task: asyncio.Future[T]) -> None:
    """Cancel a task that nobody waits for; that it failed meanwhile is no news."""
    task.cancel()
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
