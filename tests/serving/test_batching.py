"""Items of concurrent callers are computed in batches; no result is lost or mixed up."""

import asyncio
import threading

import pytest

from transfer.serving.batching import Batcher, QueueFullError


def run(main, **options):
    sizes = []

    def double(items):
        sizes.append(len(items))
        return [2 * item for item in items]

    async def all_of_it():
        batcher = Batcher(options.pop("compute", double), **options)
        async with batcher.running():
            return await main(batcher)

    return asyncio.run(asyncio.wait_for(all_of_it(), 20)), sizes


def test_concurrent_callers_get_their_own_results():
    async def main(batcher):
        return await asyncio.gather(*(batcher([n, n + 0.5]) for n in range(1000)))

    results, sizes = run(main, max_waiting=2000)
    assert results == [[2 * n, 2 * n + 1] for n in range(1000)]
    assert sum(sizes) == 2000 and max(sizes) == 32 and len(sizes) < 100


def test_full_queue_refuses_whole_request():
    async def main(batcher):
        calls = [batcher([1] * 3) for _ in range(4)]
        return await asyncio.gather(*calls, return_exceptions=True)

    results, _ = run(main, max_waiting=10)
    assert [type(result) for result in results] == [list, list, list, QueueFullError]


def test_error_reaches_callers_and_later_batches_are_computed():
    def fail_once(items):
        if "bad" in items:
            raise ZeroDivisionError
        return items

    async def main(batcher):
        with pytest.raises(ZeroDivisionError):
            await batcher(["bad"])
        return await batcher(["good"])

    assert run(main, compute=fail_once)[0] == ["good"]


def test_items_of_cancelled_caller_are_not_computed():
    started, go_on, computed = threading.Event(), threading.Event(), []

    def compute(items):
        started.set()
        go_on.wait(10)
        computed.extend(items)
        return items

    async def main(batcher):
        first = asyncio.create_task(batcher(["first"]))
        await asyncio.to_thread(started.wait, 10)
        cancelled, last = (asyncio.create_task(batcher([name])) for name in ("cancelled", "last"))
        await asyncio.sleep(0)
        cancelled.cancel()
        go_on.set()
        return await asyncio.gather(first, last)

    assert run(main, compute=compute, delay=0)[0] == [["first"], ["last"]]
    assert computed == ["first", "last"]
