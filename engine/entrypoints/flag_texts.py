"""Help texts, choices and aliases of the flags, by field name. Data only; flags.py builds the options from it."""

from __future__ import annotations

HELP: dict[str, str] = {
    # model
    "model": "Checkpoint: a folder or ORG/NAME on the Hugging Face hub; left out, the toy model of this package.",
    "tokenizer": "Another folder or hub name for the tokenizer.",
    "revision": "Branch, tag or commit of the checkpoint on the hub.",
    "tokenizer_revision": "Branch, tag or commit of the tokenizer on the hub.",
    "hf_token": "Token for private hub repositories; better given as the variable HF_TOKEN.",
    "download_dir": "Where downloads are kept (default: the hub's own cache).",
    "load_format": "How weights are read; dummy makes random ones.",
    "dtype": "Number type of weights and activations.",
    "quantization": "How weights are kept (default: as config.json says); fp8 rounds plain weights at load.",
    "max_model_len": "Most tokens of a request, prompt and output together, or auto: the longest whose KV cache fits, "
    "at most the model's own length (default: auto, and a note where it is shorter).",
    "seed": "Seed of dummy weights.",
    "max_logprobs": "Most logprobs a request may ask for.",
    "skip_tokenizer_init": "Serve token ids only: no text in, no text out.",
    "served_model_name": "Names that the server answers to; the first one is shown.",
    "generation_config": "Where default sampling values come from: auto = the checkpoint, vllm = neutral, or a folder.",
    "chat_template": "A Jinja file that replaces the checkpoint's chat template.",
    "trust_remote_code": "Refused: code of a checkpoint is never run.",
    # cache
    "block_size": "Tokens per KV page.",
    "gpu_memory_utilization": "Share of an accelerator's memory to use.",
    "kv_cache_memory_bytes": "Bytes for the KV cache, instead of what is left.",
    "num_gpu_blocks_override": "Number of KV pages, instead of what fits.",
    "enable_prefix_caching": "Reuse KV pages of equal prefixes.",
    "kv_cache_dtype": "Number type of the KV cache; auto = that of the model; fp8 = fp8_e4m3, half the bytes; "
    "int8_per_token_head: scales beside the codes, jax backend on a TPU or CPU.",
    # schedule
    "max_num_seqs": "Most sequences in one step.",
    "max_num_batched_tokens": "Most tokens in one step.",
    "long_prefill_token_threshold": "Most prompt tokens of one request in a step; 0 = no limit.",
    "scheduling_policy": "Order of waiting requests.",
    "async_scheduling": "Plan a step while the one before it runs.",
    "num_scheduler_steps": "Most decode turns of a step on the device while nothing waits; 1 = off; jax backend.",
    # parallel
    "tensor_parallel_size": "Devices that share every layer.",
    "pipeline_parallel_size": "Devices in a row, each with some layers.",
    "data_parallel_size": "Copies of the model, each on devices of its own.",
    # engine
    "backend": "Framework that runs the model; auto: TPU -> jax, NVIDIA GPU with torch -> torch, else jax.",
    "device": "Kind of device; xla: the torch backend through torch-xla, on what PJRT_DEVICE names.",
    "attention_backend": "Attention of prompts too long for captured steps on a GPU: ours (TRITON_ATTN, auto) or "
    "FlashInfer's, if installed; decode and short prompts always take ours.",
    "batch_invariant": "Bitwise the same tokens and logprobs alone and in any batch, chunked or cached; slower.",
    "executables": "Load programs from this folder of twinfer compile instead of compiling them; jax backend.",
    "log_stats": "Log throughput and cache use now and then.",
    # server
    "host": "Address to listen on. Others than loopback need --api-key or --insecure-no-auth.",
    "port": "TCP port.",
    "uds": "Listen on this UNIX socket instead of TCP.",
    "api_key": "Keys that clients must send (Authorization: Bearer KEY); better given as TWINFER_API_KEY.",
    "insecure_no_auth": "Allow other machines to connect without a key.",
    "root_path": "Path prefix that a proxy in front strips.",
    "allowed_origins": "Origins that browsers may call from (CORS).",
    "ssl_keyfile": "TLS key.",
    "ssl_certfile": "TLS certificate.",
    "uvicorn_log_level": "How much the HTTP server logs.",
    "response_role": "Role of chat answers.",
    "drain_delay": "Seconds after SIGTERM in which new requests are still taken.",
    "drain_timeout": "Seconds that open requests get to end after SIGTERM.",
    "max_open_requests": "Most generations open at once; more are answered 503 with Retry-After.",
    "heartbeat_timeout": "Seconds that the engine may be silent before /readyz says 503; 0 = do not ask it.",
    "disable_docs": "No /docs and /openapi.json.",
}

CHOICES: dict[str, tuple[str, ...]] = {
    "load_format": ("auto", "safetensors", "orbax", "dummy"),
    "dtype": ("auto", "float32", "bfloat16", "float16", "half", "float"),
    "quantization": ("fp8", "compressed-tensors", "awq", "gptq"),
    "kv_cache_dtype": ("auto", "float32", "bfloat16", "float16", "fp8", "fp8_e4m3", "int8_per_token_head"),
    "scheduling_policy": ("fcfs", "priority"),
    "backend": ("auto", "jax", "torch", "fake"),
    "attention_backend": ("auto", "TRITON_ATTN", "FLASHINFER"),
    "device": ("auto", "cpu", "cuda", "gpu", "tpu", "xla"),
    "uvicorn_log_level": ("critical", "error", "warning", "info", "debug", "trace"),
}

ALIASES: dict[str, tuple[str, ...]] = {
    "tensor_parallel_size": ("-tp",),
    "pipeline_parallel_size": ("-pp",),
    "data_parallel_size": ("-dp",),
}

ANY_CASE = frozenset({"attention_backend"})
"""Flags whose choices are taken in upper and lower case."""
HUMAN_NUMBERS = frozenset({"max_model_len", "max_num_batched_tokens", "kv_cache_memory_bytes"})
AUTO_NUMBERS = {"max_model_len": -1}
"""Numbers that may be the word auto, and what that stands for."""

# Well-known flags of vLLM that are not here: flag -> what to do.
UNSUPPORTED: dict[str, str] = {
    "enable-lora": "adapters come with a later release",
    "lora-modules": "adapters come with a later release",
    "speculative-config": "speculation comes with a later release",
    "enable-auto-tool-choice": "tools come with a later release",
    "tool-call-parser": "tools come with a later release",
    "reasoning-parser": "reasoning parsers come with a later release",
    "enable-chunked-prefill": "leave it out: prefill is always chunked",
    "enforce-eager": "leave it out",
    "disable-log-stats": "use --no-log-stats",
    "disable-log-requests": "leave it out: requests are not logged",
    "swap-space": "leave it out: preempted requests are recomputed",
    "api-server-count": "one HTTP process serves one engine today",
    "hf-overrides": "edit config.json instead",
    "distributed-executor-backend": "one device serves one engine today",
}
