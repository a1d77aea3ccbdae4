"""One sampler, four times: the reference, the fake runner's, jax's and torch's give the same tokens for random tables.

Each is given the same raw logits and the same SamplingTable, through its own device tables. Philox is held to the known
answers of Random123 (kat_vectors) first, so that all of them are right and not only equal.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from backends import fake_sampling
from engine.runner import SamplerLimits
from engine.step import OpenedRows
from tests.backends.driver import Sampling, Seq, sampling_table
from tests.reference import philox as reference_philox
from tests.reference import sampler as reference

V = 203  # no multiple of 4 or 32
LIMITS = SamplerLimits()
SLOTS = 64

Masks = Sequence[Sequence[int] | None]
Sampler = Callable[[Sequence[Seq], np.ndarray, Masks], list[int]]

KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def need(framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")


# Philox


def numpy_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    return fake_sampling.philox(np.array(counter, np.uint64), np.array(key, np.uint64)).tolist()


def jax_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    import jax.numpy as jnp

    from backends.jax.sample import philox

    words = philox(tuple(jnp.uint32([c]) for c in counter), (jnp.uint32([key[0]]), jnp.uint32([key[1]])))
    return [int(w[0]) for w in words]


def torch_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    import torch

    from backends.torch.sample import philox

    words = philox(tuple(torch.tensor([c]) for c in counter), (torch.tensor([key[0]]), torch.tensor([key[1]])))
    return [int(w[0]) for w in words]


def plain_philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    a, b, c, d = counter
    return list(reference_philox.philox((a, b, c, d), (key[0], key[1])))


PHILOXES = {"reference": plain_philox, "numpy": numpy_philox, "jax": jax_philox, "torch": torch_philox}


@pytest.mark.parametrize("name", PHILOXES)
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(name: str, counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]) -> None:
    if name in ("jax", "torch"):
        need(name)
    assert PHILOXES[name](counter, key) == list(answer)


@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
def test_random_counters(name: str) -> None:
    if name in ("jax", "torch"):
        need(name)
    rng = random.Random(3)
    for _ in range(20):
        counter, key = [rng.getrandbits(32) for _ in range(4)], [rng.getrandbits(32) for _ in range(2)]
        assert PHILOXES[name](counter, key) == plain_philox(counter, key)


def test_uniforms_stay_inside() -> None:
    """The largest and the smallest draw give finite noise in float32."""
    for word in (0, 2**32 - 1):
        u = np.float32((word >> 9) + 0.5) * np.float32(2.0**-23)
        assert 0 < u < 1 and np.isfinite(-np.log(-np.log(u)))


# noise


def noises() -> dict[str, Callable[[list[int], list[int]], np.ndarray]]:
    def numpy_noise(seeds: list[int], outputs: list[int]) -> np.ndarray:
        return fake_sampling.gumbel(np.array(seeds, np.uint64), np.array(outputs, np.int32), V)

    def words(seeds: list[int]) -> np.ndarray:
        return np.array([[s & 0xFFFFFFFF, s >> 32] for s in seeds], np.uint64)

    def jax_noise(seeds: list[int], outputs: list[int]) -> np.ndarray:
        import jax.numpy as jnp

        from backends.jax.sample import gumbel

        return np.asarray(gumbel(jnp.array(words(seeds).astype(np.uint32)), jnp.array(outputs, jnp.int32), V))

    def torch_noise(seeds: list[int], outputs: list[int]) -> np.ndarray:
        import torch

        from backends.torch.sample import gumbel

        return gumbel(torch.tensor(words(seeds).astype(np.int64)), torch.tensor(outputs), V).numpy()

    return {"numpy": numpy_noise, "jax": jax_noise, "torch": torch_noise}


@pytest.mark.parametrize("name", ["numpy", "jax", "torch"])
def test_noise(name: str) -> None:
    if name in ("jax", "torch"):
        need(name)
    seeds, outputs = [0, 1, 2**63 + 12345, 2**64 - 1], [0, 7, 1, 100_000]
    wanted = [reference_philox.gumbel(s, o, V) for s, o in zip(seeds, outputs, strict=True)]
    np.testing.assert_allclose(noises()[name](seeds, outputs), np.array(wanted), rtol=2e-6, atol=2e-6)


# the whole sampler


def sample_reference(seqs: Sequence[Seq], logits: np.ndarray, masks: Masks) -> list[int]:
    tokens = []
    for seq, x, mask in zip(seqs, logits, masks, strict=True):
        s = seq.sampling
        row = reference.Row(
            temperature=s.temperature, top_p=s.top_p, min_p=s.min_p, top_k=s.top_k, presence=s.presence,
            frequency=s.frequency, repetition=s.repetition, seed=s.seed, min_tokens=s.min_tokens, stop_ids=s.stop_ids,
            bias=s.bias, allowed=s.allowed, bad_words=s.bad_words, prompt=seq.tokens[: seq.num_prompt],
            outputs=seq.outputs, mask=mask,
        )  # fmt: skip
        tokens.append(reference.sample(x, row))
    return tokens


def opened_rows(seqs: Sequence[Seq]) -> OpenedRows:
    slots = np.array([s.slot for s in seqs], np.int32)
    return OpenedRows(slots=slots, generation=slots + 1, num_computed=slots * 0, sampling=sampling_table(seqs))


def mask_of(masks: Masks) -> np.ndarray:
    """bool [B, V]."""
    rows = np.ones((len(masks), V), np.bool_)
    for row, ids in zip(rows, masks, strict=True):
        if ids is not None:
            row[:] = False
            row[list(ids)] = True
    return rows


def sample_fake(seqs: Sequence[Seq], logits: np.ndarray, masks: Masks) -> list[int]:
    tables = fake_sampling.SamplerTables(SLOTS, V)
    opened = opened_rows(seqs)
    tables.open(opened)
    return tables.sample(logits.copy(), opened.slots, mask_of(masks)).tolist()


def sample_jax(seqs: Sequence[Seq], logits: np.ndarray, masks: Masks) -> list[int]:
    import jax
    import jax.numpy as jnp

    from backends.jax import tables as device
    from backends.jax.sample import Sampled, pick
    from backends.jax.updates import open_calls
    from engine.opened import Use, row_uses

    opened = opened_rows(seqs)
    rows, tables = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), device.table_shapes(SLOTS, V, (1,), LIMITS))
    for name, arrays in open_calls(opened, LIMITS, V, SLOTS):
        if name[0] == "open":
            rows, tables = device.open_rows(rows, tables, *map(jnp.asarray, arrays))
        else:
            tables = getattr(device, name[0])(tables, *map(jnp.asarray, arrays))
    uses = Use.MASK
    for i in range(len(seqs)):
        uses |= row_uses(opened.sampling, i)
    bits = np.zeros((len(seqs), -(-V // 32) * 32), np.uint8)
    bits[:, :V] = mask_of(masks)
    packed = np.packbits(bits, axis=1, bitorder="little").view("<u4")
    picked = jax.jit(pick, static_argnames="shape")
    shape = Sampled(block=len(seqs), num_top=0, likely="plain")
    where = jnp.asarray(opened.slots)
    ids = picked(jnp.asarray(logits), where, packed, rows, tables, jnp.int32(int(uses)), shape=shape)
    return np.asarray(ids).tolist()


def sample_torch(seqs: Sequence[Seq], logits: np.ndarray, masks: Masks) -> list[int]:
    import torch

    from backends.torch.sample import pick
    from backends.torch.tables import Tables
    from engine.opened import Use, row_uses

    opened = opened_rows(seqs)
    tables = Tables(SLOTS, (1,), V, LIMITS, torch.device("cpu"))
    tables.open(opened)
    uses = Use.MASK
    for i in range(len(seqs)):
        uses |= row_uses(opened.sampling, i)
    slots = torch.tensor(opened.slots.astype(np.int64))
    return pick(torch.tensor(logits), slots, torch.tensor(mask_of(masks)), tables, uses).tolist()


SAMPLERS: dict[str, Sampler] = {"fake": sample_fake, "jax": sample_jax, "torch": sample_torch}


def random_row(rng: random.Random, slot: int, likely: float) -> Seq:
    """A request with each processor present with probability `likely`."""
    prompt = [rng.randrange(V) for _ in range(rng.randint(1, 30))]
    outputs = [rng.randrange(V) for _ in range(rng.choice([0, 1, 2, 9]))]

    def maybe() -> bool:
        return rng.random() < likely

    row: dict[str, object] = {"seed": rng.getrandbits(64)}
    if rng.random() < 0.7:
        row["temperature"] = rng.choice([0.2, 0.7, 1.0, 2.5])
    for name, values in (
        ("top_p", (0.05, 0.5, 0.9, 0.999)),
        ("min_p", (0.01, 0.2, 1.0)),
        ("top_k", (1, 2, 17, V - 1, V, 10**6)),
        ("presence", (-2.0, 0.5, 2.0)),
        ("frequency", (-1.5, 0.3, 2.0)),
        ("repetition", (0.5, 1.1, 3.0)),
        ("min_tokens", (1, 5, 100)),
    ):
        if maybe():
            row[name] = rng.choice(values)
    if maybe():
        row["stop_ids"] = tuple(rng.sample(range(V), rng.randint(1, 20)))
    if maybe():
        row["bias"] = {v: rng.uniform(-9, 9) for v in rng.sample(range(V), rng.randint(1, 40))}
    if maybe():
        row["allowed"] = tuple(rng.sample(range(V), rng.randint(1, 120)))
    if maybe():
        tail = outputs[-2:]
        words = [(rng.randrange(V),), (*tail, rng.randrange(V)), (prompt[-1], rng.randrange(V)), (1, 2, 3)]
        row["bad_words"] = tuple(w for w in words if w)
    return Seq([*prompt, *outputs], len(prompt), Sampling(**row), slot, 1, [])


def random_logits(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Spread, peaked, nearly equal, tied and partly impossible rows. f32 [rows, V]."""
    x = rng.normal(size=(rows, V)).astype(np.float32) * rng.choice([0.3, 3.0, 10.0], size=(rows, 1)).astype(np.float32)
    for r in range(rows):
        kind = rng.integers(6)
        if kind == 0:
            x[r] = np.round(x[r])  # ties everywhere, at every threshold
        elif kind == 1:
            x[r, rng.integers(V, size=100)] = -np.inf
        elif kind == 2:
            x[r] = -x[r] * x[r] - 1  # all negative: repetition multiplies
        elif kind == 3:
            x[r, : V // 2] = 0.0
            x[r, V // 2 :] = -0.0
    return x


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(("seed", "likely"), [(1, 0.5), (2, 0.15), (3, 0.0), (4, 0.9)])
def test_same_tokens(name: str, seed: int, likely: float) -> None:
    if name in ("jax", "torch"):
        need(name)
    rng = random.Random(seed)
    seqs = [random_row(rng, slot, likely) for slot in rng.sample(range(SLOTS), 48)]
    logits = random_logits(np.random.default_rng(seed), len(seqs))
    masks: Masks = [sorted(rng.sample(range(V), rng.randint(1, V))) if rng.random() < 0.3 else None for _ in seqs]
    wanted = sample_reference(seqs, logits, masks)
    got = SAMPLERS[name](seqs, logits, masks)
    wrong = [(s.sampling, w, g) for s, w, g in zip(seqs, wanted, got, strict=True) if w != g]
    assert not wrong


PROCESSORS = (
    {"top_p": 0.6}, {"min_p": 0.3}, {"top_k": 5}, {"presence": 1.5}, {"frequency": 1.5}, {"repetition": 1.7},
    {"min_tokens": 9, "stop_ids": (0, 1, 2, 50, 51)}, {"bias": {3: 4.0, 77: 2.5}}, {"allowed": tuple(range(0, V, 3))},
    {"bad_words": ((5,), (9, 6))},
)  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_every_pair_of_processors(name: str, temperature: float) -> None:
    """Each processor alone and with each other, greedy and random; one slot after another in one batch."""
    if name in ("jax", "torch"):
        need(name)
    seqs = []
    for i, first in enumerate(PROCESSORS):
        for second in PROCESSORS[i:]:
            sampling = Sampling(temperature=temperature, seed=len(seqs), **(first | second))
            seqs.append(Seq([4, 8, 9, 5, 9], 3, sampling, len(seqs), 1, []))
    assert len(seqs) <= SLOTS
    logits = random_logits(np.random.default_rng(11), len(seqs))
    masks: Masks = [None] * len(seqs)
    assert SAMPLERS[name](seqs, logits, masks) == sample_reference(seqs, logits, masks)


def test_the_distribution_is_the_softmax() -> None:
    """4000 outputs of one row: frequencies within five standard deviations."""
    logits = np.full((1, V), -np.inf, np.float32)
    logits[0, :4] = np.log([0.5, 0.25, 0.2, 0.05])
    tables = fake_sampling.SamplerTables(1, V)
    tables.open(opened_rows([Seq([1], 1, Sampling(temperature=1.0, seed=99), 0, 1, [])]))
    counts = np.zeros(4)
    for _ in range(4000):
        token = tables.sample(logits.copy(), np.zeros(1, np.int32), None)
        counts[token[0]] += 1
        tables.num_outputs += 1
    expected = 4000 * np.array([0.5, 0.25, 0.2, 0.05])
    assert (np.abs(counts - expected) < 5 * np.sqrt(expected)).all()
