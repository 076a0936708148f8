"""Waiting with a limit, without losing a cancellation.

Before Python 3.12 `asyncio.wait_for` forgets that it was cancelled if what it waits for is done in
the same moment, and whoever was to stop goes on.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")
Result = TypeVar("Result")


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


async def in_order(
    items: AsyncIterator[T], work: Callable[[T], Awaitable[Result]], at_once: int
) -> AsyncGenerator[tuple[T, Result], None]:
    """Each item with the result of its work, in the order of the items, `at_once` at a time.

    An item is taken when there is room for its work. What is still running when the caller leaves,
    or when a work fails, is cancelled.
    """
    running: deque[tuple[T, asyncio.Task[Result]]] = deque()
    try:
        async for item in items:
            running.append((item, asyncio.ensure_future(_awaited(work(item)))))
            if len(running) >= at_once:
                first, task = running[0]
                result = await task
                running.popleft()
                yield first, result
        while running:
            first, task = running[0]
            result = await task
            running.popleft()
            yield first, result
    finally:
        for _, task in running:
            task.cancel()
        await asyncio.gather(*(task for _, task in running), return_exceptions=True)


async def _awaited(work: Awaitable[Result]) -> Result:
    return await work
