"""Every default and every cross-check, in one pure place: (EngineConfig, ArchSpec, DeviceInfo) -> Resolved.

Called twice by engine/core/start.py: `resolve` before the weights are loaded (shapes, dtypes, buckets), `plan_cache`
after it (page counts, from the bytes that the runner says are left). No I/O, no clock, no environment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.buckets import StepCost, most_turns, resolve_buckets, resolve_cost
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.runner import Capability, DeviceInfo, RunnerConfig, SamplerLimits
from engine.specs.arch import ArchSpec
from engine.specs.cache import INT8_PAGES, CacheLayout, GroupKind, GroupLayout, GroupSpec, PoolLayout, cache_groups
from engine.specs.families.quantization import at_load
from engine.specs.parallel import check_parallel
from engine.specs.quant import Rules
from engine.specs.weights import DTYPE_BYTES

UNIT_TOKENS = 16
DTYPE_SPELLINGS = {"half": "float16", "float": "float32", "fp8": "fp8_e4m3"}
AUTO = -1  # of --max-model-len
MOST_INVARIANT_LOGPROBS = 64  # what the kernel of raw logprobs ranks

TURNS, TURNS_S, MOST_TURNS = 8, 0.02, 64  # of --num-scheduler-steps: at most so many of themselves, in so long
HOST_TURN_ROWS = 4  # of such a step on a CPU: few rows, few programs

GIB = 1 << 30
FLASHINFER_HEAD_SIZES, FLASHINFER_DTYPES = (64, 128, 256), ("bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What the engine runs with, once the shapes are known. `notes` are lines worth telling the user."""

    runner: RunnerConfig
    groups: tuple[GroupSpec, ...]
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    max_model_len_given: bool
    kv_bytes_per_token: int  # of all groups together, on one rank
    notes: tuple[str, ...] = ()


def resolve(config: EngineConfig, arch: ArchSpec, device: DeviceInfo) -> Resolved:
    """Shapes, dtypes and buckets. Raises ConfigError naming the flag, the value and the remedy."""
    refuse_unsupported(config)
    arch, notes = resolve_quantization(config.model.quantization, arch, device)
    dtype = resolve_dtype(config.model.dtype, arch, device)
    kv_dtype = resolve_kv_dtype(config.cache.kv_cache_dtype, dtype, device)
    if config.batch_invariant:
        check_invariant(config, arch, device)
    if config.executables is not None:
        check_executables(config, device)
    attention = resolve_attention(config, arch, device, dtype, kv_dtype)
    max_model_len = resolve_model_len(config.model.max_model_len, arch)
    seqs, batched = resolve_batch(config, device, max_model_len)
    page = resolve_page(config.cache.block_size, device)
    groups, ranks = cache_groups(arch), config.parallel.tensor_parallel_size
    check_tensor(ranks, arch, device)
    check_replicas(config.parallel.data_parallel_size, ranks, device)
    cost = resolve_cost(arch, DTYPE_BYTES[dtype], ranks, device, seqs)
    turns, turn_rows = resolve_turns(config.schedule.num_scheduler_steps, device, cost, seqs)
    row_buckets, token_buckets = resolve_buckets(device, seqs, batched, cost)
    runner = RunnerConfig(
        arch=arch,
        dtype=dtype,
        kv_dtype=kv_dtype,
        max_slots=seqs,
        max_model_len=max_model_len,
        page_tokens=(page,) * len(groups),
        token_buckets=token_buckets,
        row_buckets=row_buckets,
        max_batched_tokens=batched,
        max_in_flight=min(device.max_in_flight, 2) if config.schedule.async_scheduling else 1,
        max_num_steps=turns,
        max_turn_rows=turn_rows,
        sampler_limits=SamplerLimits(max_logprobs=min(config.model.max_logprobs, arch.vocab_size)),
        load_format=config.model.load_format,
        seed=config.model.seed,
        device=config.device,
        attention_backend=attention,
        batch_invariant=config.batch_invariant,
        tensor_size=ranks,
        num_replicas=config.parallel.data_parallel_size,
        executables=config.executables or "",
    )
    return Resolved(
        runner=runner,
        groups=groups,
        max_num_seqs=seqs,
        max_num_batched_tokens=batched,
        max_model_len=max_model_len,
        max_model_len_given=config.model.max_model_len not in (None, AUTO),
        kv_bytes_per_token=sum(g.bytes_per_token(kv_dtype, ranks) for g in groups),
        notes=notes,
    )


