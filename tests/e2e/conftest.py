"""One server per backend and session, on the default model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.e2e.server import ServerProcess

# few buckets: the JAX server compiles each at start
SMALL = ["--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--drain-timeout", "5"]


@pytest.fixture(scope="session", params=["fake", "jax", "torch"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    process = ServerProcess(["--backend", request.param, *SMALL])
    yield process
    print(process.log()[-4000:])  # shown when a test failed
    assert process.stop() == 0


@pytest.fixture
def start() -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that the test stops; one that a failing test left behind is killed, and its log shown."""
    begun: list[ServerProcess] = []

    def start_server(*args: str, **environment: str) -> ServerProcess:
        begun.append(ServerProcess(args, environment))
        return begun[-1]

    yield start_server
    for process in begun:
        print(process.log()[-4000:])
        process.kill()
