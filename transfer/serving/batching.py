"""Batches of the items of requests that arrive together."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class QueueFullError(Exception):
    """More items wait than may."""


class Batcher(Generic[Item, Result]):
    """Computes the items of concurrent callers in batches, in the order in which they arrived.

    One batch is computed at a time; what arrives meanwhile forms the next one. Nothing waits for a
    batch to become full, except for ``delay`` seconds.

    Args:
        compute: maps a list of items to as many results; runs in a thread of its own.
        batch_size: maximum number of items per batch.
        max_waiting: maximum number of items that wait.
        delay: time in seconds in which items that arrive together are collected.

    Example:
        >>> import asyncio
        >>> from transfer.serving.batching import Batcher
        >>> async def main():
        ...     batcher = Batcher(lambda items: [f"{x} of {len(items)}" for x in items])
        ...     async with batcher.running():
        ...         return await asyncio.gather(batcher(["a", "b"]), batcher(["c"]))
        >>> asyncio.run(main())
        [['a of 3', 'b of 3'], ['c of 3']]
    """

    def __init__(
        self,
        compute: Callable[[list[Item]], Sequence[Result]],
        *,
        batch_size: int = 32,
        max_waiting: int = 1024,
        delay: float = 0.002,
    ):
        self._compute = compute
        self._batch_size = batch_size
        self.max_waiting = max_waiting
        self._delay = delay
        self._waiting: deque[tuple[Item, asyncio.Future[Result]]] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    async def __call__(self, items: Sequence[Item]) -> list[Result]:
        """The results of some items, in their order.

        Raises:
            QueueFullError: if they would make more than ``max_waiting`` items wait.
        """
        if len(self._waiting) + len(items) > self.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} images wait already")
        loop = asyncio.get_running_loop()
        futures = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        self._arrived.set()
        # A caller that is cancelled cancels its futures, and their items are not computed.
        return list(await asyncio.gather(*futures))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Computes batches within the context. Items that still wait at its end are cancelled."""
        with ThreadPoolExecutor(1, "batches") as thread:
            task = asyncio.create_task(self._run(thread))
            try:
                yield
            finally:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
                for _, future in self._waiting:
                    future.cancel()

    async def _run(self, thread: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            if len(self._waiting) < self._batch_size:
                await asyncio.sleep(self._delay)
            batch: list[tuple[Item, asyncio.Future[Result]]] = []
            while self._waiting and len(batch) < self._batch_size:
                item, future = self._waiting.popleft()
                if not future.done():
                    batch.append((item, future))
            if not self._waiting:
                self._arrived.clear()
            if not batch:
                continue
            futures = [future for _, future in batch]
            try:
                items = [item for item, _ in batch]
                results = await loop.run_in_executor(thread, self._compute, items)
            except asyncio.CancelledError:
                for future in futures:
                    future.cancel()
                raise
            except Exception as error:
                for future in futures:
                    if not future.done():
                        future.set_exception(error)
            else:
                for future, result in zip(futures, results, strict=True):
                    if not future.done():
                        future.set_result(result)
