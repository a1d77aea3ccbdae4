"""CoreClient in process and in its own process: order, errors, death, privacy, no orphans."""

from __future__ import annotations

import fcntl
import gc
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import zmq

from engine.config import EngineConfig, ModelConfig
from engine.core.client import CoreClient, ProcessClient
from engine.core.in_process import InProcessClient
from engine.core.messages import AddRequest, FromCore, Ping, Reply, RequestFailed, StartupProgress, StepOutputs
from engine.core.sockets import sweep
from engine.errors import EngineDead, StartupError
from engine.params import SamplingParams
from tests.engine.core.echo_core import VOCAB, build

ECHO = "tests.engine.core.echo_core"


def config(kind: str = "") -> EngineConfig:
    return EngineConfig(model=ModelConfig(served_model_name=(kind,)))


def add(key: int, prompt: list[int], max_tokens: int = 4, n: int = 1) -> AddRequest:
    params = SamplingParams(max_tokens=max_tokens, n=n)
    return AddRequest(key, np.array(prompt, "<i4").tobytes(), params, [], [], [])


def collect(client: CoreClient, until: Callable[[list[FromCore]], bool], timeout_s: float = 10) -> list[FromCore]:
    messages: list[FromCore] = []
    deadline = time.monotonic() + timeout_s
    while not until(messages):
        assert time.monotonic() < deadline, messages
        messages += client.receive(0.1)
    return messages


def tokens_of(messages: list[FromCore]) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    for message in messages:
        if isinstance(message, StepOutputs):
            keys, values = np.frombuffer(message.keys, "<i8"), np.frombuffer(message.tokens, "<i4")
            for key, token in zip(keys.tolist(), values.tolist(), strict=True):
                tokens.setdefault(key, []).append(token)
    return tokens


@pytest.fixture(params=["in_process", "process"])
def client(request: pytest.FixtureRequest) -> Iterator[CoreClient]:
    client: CoreClient = InProcessClient(build) if request.param == "in_process" else ProcessClient(ECHO)
    seen: list[StartupProgress] = []
    ready = client.start(config(), Path("x"), seen.append)
    assert ready.vocab_size == VOCAB
    assert [(p.phase, p.done, p.total) for p in seen][-1] == ("weights", 2, 2)
    yield client
    client.close()
    client.close()
    with pytest.raises(EngineDead):
        client.send(Ping(1))


def test_requests_and_calls_are_answered(client: CoreClient) -> None:
    client.send(add(10, [1, 2, 3], n=2))
    client.send(Ping(7))
    client.send(add(20, [13]))
    messages = collect(client, lambda m: len(tokens_of(m).get(10, ())) == 4 and RequestFailed in map(type, m))
    assert tokens_of(messages) == {10: [3, 2, 1, 3], 11: [2, 1, 3, 2]}
    assert Reply(7, True) in messages
    assert [m.key for m in messages if isinstance(m, RequestFailed)] == [20]


def started(kind: str = "") -> ProcessClient:
    client = ProcessClient(ECHO)
    client.start(config(kind), Path("x"))
    return client


def test_failed_start_is_one_line() -> None:
    for kind, text in (
        ("fail", "--dtype: no; use float32"),
        ("bug", "KeyError while starting"),
        ("exit", "killed by SIGKILL; often out of memory"),
    ):
        client = ProcessClient(ECHO)
        with pytest.raises(StartupError) as raised:
            client.start(config(kind), Path("x"))
        assert text in str(raised.value)
        assert "\n" not in str(raised.value)
        assert client.pid is not None
        assert not psutil.pid_exists(client.pid)


def test_kill_is_noticed_within_a_second() -> None:
    client = started()
    client.send(add(1, [1, 2], max_tokens=10**6))
    collect(client, lambda m: len(tokens_of(m)) == 1)
    pid = client.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(EngineDead, match="SIGKILL"):
        while True:
            client.receive(5.0)
    assert time.monotonic() - begun < 1.0
    with pytest.raises(EngineDead):
        client.send(Ping(1))
    client.close()
    assert not psutil.pid_exists(pid)


