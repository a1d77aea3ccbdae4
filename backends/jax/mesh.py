"""The devices that programs are made for: which they are, how much memory they have, what the runner can do with them.

They are this process's own, or a TPU that is not here, which libtpu compiles for without one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental import topologies

from backends.jax.split import Split
from engine.errors import ConfigError
from engine.runner import Capability, DeviceInfo
from engine.specs.chips import parse_slice
from engine.specs.quant import FORMS
from pallas_kernels.dispatch import NARROW

CAPABILITIES = frozenset(
    {
        Capability.LATE_MASK,
        Capability.MULTI_STEP,
        Capability.PROMPT_LOGPROBS,
        Capability.EXECUTABLES,
        Capability.REPLICAS,
    }
)
PAGE_TOKENS = {"cpu": 64, "gpu": 64, "tpu": 128}
WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
"""What libtpu is told where it only compiles: to ask no cloud service for its host, and to take no lock of a chip."""
HOST_SHARE = 4  # a CPU runner takes a quarter of the free memory: the host is not the engine's alone


@dataclass(frozen=True, slots=True)
class Target:
    """What programs can be made for: devices of this process, or those of a topology that is not here."""

    devices: tuple[jax.Device, ...]
    hbm_bytes: int | None = None  # of a device that cannot be asked

    @property
    def platform(self) -> str:
        return str(self.devices[0].platform)

    def memory(self) -> tuple[int, int]:
        """(total, free) bytes of a device."""
        return memory(self.devices[0]) if self.hbm_bytes is None else (self.hbm_bytes, self.hbm_bytes)

    def split(self, size: int, replicas: int = 1) -> Split:
        """The first devices, `size` a replica. Raises ConfigError."""
        if size * replicas > len(self.devices):
            asked = f"--tensor-parallel-size: {size}"
            if replicas > 1:
                asked = f"--data-parallel-size: {replicas} x --tensor-parallel-size {size}"
            raise ConfigError(
                f"{asked} is more than the {len(self.devices)} devices that jax has ({self.devices[0].device_kind})"
            )
        return Split(self.devices[: size * replicas], replicas)


QUANTIZATION = ("fp8", "compressed-tensors", "awq", "gptq")


def describe(target: Target) -> DeviceInfo:
    device, (total, free) = target.devices[0], target.memory()
    return DeviceInfo(
        kind=device.platform,
        name=device.device_kind if device.platform != "cpu" else "CPU",
        num_devices=len(target.devices),
        memory_bytes=total,
        free_bytes=free,
        capabilities=CAPABILITIES,
        max_in_flight=2,
        page_tokens=PAGE_TOKENS.get(device.platform, 64),
        default_dtype="float32" if device.platform == "cpu" else "bfloat16",
        supported_dtypes=("float32", "bfloat16"),
        kv_dtypes=NARROW if device.platform in ("cpu", "tpu") else (),
        quantization=QUANTIZATION,
        weight_forms=("fp8", "int8", "w4") if device.platform == "tpu" else FORMS,
        bucket_style="pow2",
    )


def stacks_layers(platform: str) -> bool:
    """Whether layers are scanned over stacked weights. XLA:CPU copies each layer's slice out of a stack: not there."""
    return platform == "tpu"


def stacks_norms(platform: str) -> bool:
    """Whether layers' norms lie in stacks: a host takes some 2 us for each array that it calls a GPU's program with."""
    return platform == "gpu"


def memory(device: jax.Device) -> tuple[int, int]:
    """(total, free) bytes of a device; of the host for a CPU."""
    if device.platform == "cpu":
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {name: int(text.split()[0]) for name, text in fields.items()}
        return kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    stats = device.memory_stats() or {}
    total = int(stats.get("bytes_limit", 0))
    return total, total - int(stats.get("bytes_in_use", 0))


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


def local(requested: str) -> Target:
    """The devices of `--device`. Raises ConfigError."""
    return Target(tuple(jax.devices(choose_device(requested).platform)))


def absent_tpu(name: str) -> Target:
    """A TPU slice that is not here, for compiling alone: v6e is one chip, v6e:2x4 eight. Raises ConfigError."""
    wanted = parse_slice("tpu", name)
    if find_spec("libtpu") is None:
        raise ConfigError(f"--tpu: {name!r} needs the compiler of TPUs; install it with pip install 'twinfer[tpu]'")
    for variable, value in WITHOUT_A_TPU.items():
        os.environ.setdefault(variable, value)
    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")
    # one chip of a cube is compiled for as a part of the smallest that libtpu describes
    topology = f"{wanted.chip.name}:{'2x2x1' if wanted.topology == '1x1x1' else wanted.topology}"
    one = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **one).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--tpu: {name!r}: this libtpu does not describe {topology} ({reason})") from error
    return Target(tuple(devices[: wanted.num_devices]), wanted.chip.memory_bytes)


def keep_float32_exact(device: jax.Device, dtype: str) -> None:
    """A GPU multiplies float32 in TF32 unless told otherwise; --dtype float32 means float32."""
    if dtype == "float32" and device.platform == "gpu":
        jax.config.update("jax_default_matmul_precision", "float32")
