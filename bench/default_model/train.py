"""Trains the default model on one GPU for a fixed time and keeps the checkpoint that does best on the validation files.

Run second, by hand, after `prepare.py`: `python train.py --work .train --out DIR --seconds 115`. It writes
DIR/model.safetensors (bf16, the names of a Qwen3 checkpoint, head tied to the embedding), DIR/config.json and
DIR/log.jsonl. `evaluate.py` reads them with transformers.
Always true: the learning rate follows elapsed time and reaches zero at its end; the held-out stream is only read
once, after training.

Shapes: B rows, T tokens a row, D hidden, N query heads, K key-value heads, H head size, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MIXTURE = {"lib": 0.45, "tests": 0.33, "chat": 0.22}  # share of the rows of a batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    vocab_size: int = 4096
    hidden_size: int = 256
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 704
    max_len: int = 2048
    rope_theta: float = 10000.0
    rms_eps: float = 1e-6

    def hf_config(self) -> dict[str, object]:
        """config.json in the spelling that both transformers 4 and 5 read."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_len,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "rms_norm_eps": self.rms_eps,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "initializer_range": 0.02,
            "use_cache": True,
            "torch_dtype": "bfloat16",
            "bos_token_id": None,
            "eos_token_id": 2,
            "pad_token_id": 7,
        }


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; x [B, N, T, H], cos and sin [T, H]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = nn.Linear(spec.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(spec.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(spec.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, spec.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(spec.head_dim, eps=spec.rms_eps)
        self.k_norm = nn.RMSNorm(spec.head_dim, eps=spec.rms_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, row_len, _ = x.shape
        q = self.q_norm(self.q_proj(x).view(rows, row_len, -1, self.spec.head_dim)).transpose(1, 2)  # [B, N, T, H]
        k = self.k_norm(self.k_proj(x).view(rows, row_len, -1, self.spec.head_dim)).transpose(1, 2)  # [B, K, T, H]
        v = self.v_proj(x).view(rows, row_len, -1, self.spec.head_dim).transpose(1, 2)
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        groups = self.spec.num_heads // self.spec.num_kv_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(rows, row_len, -1))


class Mlp(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.up_proj = nn.Linear(spec.hidden_size, spec.intermediate_size, bias=False)
        self.down_proj = nn.Linear(spec.intermediate_size, spec.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, spec: Spec, dropout: float) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_eps)
        self.self_attn = Attention(spec)
        self.post_attention_layernorm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_eps)
        self.mlp = Mlp(spec)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class Model(nn.Module):
    """A Qwen3 decoder whose parameter names, behind the prefix `model.`, are those of a Qwen3 checkpoint."""

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: Spec, dropout: float) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(spec.vocab_size, spec.hidden_size)
        self.layers = nn.ModuleList(Layer(spec, dropout) for _ in range(spec.num_layers))
        self.norm = nn.RMSNorm(spec.hidden_size, eps=spec.rms_eps)
        self.dropout = nn.Dropout(dropout)
        inv_freq = spec.rope_theta ** (-torch.arange(0, spec.head_dim, 2).float() / spec.head_dim)
        angles = torch.outer(torch.arange(spec.max_len).float(), inv_freq).repeat(1, 2)  # [T, H]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Outputs to the residual stream start smaller, so that its size does not grow with depth.
                scale = math.sqrt(2 * spec.num_layers) if "o_proj" in name or "down_proj" in name else 1.0
                nn.init.normal_(parameter, std=0.02 / scale if "embed" in name else 0.04 / scale)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Per-token loss in nats, f32 [B, T]; ids and targets i64 [B, T], a negative target costs nothing."""
        row_len = ids.shape[1]
        x = self.dropout(self.embed_tokens(ids))
        for layer in self.layers:
            x = layer(x, self.cos[:row_len], self.sin[:row_len])
        logits = F.linear(self.norm(x), self.embed_tokens.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100).view_as(
            targets
        )


def orthogonalize(updates: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon (K. Jordan, 2024) over a stack of matrices [P, rows, columns]."""
    is_tall = updates.shape[1] > updates.shape[2]
    x = updates.transpose(1, 2) if is_tall else updates
    x = x.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.transpose(1, 2) if is_tall else x).float()


class Muon:
    """Muon over the matrices of the layers, those of one shape stacked, with decoupled weight decay and Adam-sized
    steps.
    """

    def __init__(self, parameters: list[nn.Parameter], compiled: Callable[[Tensor], Tensor]) -> None:
        self.groups: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            self.groups.setdefault(parameter.shape, []).append(parameter)
        self.momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }
        self.orthogonalize = compiled

    @torch.no_grad()
    def step(self, lr: float, weight_decay: float, momentum: float) -> None:
        for shape, group in self.groups.items():
            gradients = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            buffer = self.momenta[shape].lerp_(gradients, 1 - momentum)
            updates = self.orthogonalize(gradients.lerp(buffer, momentum))
            torch._foreach_mul_(group, 1 - lr * weight_decay)
            # 0.2 * sqrt(longer side) gives each entry the size of an Adam step (Liu et al., 2025).
            torch._foreach_add_(group, list(updates.unbind()), alpha=-lr * 0.2 * math.sqrt(max(shape)))


