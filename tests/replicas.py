"""Fine-tuning runs with two replicas in one process: ``python replicas.py STRATEGY RUNS``.

``mirrored`` uses two logical CPUs, ``multi_worker`` the worker in ``TF_CONFIG``. RUNS is a JSON
list with the flags of ``finetune`` for each run; the runs are sequential.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SCRIPT = Path(__file__)
WAIT_S = 240


def main(strategy: str, runs: str) -> int:
    import tensorflow as tf

    if strategy == "mirrored":
        cpu = tf.config.list_physical_devices("CPU")[0]
        two = [tf.config.LogicalDeviceConfiguration()] * 2
        tf.config.set_logical_device_configuration(cpu, two)
    from recipes import console
    from recipes.cli import app
    from recipes.finetune_request import request
    from transfer.core.distribution import open_replicas
    from transfer.finetuning.run import run

    console.log_to_stderr()

    replicas = open_replicas(strategy)
    assert replicas.count == 2
    for flags in json.loads(runs):
        _, bound, _ = app.parse_args(["finetune", *flags])
        with replicas.watched():
            run(request(bound.arguments["config"], replicas))
    return 0


class Process:
    """A running process whose output goes to a file, so that no pipe can block it."""

    def __init__(
        self,
        *words: object,
        environment: dict[str, str] | None = None,
        cores: Sequence[int] | None = None,
    ):
        pinned = [] if cores is None else ["taskset", "--cpu-list", ",".join(map(str, cores))]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed in wait
        self.process = subprocess.Popen(
            [*pinned, sys.executable, *map(str, words)],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            cwd=SCRIPT.parents[1],
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])} | (environment or {}),
        )

    def wait(self) -> tuple[int, str]:
        """Wait for the end; returns exit status and output."""
        try:
            status = self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.process.wait()
        self._output.seek(0)
        with self._output:
            return status, self._output.read()


def start_workers(
    *words: object, cores: Sequence[Sequence[int] | None] = (None, None)
) -> list[Process]:
    """Start two workers of one cluster on this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    hosts = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
    for s in sockets:
        s.close()
    configs = [
        {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": number}}
        for number in range(2)
    ]
    return [
        Process(*words, environment={"TF_CONFIG": json.dumps(config)}, cores=own)
        for config, own in zip(configs, cores, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