def refuse_unsupported(config: EngineConfig) -> None:
    """Options that are known by name and not built yet are refused, never ignored."""
    parallel = config.parallel
    for flag, value in (
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size),
        ("--data-parallel-size", parallel.data_parallel_size),
    ):
        if value < 1:
            raise ConfigError(f"{flag}: {value} is not accepted; expected an integer >= 1")
    if parallel.pipeline_parallel_size > 1:
        raise ConfigError(f"--pipeline-parallel-size: {parallel.pipeline_parallel_size} is not supported yet; use 1")
    if config.model.trust_remote_code:
        raise ConfigError("--trust-remote-code: refused; twinfer never runs code of a checkpoint. Leave it out")
    if config.schedule.scheduling_policy not in ("fcfs", "priority"):
        raise ConfigError(f"--scheduling-policy: {config.schedule.scheduling_policy!r} is not known; fcfs or priority")
    if not 0 < config.cache.gpu_memory_utilization <= 1:
        raise ConfigError(
            f"--gpu-memory-utilization: {config.cache.gpu_memory_utilization} is not accepted; expected > 0 and <= 1"
        )


def check_tensor(size: int, arch: ArchSpec, device: DeviceInfo) -> None:
    """Whether every layer can be split over so many devices of this process."""
    check_parallel(arch, size)
    if size > device.num_devices:
        raise ConfigError(
            f"--tensor-parallel-size: {size} is more than the {device.num_devices} devices that this backend drives "
            f"({device.name}); expected at most {device.num_devices}"
        )


def check_replicas(count: int, ranks: int, device: DeviceInfo) -> None:
    """Whether this backend drives so many copies of the model, each on devices of its own."""
    if count == 1:
        return
    if Capability.REPLICAS not in device.capabilities:
        raise ConfigError(
            f"--data-parallel-size: {count} is not supported by this backend on {device.name}; use --backend jax, or "
            "start a server for each copy"
        )
    if count * ranks > device.num_devices:
        raise ConfigError(
            f"--data-parallel-size: {count} copies of {ranks} devices are more than the {device.num_devices} devices "
            f"that this backend drives ({device.name})"
        )


def resolve_quantization(name: str | None, arch: ArchSpec, device: DeviceInfo) -> tuple[ArchSpec, tuple[str, ...]]:
    """(the architecture with its weights kept as asked for, notes): config.json decides, the flag must agree.

    fp8 on a plain checkpoint rounds its weights at load.
    """
    found = None if arch.quant is None else arch.quant.method
    if name is not None and name != found:
        if found is not None:
            raise ConfigError(f"--quantization: {name!r}, but config.json says {found}; leave the flag out")
        if name != "fp8":
            raise ConfigError(f"--quantization: {name!r} needs a checkpoint made so, this one is plain; fp8 rounds it")
        arch = replace(arch, quant=at_load(name))
    method = name or found
    if method is None:
        return arch, ()
    if method not in device.quantization:
        where = "--quantization" if found is None else "config.json: quantization_config"
        raise ConfigError(f"{where}: {method!r} is not supported by this backend on {device.name}; use --backend torch")
    rules = () if arch.quant is None else arch.quant.rules
    check_forms(rules, device)
    if device.kind == "cpu" and any(quant.scheme != "int8" or quant.act == "none" for _, quant in rules):
        return arch, (f"on a CPU weights of {method} are kept in the activations' type, as large as plain ones",)
    return arch, ()


def check_forms(rules: Rules, device: DeviceInfo) -> None:
    for _, quant in rules:
        if quant.form not in device.weight_forms:
            raise ConfigError(
                f"config.json: quantization_config: weights of {quant.text} are not supported by this backend on "
                f"{device.name} yet; expected {' or '.join(device.weight_forms)}, or --backend torch on a GPU"
            )


def resolve_dtype(name: str, arch: ArchSpec, device: DeviceInfo) -> str:
    """auto: float32 checkpoints stay float32, half-precision ones take the device's own default."""
    name = DTYPE_SPELLINGS.get(name, name)
    if name == "auto":
        name = "float32" if arch.checkpoint_dtype == "float32" else device.default_dtype
    if name not in device.supported_dtypes:
        accepted = ", ".join(("auto", *device.supported_dtypes))
        raise ConfigError(f"--dtype: {name!r} is not supported on {device.name}; one of {accepted}")
    return name