class Sampler:
    """Draws rows from the streams by MIXTURE: chat rows always start at a document, others three times in ten."""

    def __init__(self, work: Path, row_len: int, device: str, seed: int) -> None:
        self.streams = {name: np.load(work / f"{name}.npy") for name in MIXTURE}
        self.tokens = {
            name: torch.from_numpy(stream.astype(np.int32)).to(device) for name, stream in self.streams.items()
        }
        self.starts = {name: np.flatnonzero(stream[: -row_len - 2] == 0) + 1 for name, stream in self.streams.items()}
        self.row_len, self.device, self.rng = row_len, device, np.random.default_rng(seed)

    def batch(self, rows: int) -> tuple[Tensor, Tensor]:
        """ids and targets, i64 [rows, row_len]."""
        windows = []
        counts = self.rng.multinomial(rows, list(MIXTURE.values()))
        for name, count in zip(MIXTURE, counts, strict=True):
            offsets = self.rng.integers(0, len(self.streams[name]) - self.row_len - 1, count)
            at_start = self.rng.random(count) < (1.0 if name == "chat" else 0.3)
            offsets = np.where(at_start, self.rng.choice(self.starts[name], count), offsets)
            index = torch.from_numpy(offsets).to(self.device)[:, None] + torch.arange(
                self.row_len + 1, device=self.device
            )
            windows.append(self.tokens[name][index].long())
        window = torch.cat(windows)
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()


