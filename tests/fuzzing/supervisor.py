"""Run worker processes, and replace those that die or hang."""

from __future__ import annotations

import collections
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import psutil
from common import INPUTS_PER_WORKER, Base, Result
from worker import work


class Worker:
    """A worker process, seen from the supervisor."""

    def __init__(self, root: Path, number: int):
        self.root, self.number = root, number
        self.log = root / f"worker-{number}.log"
        self.start()

    def start(self) -> None:
        """Start a new process, which accepts inputs once it has sent ``ready``."""
        context = multiprocessing.get_context("spawn")
        self.connection, far = context.Pipe()
        scratch = self.root / f"scratch-{self.number}"
        scratch.mkdir(exist_ok=True)
        self.process = context.Process(target=work, args=(far, self.log, scratch), daemon=True)
        self.process.start()
        far.close()
        self.ready, self.tried = False, 0
        self.job: tuple[str, int] | None = None
        self.made = ("", "")
        self.stage, self.since, self.memory = "import", time.monotonic(), 0

    def give(self, kind: str, number: int, bases: Sequence[Base]) -> None:
        self.job, self.made = (kind, number), ("", "")
        self.tried += 1
        self.enter("mutate")
        self.connection.send(("input", kind, number, bases))

    def enter(self, stage: str) -> None:
        if stage in ("mutate", "load"):  # memory for making the input does not count
            self.since, self.memory = time.monotonic(), self._rss()
        self.stage = stage

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def ask_where(self) -> None:
        """Make the process write its stack trace to its log."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.3)

    def grown(self) -> int:
        return self._rss() - self.memory

    def log_end(self) -> str:
        """The log of the last input: a fatal error of TensorFlow, or the stack of a hanging
        process."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        text = re.sub(r"\n+Extension modules:.*", "", text)
        text = re.sub(r'\n *File "[^"]*fuzz\.py", line \d+ in.*', "", text, flags=re.DOTALL)
        return text[:4000]

    def _rss(self) -> int:
        try:
            return psutil.Process(self.process.pid).memory_info().rss
        except psutil.Error:
            return 0


class Supervisor:
    """Distributes inputs to workers, and replaces those that die, hang or exceed the memory
    limit."""

    def __init__(self, root: Path, workers: int, seconds: float, megabytes: int):
        self.seconds, self.limit = seconds, megabytes * 2**20
        self.workers = [Worker(root, number) for number in range(workers)]

    def bases(self, root: Path, wild: Path | None) -> list[Base]:
        worker = self.workers[0]
        for message in (None, ("bases", root, wild)):
            if message is not None:
                worker.connection.send(message)
            try:
                _, found = worker.connection.recv()
            except EOFError:
                raise RuntimeError(f"no models to begin with:\n{worker.log_end()}") from None
        worker.ready = True
        return found

    def run(
        self, jobs: Iterable[tuple[str, int]], bases: dict[str, list[Base]]
    ) -> Iterator[Result]:
        waiting = collections.deque(jobs)
        while waiting or any(worker.job for worker in self.workers):
            for worker in self.workers:
                if worker.ready and worker.job is None and waiting:
                    if worker.tried >= INPUTS_PER_WORKER:
                        worker.stop()
                        worker.start()
                        continue
                    kind, number = waiting.popleft()
                    worker.give(kind, number, bases[kind])
            multiprocessing.connection.wait([w.connection for w in self.workers], timeout=0.05)
            for worker in self.workers:
                result = self._look_after(worker)
                if result is not None:
                    yield result

    def _look_after(self, worker: Worker) -> Result | None:
        try:
            while worker.connection.poll():
                order, content = worker.connection.recv()
                if order == "ready":
                    worker.ready = True
                elif order == "stage":
                    worker.enter(content)
                elif order == "made":
                    worker.made = content
                else:
                    worker.job = None
                    return content
        except (EOFError, ConnectionError):
            return self._lost(worker, "crash")
        if worker.job is None:
            if not worker.ready and time.monotonic() - worker.since > 300:
                raise RuntimeError(f"a worker does not start:\n{worker.log_end()}")
            return None
        if worker.grown() > self.limit:
            return self._lost(worker, "memory")
        if time.monotonic() - worker.since > self.seconds:
            return self._lost(worker, "hang")
        return None

    def _lost(self, worker: Worker, outcome: str) -> Result:
        seconds, grown = time.monotonic() - worker.since, max(worker.grown(), 0)
        if outcome != "crash":
            worker.ask_where()
        worker.stop()
        log, job, stage = worker.log_end(), worker.job, worker.stage
        base, mutation = worker.made
        if job is None:
            raise RuntimeError(f"a worker died before it was given anything:\n{log}")
        code = worker.process.exitcode
        message = {
            "crash": f"exit code {code}",
            "hang": f"over {self.seconds:g} s",
            "memory": f"over {self.limit >> 20} MB",
        }[outcome]
        worker.start()
        where = re.search(r"Check failed: .{,60}", log)
        calls = re.findall(r'transfer/(?:\w+/)*(\w+)\.py", line \d+ in (\w+)', log)[::-1]
        place = where[0] if where else " > ".join(f"{file}.{name}" for file, name in calls[:3])
        return Result(
            *job,
            outcome,
            base,
            mutation,
            stage,
            message=message,
            where=place,
            trace=log,
            seconds=seconds,
            growth=grown,
        )

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()
