"""A server process started by its command line, as users start it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).resolve().parents[2]
START_S = 180


class ServerProcess:
    """`twinfer serve --port 0 ARGS`, ready when constructed; its URL is read from the line it prints."""

    def __init__(self, args: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self.arguments = tuple(args)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the process
        quiet = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twinfer", "serve", "--port", "0", *args],
            cwd=ROOT,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=os.environ | quiet | (environment or {}),
        )
        self.url = self._wait()
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def _wait(self) -> str:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            found = re.search(r"\| (http://\S+)\n.*curl", self.log(), re.DOTALL)
            if found:
                return found[1]
            assert self.process.poll() is None, self.log()
            time.sleep(0.05)
        self.process.kill()
        raise AssertionError(f"not ready after {START_S} s: {self.log()}")

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def metric(self, name: str, **labels: str) -> float:
        """The value of one sample of /metrics."""
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                if sample.name == f"twinfer:{name}" and labels.items() <= sample.labels.items():
                    return sample.value
        raise AssertionError(f"no metric {name}")

    def core(self) -> psutil.Process:
        """The engine core's process."""
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if "engine.core.process" in " ".join(child.cmdline()):
                return child
        raise AssertionError("no core process")

    def stop(self, sig: signal.Signals = signal.SIGTERM, timeout_s: float = 30) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(sig)
        try:
            return self.process.wait(timeout_s)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it by force if it still runs; its core follows."""
        self.process.kill()
        self.process.wait()
        self.client.close()


def eventually(condition: Any, timeout_s: float = 10) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.02)