def test_sending_to_a_core_that_has_died_does_not_block() -> None:
    client = started()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(client.pid)], timeout=2)
    begun = time.monotonic()
    for _ in range(1000):
        client.send(Ping(1))  # nobody has told us yet
    assert time.monotonic() - begun < 1
    with pytest.raises(EngineDead):
        client.receive(1.0)
    client.close()


def test_a_broken_core_says_why() -> None:
    client = started("break at 3")
    client.send(add(1, [1, 2], max_tokens=100))
    messages: list[FromCore] = []
    with pytest.raises(EngineDead, match="RuntimeError in the engine core: a broken invariant"):
        while True:
            messages += client.receive(1.0)
    assert tokens_of(messages) == {1: [2, 1]}, "what came before the failure is not lost"
    client.close()


def test_frames_that_do_not_decode_harm_nobody() -> None:
    client = started()
    socket = client._outbox
    bad = AddRequest(5, b"", SamplingParams(), [], [], [])
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(bad))
    fields[3]["temperature"] = -1.0
    too_large = AddRequest(2**63, b"", SamplingParams(), [], [], [])
    for frame in (
        msgspec.msgpack.encode(too_large),
        b"",
        b"\xc1",
        b"\x93abc",
        os.urandom(100),
        msgspec.msgpack.encode(fields),
        b'{"a": 1}',
    ):
        socket.send(frame)
    client.send(Ping(3))
    messages = collect(client, lambda m: Reply(3, True) in m)
    failed = [m for m in messages if isinstance(m, RequestFailed)]
    assert [m.key for m in failed] == [2**63, 5]
    assert "temperature" in failed[1].message
    client.close()


def test_a_bug_on_admission_ends_one_request() -> None:
    client = started()
    client.send(add(1, [1, 2], max_tokens=20))
    client.send(add(5, [14]))
    messages = collect(client, lambda m: len(tokens_of(m).get(1, ())) == 20)
    assert [(m.key, m.code) for m in messages if isinstance(m, RequestFailed)] == [(5, "engine_error")]
    client.close()


def test_sockets_are_private() -> None:
    client = started()
    folder = client._folder.path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(p.name for p in folder.iterdir()) == ["from_core", "lock", "to_core"]
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in folder.iterdir())
    assert psutil.Process(client.pid).net_connections("inet") == []
    client.close()
    assert not folder.exists()


def test_sigterm_finishes_the_work_first() -> None:
    client = started()
    client.send(add(1, [1, 2], max_tokens=2000))
    messages = collect(client, lambda m: len(tokens_of(m)) == 1)
    assert client.pid is not None
    os.kill(client.pid, signal.SIGTERM)
    with pytest.raises(EngineDead, match="exit code 0"):
        while True:
            messages += client.receive(1.0)
    assert len(tokens_of(messages)[1]) == 2000
    client.close()


PARENT = """
import sys, time
from pathlib import Path
from tests.engine.core.test_client import started, add
client = started()
client.send(add(1, [1, 2], max_tokens=10**9))
print(client.pid, client._folder.path, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_orphan_when_the_parent_dies(how: signal.Signals) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline().split()[0])
    assert psutil.pid_exists(pid)
    parent.send_signal(how)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 3
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the core outlived its parent"
        time.sleep(0.02)


def test_a_dropped_client_takes_its_core_along() -> None:
    client = started()
    pid, folder = client.pid, client._folder.path
    assert pid is not None
    cycle = [client]
    cycle.append(cycle)  # type: ignore[arg-type]
    del client, cycle
    gc.collect()
    deadline = time.monotonic() + 3
    while psutil.pid_exists(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not folder.exists()


def test_folders_of_killed_makers_are_swept(tmp_path: Path) -> None:
    held, dead, fresh, foreign = (tmp_path / name for name in ("twinfer-1", "twinfer-2", "twinfer-3", "other-4"))
    for folder in (held, dead, fresh, foreign):
        folder.mkdir()
        (folder / "lock").touch()
        os.utime(folder, (1, 1))
    os.utime(fresh)
    with (held / "lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([held, fresh, foreign])
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([fresh, foreign])


def test_receive_without_traffic_returns_in_time() -> None:
    client = started()
    begun = time.monotonic()
    assert client.receive(0.05) == []
    assert time.monotonic() - begun < 1
    client.close()
    assert zmq.zmq_version_info() >= (4, 1)