def resolve_kv_dtype(name: str, dtype: str, device: DeviceInfo) -> str:
    """auto: that of the activations."""
    name = dtype if name == "auto" else DTYPE_SPELLINGS.get(name, name)
    known = (*device.supported_dtypes, *device.kv_dtypes)
    if name not in known:
        accepted = ", ".join(("auto", *known))
        elsewhere = "; pages of int8 need --backend jax on a TPU or a CPU" if name == INT8_PAGES else ""
        raise ConfigError(f"--kv-cache-dtype: {name!r} is not supported on {device.name}; one of {accepted}{elsewhere}")
    return name


def resolve_attention(config: EngineConfig, arch: ArchSpec, device: DeviceInfo, dtype: str, kv_dtype: str) -> str:
    """auto, or an implementation of attention that this device has and that takes this model."""
    given = config.attention_backend
    name = "auto" if given.lower() == "auto" else given.upper()
    if name != "auto" and name not in device.attention_backends:
        accepted = ", ".join(("auto", *device.attention_backends))
        raise ConfigError(
            f"--attention-backend: {given!r} is not available on {device.name}; one of {accepted}. Our kernels need "
            "--backend torch on an NVIDIA GPU, FLASHINFER also sm_80 and pip install 'twinfer[flashinfer]'"
        )
    if name != "FLASHINFER":
        return name
    sizes = sorted({layer.mixer.head_size for layer in arch.layers} - set(FLASHINFER_HEAD_SIZES))
    unfit = [
        (config.batch_invariant, "--batch-invariant"),
        (dtype not in FLASHINFER_DTYPES, f"--dtype {dtype}: {' or '.join(FLASHINFER_DTYPES)} is wanted"),
        (kv_dtype != dtype, f"--kv-cache-dtype {kv_dtype}: auto is wanted"),
        (bool(sizes), f"heads of {sizes} values: {FLASHINFER_HEAD_SIZES} are known"),
    ]
    for refused, what in unfit:
        if refused:
            raise ConfigError(f"--attention-backend: {given!r} does not work with {what}; leave one of them out")
    return name


def check_invariant(config: EngineConfig, arch: ArchSpec, device: DeviceInfo) -> None:
    """Raise ConfigError where --batch-invariant cannot hold."""
    if Capability.BATCH_INVARIANT not in device.capabilities:
        raise ConfigError(
            f"--batch-invariant: not supported by this backend on {device.name}; "
            "use --backend torch on an NVIDIA GPU with triton installed, or leave it out"
        )
    if arch.quant is not None:
        raise ConfigError("--batch-invariant: not supported with quantised weights yet; leave one of them out")
    if config.model.max_logprobs > MOST_INVARIANT_LOGPROBS:
        raise ConfigError(
            f"--max-logprobs: {config.model.max_logprobs} is not accepted with --batch-invariant; "
            f"expected at most {MOST_INVARIANT_LOGPROBS}"
        )


def check_executables(config: EngineConfig, device: DeviceInfo) -> None:
    """Raise ConfigError where --executables cannot be followed."""
    if not config.executables:
        raise ConfigError("--executables: '' is not accepted; expected the folder that twinfer compile wrote")
    if Capability.EXECUTABLES not in device.capabilities:
        raise ConfigError(
            f"--executables: not supported by this backend on {device.name}; use --backend jax, or leave it out"
        )
    for flag, value in (
        ("--num-gpu-blocks-override", config.cache.num_gpu_blocks_override),
        ("--kv-cache-memory-bytes", config.cache.kv_cache_memory_bytes),
    ):
        if value is not None:
            raise ConfigError(f"{flag}: {value} does not work with --executables, which fix the KV pages; leave it out")


def resolve_model_len(given: int | None, arch: ArchSpec) -> int:
    """The model's own length, or a shorter one; a longer one is refused: positions would be out of training."""
    if given is None or given == AUTO:
        return arch.max_position
    if not 1 <= given <= arch.max_position:
        raise ConfigError(
            f"--max-model-len: {given} is not accepted; expected 1 .. {arch.max_position} (the model's own) or auto"
        )
    return given


def resolve_batch(config: EngineConfig, device: DeviceInfo, max_model_len: int) -> tuple[int, int]:
    """(max_num_seqs, max_num_batched_tokens)."""
    big = device.memory_bytes >= 70 * GIB
    default_seqs, default_tokens = {
        "cpu": (32, 512),
        "gpu": (1024, 8192) if big else (256, 2048),
        "tpu": (256, 2048),
    }.get(device.kind, (256, 2048))
    seqs = config.schedule.max_num_seqs
    if seqs is None:
        seqs = default_seqs
    if not 1 <= seqs <= 8192:
        raise ConfigError(f"--max-num-seqs: {seqs} is not accepted; expected 1 .. 8192")
    tokens = config.schedule.max_num_batched_tokens
    if tokens is None:
        tokens = max(seqs, min(default_tokens, max(max_model_len, 64)))
    if tokens < seqs:
        raise ConfigError(
            f"--max-num-batched-tokens: {tokens} is less than --max-num-seqs {seqs}; a step must fit one token of each"
        )
    return seqs, tokens


def resolve_turns(given: int | None, device: DeviceInfo, cost: StepCost | None, seqs: int) -> tuple[int, int]:
    """(most decode turns of a step, most rows of such a step): docs/performance.md has the measurements."""
    able = Capability.MULTI_STEP in device.capabilities
    if given is None:
        if not able or cost is None:
            return 1, seqs
        return most_turns(cost, TURNS, TURNS_S), min(seqs, HOST_TURN_ROWS) if device.kind == "cpu" else seqs
    if not 1 <= given <= MOST_TURNS:
        raise ConfigError(f"--num-scheduler-steps: {given} is not accepted; expected 1 .. {MOST_TURNS}")
    if given > 1 and not able:
        raise ConfigError(
            f"--num-scheduler-steps: {given} is not supported by this backend on {device.name}; use --backend jax, or 1"
        )
    return given, seqs


def resolve_page(block_size: int | None, device: DeviceInfo) -> int:
    """Tokens a page: a multiple of the prefix-cache unit."""
    page = device.page_tokens if block_size is None else block_size
    if page < UNIT_TOKENS or page % UNIT_TOKENS:
        raise ConfigError(f"--block-size: {page} is not accepted; expected a multiple of {UNIT_TOKENS}")
    return page


