"""The devices of this process: which they are, how much memory they have, what the runner can do with them."""

from __future__ import annotations

from pathlib import Path

import jax

from engine.errors import ConfigError
from engine.runner import Capability, DeviceInfo

CAPABILITIES = frozenset({Capability.LATE_MASK, Capability.PROMPT_LOGPROBS})
PAGE_TOKENS = {"cpu": 64, "gpu": 64, "tpu": 128}
HOST_SHARE = 4  # a CPU runner takes a quarter of the free memory: the host is not the engine's alone


def describe(device: jax.Device) -> DeviceInfo:
    total, free = memory(device)
    return DeviceInfo(
        kind=device.platform,
        name=device.device_kind if device.platform != "cpu" else "CPU",
        num_devices=len(jax.devices()),
        memory_bytes=total,
        free_bytes=free,
        capabilities=CAPABILITIES,
        max_in_flight=2,
        page_tokens=PAGE_TOKENS.get(device.platform, 64),
        default_dtype="float32" if device.platform == "cpu" else "bfloat16",
        supported_dtypes=("float32", "bfloat16"),
        bucket_style="pow2",
    )


def stacks_layers(platform: str) -> bool:
    """Whether layers are scanned over stacked weights. XLA:CPU copies each layer's slice out of a stack: not there."""
    return platform == "tpu"


def memory(device: jax.Device) -> tuple[int, int]:
    """(total, free) bytes of a device; of the host for a CPU."""
    if device.platform == "cpu":
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {name: int(text.split()[0]) for name, text in fields.items()}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    stats = device.memory_stats() or {}
    total = int(stats.get("bytes_limit", 0))
    return total, total - int(stats.get("bytes_in_use", 0))


def devices_of(device: jax.Device, count: int) -> list[jax.Device]:
    """The first `count` devices of the platform of `device`. Raises ConfigError."""
    found = jax.devices(device.platform)
    if count > len(found):
        raise ConfigError(
            f"--tensor-parallel-size: {count} is more than the {len(found)} devices that jax has ({device.device_kind})"
        )
    return found[:count]


def choose_device(requested: str) -> jax.Device:
    """The device of `--device`. jax keeps the platform that it was first used with; after that another is refused."""
    wanted = {"cuda": "gpu"}.get(requested, requested)
    if wanted == "cpu" and not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # no accelerator is opened for a process that does not want it
    device = jax.devices()[0]
    if wanted not in ("auto", device.platform):
        name = {"gpu": "cuda"}.get(wanted, wanted)
        raise ConfigError(
            f"--device: {requested!r} was asked for and jax has {device.platform!r}; set JAX_PLATFORMS={name}"
        )
    return device


def keep_float32_exact(device: jax.Device, dtype: str) -> None:
    """A GPU multiplies float32 in TF32 unless told otherwise; --dtype float32 means float32."""
    if dtype == "float32" and device.platform == "gpu":
        jax.config.update("jax_default_matmul_precision", "float32")
