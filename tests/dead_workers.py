"""Pytest plugin: if a worker of pytest-xdist is killed, the run fails and ends.

By default pytest-xdist waits forever for a pipe that forked children of the worker keep open. If
the pipe is closed, it runs the test that killed the worker again in the next worker.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import sys
import threading
import time
from typing import Any

import psutil
import pytest

GRACE_S = 10.0  # time for pytest-xdist to report the test and the end of other workers
EXIT_S = 60.0


class Worker:
    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self._children: list[psutil.Process] = []
        self.died_at: float | None = None

    def look(self) -> None:
        try:
            if self._process.status() != psutil.STATUS_ZOMBIE:
                self._children = self._process.children(recursive=True)
                return
        except psutil.NoSuchProcess:
            pass
        if self.died_at is None:
            self.died_at = time.monotonic()
        for child in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


class DeadWorkers:
    def __init__(self) -> None:
        self._workers: dict[str, Worker] = {}
        self._running: dict[str, None] = {}
        self._ended = threading.Event()
        self._failure: str | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodeready(self, node: Any) -> None:
        self._workers[node.gateway.id] = Worker(node.gateway._io.popen.pid)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object | None) -> None:
        if error is None:
            self._workers.pop(node.gateway.id, None)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = None

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.pop(nodeid, None)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._failure:
            terminalreporter.write_sep("=", self._failure, red=True)
            for nodeid in self._running:
                terminalreporter.write_line(f"did not finish: {nodeid}", red=True)

    def pytest_unconfigure(self) -> None:
        self._ended.set()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            for name, worker in list(self._workers.items()):
                worker.look()
                if worker.died_at is not None and time.monotonic() - worker.died_at > GRACE_S:
                    self._stop(f"worker {name} was killed")
                    return

    def _stop(self, failure: str) -> None:
        self._failure = failure
        _thread.interrupt_main()
        if not self._ended.wait(EXIT_S):
            print(failure, file=sys.stderr, flush=True)
            os._exit(2)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(DeadWorkers())
