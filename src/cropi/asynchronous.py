"""Call asynchronous code from synchronous code."""

from __future__ import annotations

import asyncio
import inspect
import threading
from functools import cache
from typing import Any


def awaited(value: Any) -> Any:
    """The value, or its result if it is awaitable, computed in a loop of this process's own.

    The process has one loop, because clients and locks belong to a loop. An interrupt cancels the work.
    """
    if not inspect.isawaitable(value):
        return value
    future = asyncio.run_coroutine_threadsafe(_result(value), _loop())
    try:
        return future.result()
    finally:
        future.cancel()


async def _result(value: Any) -> Any:
    return await value


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop
