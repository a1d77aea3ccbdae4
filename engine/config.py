"""EngineConfig: what the user chose, in a few small frozen parts. Flag names are the field names with dashes.

No defaults are worked out here: `engine/resolve.py` does that from these values, the ArchSpec and the DeviceInfo.
None means "let resolve choose".
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which checkpoint, and how its numbers are held. model "" is the default model that ships with the package."""

    model: str = ""
    tokenizer: str | None = None
    revision: str | None = None
    tokenizer_revision: str | None = None
    hf_token: str | None = None
    download_dir: str | None = None
    load_format: str = "auto"  # auto | safetensors | orbax | dummy
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16 | half
    quantization: str | None = None  # None = as config.json says; fp8 rounds a plain checkpoint at load
    max_model_len: int | None = None  # -1 (auto): the longest whose KV cache fits, at most the model's
    seed: int = 0
    max_logprobs: int = 20
    skip_tokenizer_init: bool = False
    served_model_name: tuple[str, ...] = ()
    generation_config: str = "auto"  # auto = the checkpoint's; vllm = neutral defaults; or a folder
    chat_template: str | None = None
    trust_remote_code: bool = False  # true is refused: no code of a checkpoint ever runs


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    block_size: int | None = None  # tokens a page
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enable_prefix_caching: bool = True
    kv_cache_dtype: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    long_prefill_token_threshold: int = 0  # most prompt tokens of one request in a step, 0 = no limit
    scheduling_policy: str = "fcfs"  # fcfs | priority
    async_scheduling: bool = True  # plan step n + 1 while step n runs
    num_scheduler_steps: int | None = None  # most decode turns that a step takes on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine needs to start. The server's own settings (host, port, keys) are not in here."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    backend: str = "auto"  # auto | jax | torch | fake
    device: str = "auto"  # auto | cpu | cuda | tpu | xla
    attention_backend: str = "auto"  # auto | TRITON_ATTN | FLASHINFER (attention of long steps on a GPU)
    batch_invariant: bool = False  # a request's tokens and logprobs are bitwise the same alone and in any batch
    executables: str | None = None  # folder that twinfer compile wrote: its programs are loaded, none is compiled
    log_stats: bool = True
