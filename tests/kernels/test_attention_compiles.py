"""The attention kernels compile for sm_80 and sm_90 without a GPU, spill nothing and fit the shared memory."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("triton")

from tests.kernels.compiled import compile_kernels

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
PAGES = {"k_pages": "*bf16", "v_pages": "*bf16", "page_table": "*i32"}
POINTERS = PAGES | {"slots": "*i32", "lengths": "*i32"}
FLOATS = dict.fromkeys(("factor", "cap", "eps", "offset", "k_scale", "v_scale"), "fp32")


def decode(
    arch: int, head: int, new: bool, page: int = 64, window: int = 0, capped: bool = False, sinks: bool = False,
    lanes: int = 16,
):  # fmt: skip
    types = PAGES | FLOATS | {"qkv": "*bf16", "out": "*bf16", "partials": "*fp32", "counters": "*i32"}
    types |= {"table_stride": "i32", "records": "*i32"}
    types |= {"cos": "*fp32", "sin": "*fp32", "q_norm": "*fp32", "k_norm": "*fp32"} if new else {}
    constants = {x: None for x in ("cos", "sin", "q_norm", "k_norm", "sinks") if x not in types}
    if sinks:
        types["sinks"] = "*bf16"
        del constants["sinks"]
    constants |= {
        "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD": head, "BLOCK_H": 1 << (head - 1).bit_length(), "BLOCK_G": lanes,
        "BLOCK_C": 64 if head <= 128 else 32, "BLOCK_Z": 16 if head <= 128 else 8, "GROUP_2": 4,
        "HALF": head // 2 if new else 0, "PAGE": page, "WINDOW": window, "NEW": new,
        "Q_NORM": new, "K_NORM": new, "CAP": capped, "SINKS": sinks, "STAGES": 3,
        "FP16": False, "REQUESTS": int(page == 64 and head == 128), "EARLY": 1, "DEPENDENT": arch >= 90,
    }  # fmt: skip
    return "cuda_kernels.attention_decode", "decode_kernel", types, constants, arch, {"num_warps": 4}


def items(arch: int, new: bool):
    types = dict.fromkeys(("slots", "lengths", "records"), "*i32") | ({} if new else {"rows": "*i32"})
    types |= dict.fromkeys(("num_rows", "budget", "fewest_tiles"), "i32")
    constants = {"NEW": new, "WINDOW": 0 if new else 100, "BLOCK_C": 64, "BLOCK_S": 256} | (
        {"rows": None} if new else {}
    )
    return "cuda_kernels.attention_items", "items_kernel", types, constants, arch, {"num_warps": 4}


def ragged(arch: int, head: int, page: int = 64, window: int = 0, tma: bool = False):
    types = POINTERS | {x: FLOATS[x] for x in ("factor", "cap", "v_scale")}
    types |= {"q": "*bf16", "out": "*bf16", "query_starts": "*i32", "tiles": "*i32", "table_stride": "i32"}
    if tma:
        types |= dict.fromkeys(("k_pages", "v_pages"), f"tensordesc<bf16[64, {head}]>")
    constants = {
        "sinks": None, "NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HEAD": head, "BLOCK_H": 1 << (head - 1).bit_length(),
        "BLOCK_M": 64, "BLOCK_C": 64, "Q_TILE": 16, "PAGE": page, "WINDOW": window,
        "CAP": False, "SINKS": False, "STAGES": 3 if head <= 128 else 2, "TMA": tma, "FP16": False,
    }  # fmt: skip
    return "cuda_kernels.attention_ragged", "ragged_kernel", types, constants, arch, {"num_warps": 4}


def rope(arch: int, num_heads: int = 32):
    types = {"qkv": "*bf16", "q_out": "*bf16", "k_pages": "*fp8e4nv" if arch >= 89 else "*bf16", "write_at": "*i64"}
    types |= {"v_pages": types["k_pages"], "num_tokens": "i32"}
    types |= dict.fromkeys(("cos", "sin", "q_norm", "k_norm"), "*fp32")
    types |= dict.fromkeys(("eps", "offset", "inverse_k_scale", "inverse_v_scale"), "fp32")
    constants = {
        "NUM_HEADS": num_heads, "NUM_KV_HEADS": 8, "HEAD": 128, "BLOCK_H": 128, "HALF": 64, "Q_NORM": True,
        "K_NORM": True, "PAGE": 64, "BLOCK": 8,
    }  # fmt: skip
    return "cuda_kernels.rope_cache", "rope_write_kernel", types, constants, arch, {"num_warps": 2}


def test_kernels_compile():
    kernels = [
        decode(80, 128, True), decode(90, 128, True), decode(90, 128, False, page=48, window=1000),
        decode(80, 128, True, lanes=4), decode(90, 128, True, lanes=4), decode(90, 256, True, capped=True, lanes=4),
        decode(90, 256, True, capped=True), decode(90, 80, True, page=16, sinks=True),
        ragged(80, 128), ragged(90, 128), ragged(90, 128, tma=True), ragged(90, 256, page=16, window=512),
        rope(80), rope(90), rope(90, num_heads=0), items(80, True), items(90, False),
    ]  # fmt: skip
    for (_, name, _, constants, arch, _), done in zip(kernels, compile_kernels(kernels), strict=True):
        assert done["shared"] <= SHARED_BYTES[arch], name
        assert not re.search(r"\b(ld|st)\.local", done["ptx"]), name
        if name == "ragged_kernel" and arch == 90:
            assert "wgmma.mma_async" in done["ptx"]
        if constants.get("DEPENDENT"):
            assert "griddepcontrol.wait" in done["ptx"]
