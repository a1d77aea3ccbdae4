"""Many different requests at once, some of whose clients leave: all are answered, nothing is left behind."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from tests.e2e.server import ServerProcess, eventually

NUM_REQUESTS = 60
NUM_CLIENTS = 16


def random_body(rng: random.Random) -> dict[str, Any]:
    """A valid completion request with a few options of every kind."""
    options: dict[str, Any] = {
        "temperature": rng.choice([0, 0.5, 1, 5]),
        "top_p": rng.choice([0.1, 0.9, 1]),
        "top_k": rng.choice([-1, 0, 1, 50]),
        "min_p": rng.choice([0, 0.2]),
        "presence_penalty": rng.choice([-2, 0.5, 2]),
        "frequency_penalty": rng.choice([-2, 0.5, 2]),
        "repetition_penalty": rng.choice([0.5, 1.1, 2]),
        "seed": rng.randrange(-(2**63), 2**63),
        "stop": rng.choice(["a", ["self", "\n"], [" ", "é"]]),
        "stop_token_ids": rng.sample(range(4096), 5),
        "bad_words": ["return", "def f"],
        "ignore_eos": True,
        "min_tokens": 2,
        "logprobs": rng.randrange(6),
        "logit_bias": {str(rng.randrange(4096)): rng.choice([-100, 5]) for _ in range(3)},
        "allowed_token_ids": rng.sample(range(4096), 40),
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "truncate_prompt_tokens": rng.randrange(1, 40),
        "n": rng.randrange(1, 4),
        "echo": True,
        "priority": rng.randrange(-3, 3),
        "cache_salt": rng.choice("ab"),
        "return_token_ids": True,
    }
    chosen = rng.sample(sorted(options), rng.randrange(6))
    prompts: list[Any] = [
        "def f(x):\n    return",
        "x" * rng.randrange(1, 300),
        [rng.randrange(4096) for _ in range(rng.randrange(1, 150))],
    ]
    prompts.append([prompts[0], "class A:\n"])
    return {name: options[name] for name in chosen} | {
        "prompt": rng.choice(prompts),
        "max_tokens": rng.randrange(2, 30),
    }


def ask(server: ServerProcess, seed: int) -> str:
    """What came of request `seed`: whole, streamed, or left."""
    rng = random.Random(seed)
    body = random_body(rng)
    manner = rng.choice(["whole", "streamed", "left"])
    url = f"{server.url}/v1/completions"
    if manner == "whole":
        answer = httpx.post(url, json=body, timeout=60)
        assert answer.status_code == 200, (seed, body, answer.text)
        reasons = {choice["finish_reason"] for choice in answer.json()["choices"]}
        assert reasons <= {"stop", "length"}, (seed, body)
        return manner
    if manner == "left":
        body["max_tokens"] = 1500
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        assert answer.status_code == 200, (seed, body, answer.read())
        if manner == "left":
            next(lines)
        else:
            text = list(lines)
            assert text[-2] == "data: [DONE]", (seed, body, text[-4:])
            assert not any('"error"' in line[:20] for line in text), (seed, body, text[-4:])
    return manner


def test_storm(server: ServerProcess) -> None:
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        manners = list(pool.map(lambda seed: ask(server, seed), range(NUM_REQUESTS)))
    assert set(manners) == {"whole", "streamed", "left"}
    eventually(lambda: server.metric("num_requests_running") == 0 and server.metric("num_requests_waiting") == 0)
    eventually(lambda: server.metric("kv_cache_usage_perc") == 0)
    assert server.get("/load").json() == {"server_load": 0}
    assert server.get("/readyz").status_code == 200