def windows_of(stream: np.ndarray, row_len: int, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Documents cut into rows of one shape; the targets skip padding and every <|endoftext|> (id 0)."""
    ids = np.zeros((0, row_len), dtype=np.int64)
    targets = ids.copy()
    for document in np.split(stream.astype(np.int64), np.flatnonzero(stream == 0))[1:]:
        num_rows = -(-(len(document) - 1) // row_len)
        padded = np.full(num_rows * row_len + 1, -100, dtype=np.int64)
        padded[: len(document)] = document
        ids = np.concatenate([ids, np.maximum(padded[:-1], 0).reshape(-1, row_len)])
        targets = np.concatenate([targets, padded[1:].reshape(-1, row_len)])
    ids = np.concatenate([ids, np.zeros((-len(ids) % rows, row_len), dtype=np.int64)])
    targets = np.concatenate([targets, np.full((len(ids) - len(targets), row_len), -100, dtype=np.int64)])
    for i in range(0, len(ids), rows):
        yield torch.from_numpy(ids[i : i + rows]), torch.from_numpy(targets[i : i + rows])


@torch.no_grad()
def bits_per_byte(model: nn.Module, stream: np.ndarray, num_bytes: int, row_len: int, device: str) -> float:
    """Bits per byte with rows that do not overlap: a quick upper bound of what evaluate.py reports."""
    model.eval()
    nats = 0.0
    for ids, targets in windows_of(stream, row_len, rows=16):
        with torch.autocast(device, dtype=torch.bfloat16):
            nats += float(model(ids.to(device), targets.to(device)).sum())
    model.train()
    return nats / math.log(2) / num_bytes


def lr_scale(progress: float) -> float:
    """Warm-up over 1 % of the time, constant to 35 %, then linear to zero."""
    return min(1.0, (progress + 1e-4) / 0.01, max(0.0, (1 - progress) / 0.65))


def save(model: Model, out: Path) -> None:
    tensors = {
        f"model.{name}": parameter.detach().bfloat16().cpu().contiguous()
        for name, parameter in model.named_parameters()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def train(
    model: Model, forward: Callable[..., Tensor], compiled: Callable[[Tensor], Tensor], args: argparse.Namespace
) -> dict[str, object]:
    device = args.device
    corpus = json.loads((args.work / "corpus.json").read_text())
    val, heldout = np.load(args.work / "val.npy"), np.load(args.work / "heldout.npy")
    sampler = Sampler(args.work, args.row_len, device, args.seed)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    muon = Muon(matrices, compiled)
    others = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [model.embed_tokens.weight], "weight_decay": 0.05},
    ]
    adam = torch.optim.AdamW(others, lr=args.lr, betas=(0.9, 0.95), fused=device == "cuda")

    def loss_of_batch() -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return forward(*sampler.batch(args.rows)).mean()

    loss_of_batch().backward()  # compiles, as do the next two lines; outside the clock
    for momenta in muon.momenta.values():
        muon.orthogonalize(momenta)
    bits_per_byte(forward, val, corpus["val"]["bytes"], args.row_len, device)
    model.zero_grad()
    best, best_step, step, log = math.inf, 0, 0, (args.out / "log.jsonl").open("w")
    next_eval, recent = args.seconds / args.evals, []
    start = time.monotonic()
    while (elapsed := time.monotonic() - start) < args.seconds:
        scale = lr_scale(elapsed / args.seconds)
        loss = loss_of_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(args.lr * scale, args.weight_decay, momentum=min(0.95, 0.85 + step / 3000))
        for group in adam.param_groups:
            group["lr"] = args.lr * scale
        adam.step()
        model.zero_grad(set_to_none=True)
        step += 1
        recent.append(loss.detach())
        if step % 4 == 0:
            loss.item()  # keeps the clock honest: the queue of the device never runs far ahead
        if elapsed >= next_eval or time.monotonic() - start >= args.seconds:
            next_eval += args.seconds / args.evals
            val_bpb = bits_per_byte(forward, val, corpus["val"]["bytes"], args.row_len, device)
            tokens = step * args.rows * args.row_len
            record = {
                "step": step,
                "s": round(elapsed, 1),
                "tokens": tokens,
                "train_nats": round(float(torch.stack(recent).mean()), 4),
                "val_bpb": round(val_bpb, 4),
                "lr_scale": round(scale, 3),
            }
            recent = []
            print(json.dumps(record), file=log, flush=True)
            print(record, flush=True)
            if val_bpb < best:
                best, best_step = val_bpb, step
                save(model, args.out)
    # The shipped weights are the rounded ones: score those.
    model.load_state_dict(
        {
            name.removeprefix("model."): tensor.float()
            for name, tensor in load_file(args.out / "model.safetensors").items()
        }
    )
    heldout_bpb = bits_per_byte(forward, heldout, corpus["heldout"]["bytes"], args.row_len, device)
    return {
        "steps": step,
        "best_step": best_step,
        "best_val_bpb": best,
        "heldout_bpb_quick": heldout_bpb,
        "train_s": args.seconds,
        "tokens": step * args.rows * args.row_len,
        "dropout": args.dropout,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "rows": args.rows,
        "row_len": args.row_len,
        "seed": args.seed,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".train"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=115.0)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--row-len", type=int, default=2048)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.8)
    parser.add_argument("--evals", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    spec = Spec()
    (args.out / "config.json").write_text(json.dumps(spec.hf_config(), indent=2) + "\n")
    model = Model(spec, args.dropout).to(args.device)
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    forward: Callable[..., Tensor] = model
    compiled: Callable[[Tensor], Tensor] = orthogonalize
    if not args.no_compile:
        forward, compiled = torch.compile(model, dynamic=False), torch.compile(orthogonalize, dynamic=False)
    result = train(model, forward, compiled, args)
    (args.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