def plan_cache(
    config: EngineConfig, resolved: Resolved, budget_bytes: int, num_pages: tuple[int, ...] | None = None
) -> tuple[CacheLayout, int, tuple[str, ...]]:
    """(layout, max_model_len, notes): page counts from the bytes left for KV.

    The length shrinks to the longest that one request can hold when the user gave none. num_pages: of each pool, where
    executables fix them. Raises ConfigError with the numbers when even that is too little, or when the given length or
    the fixed pages do not fit.
    """
    runner, groups = resolved.runner, resolved.groups
    pool_of, pools = share_pools(groups)
    page = runner.page_tokens[0]
    page_bytes = [g.bytes_per_token(runner.kv_dtype, runner.tensor_size) * page for g in pools]
    override, given = config.cache.num_gpu_blocks_override, config.cache.kv_cache_memory_bytes
    budget = budget_bytes if given is None else given

    def sequences_of(length: int) -> float:
        """How many sequences of a length fit."""
        need = pages_of(resolved, length)
        if num_pages is not None:
            return min((n - 1) / m for n, m in zip(num_pages, need, strict=True))
        if override is not None:
            return override / max(need)
        return (budget - sum(page_bytes)) / sum(n * b for n, b in zip(need, page_bytes, strict=True))

    length, notes = resolved.max_model_len, []
    if sequences_of(length) < 1:
        length = longest_length(resolved, lambda tokens: sequences_of(tokens) >= 1)
        fits, remedy = shortage(config, resolved, budget, length)
        if resolved.max_model_len_given or length < page:
            lower = f"lower --max-model-len to {length}, or " if length >= page else ""
            raise ConfigError(f"{fits}; {lower}{remedy}")
        notes.append(f"{fits}; the model length is {length}")
    need, sequences = pages_of(resolved, length), sequences_of(length)
    if override is None:  # more than this could never be in use, twice over for what the prefix cache keeps
        sequences = min(sequences, 2.0 * resolved.max_num_seqs)
    layout = CacheLayout(
        groups=tuple(GroupLayout(spec=g, pool=pool_of[i], page_tokens=page) for i, g in enumerate(groups)),
        pools=tuple(
            PoolLayout(
                num_pages=max(2, int(need[p] * sequences)) + 1 if num_pages is None else num_pages[p],  # + 1: null page
                page_bytes=page_bytes[p],
                num_layers=len(g.layers),
                num_kv_heads=max(1, g.num_kv_heads // runner.tensor_size),
                head_size=g.head_size,
                page_tokens=page,
            )
            for p, g in enumerate(pools)
        ),
        unit_tokens=UNIT_TOKENS,
        kv_dtype=runner.kv_dtype,
    )
    if num_pages is not None:
        check_fixed_pages(config, layout, budget)
    return layout, length, tuple(notes)


def check_fixed_pages(config: EngineConfig, layout: CacheLayout, budget: int) -> None:
    """Raise ConfigError where memory does not hold the pages that executables were built for."""
    asked = sum(pool.num_pages * pool.page_bytes for pool in layout.pools)
    if asked > budget:
        pages = " + ".join(str(pool.num_pages - 1) for pool in layout.pools)
        fewer = max(1, int((layout.pools[0].num_pages - 1) * budget / asked) - 1)
        raise ConfigError(
            f"--executables: {config.executables} was built for {pages} KV pages, {asked / GIB:.2f} GiB, and "
            f"{budget / GIB:.2f} GiB are left; free memory, or build it again with twinfer compile "
            f"--num-gpu-blocks-override {fewer}"
        )


def longest_length(resolved: Resolved, fits: Callable[[int], bool]) -> int:
    """The longest length, in whole pages and at most the one asked for, that fits; 0 if not even a page does."""
    page = resolved.runner.page_tokens[0]
    pages = range(1, resolved.max_model_len // page + 1)
    return page * bisect_left(pages, True, key=lambda count: not fits(count * page))


def shortage(config: EngineConfig, resolved: Resolved, budget: int, length: int) -> tuple[str, str]:
    """(what does not fit, what to raise). length: the longest that fits."""
    wanted, override = resolved.max_model_len, config.cache.num_gpu_blocks_override
    if config.executables is not None:
        fits = f"the KV pages of {config.executables} hold {length} tokens, --max-model-len is {wanted}"
        return fits, "build the executables again with more pages (--num-gpu-blocks-override)"
    if override is not None:
        need = max(pages_of(resolved, wanted))
        fits = f"{override} pages of KV cache hold {length} tokens, --max-model-len {wanted} needs {need}"
        return fits, f"raise --num-gpu-blocks-override to {need}"
    fits = (
        f"{budget / GIB:.2f} GiB of KV cache hold {length} tokens, "
        f"--max-model-len {wanted} needs {kv_bytes_of(resolved, wanted) / GIB:.2f} GiB"
    )
    return fits, "raise --gpu-memory-utilization or --kv-cache-memory-bytes"


def pages_of(resolved: Resolved, length: int) -> list[int]:
    """Pages of each pool that one sequence of `length` tokens holds at most."""
    pool_of, pools = share_pools(resolved.groups)
    page = resolved.runner.page_tokens[0]
    need = [0] * len(pools)
    chunk = max(resolved.max_num_batched_tokens, resolved.runner.max_in_flight * resolved.runner.max_num_steps)
    for pool, group in zip(pool_of, resolved.groups, strict=True):
        need[pool] += -(-tokens_per_sequence(group, length, chunk, page) // page)
    return need


def kv_bytes_of(resolved: Resolved, length: int) -> int:
    """Bytes of the KV pages of one sequence of `length` tokens, the null pages included."""
    pools, page = share_pools(resolved.groups)[1], resolved.runner.page_tokens[0]
    runner = resolved.runner
    pages = pages_of(resolved, length)
    return sum(
        (n + 1) * g.bytes_per_token(runner.kv_dtype, runner.tensor_size) * page
        for n, g in zip(pages, pools, strict=True)
    )


def share_pools(groups: tuple[GroupSpec, ...]) -> tuple[list[int], list[GroupSpec]]:
    """(pool of each group, one group of each pool): groups whose pages have the same shape share a pool."""
    shapes: list[tuple[int, int, int]] = []
    pools: list[GroupSpec] = []
    pool_of = []
    for group in groups:
        shape = (len(group.layers), group.num_kv_heads, group.head_size)
        if shape not in shapes:
            shapes.append(shape)
            pools.append(group)
        pool_of.append(shapes.index(shape))
    return pool_of, pools


def tokens_per_sequence(group: GroupSpec, max_model_len: int, chunk: int, page: int) -> int:
    """Most tokens of one sequence that a group holds at once."""
    if group.kind is GroupKind.WINDOW and group.window is not None:
        # the window behind the chunk's first token, the chunk, and a page not yet free at each end
        return min(max_model_len, group.window + chunk + 2 * page)
    return max_model_len
