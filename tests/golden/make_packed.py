"""Makes packed.safetensors: 4-bit weights packed and read back by GPTQModel 7.7.0, which transformers calls for both.

Run once with `pip install gptqmodel==7.7.0`; the tests need only the file. Cases: awq, gptq (with and without act
order, format v1, whose zeros are stored less one, and v2). Of each: the packed tensors as a checkpoint has them, and
"weight", f16 [O, I], as the library's own CPU code dequantises them.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors.torch import save_file
from torch import Tensor, nn

INPUTS, OUTPUTS, GROUP, BITS = 128, 32, 32, 4
FILE = Path(__file__).parent / "packed.safetensors"


def rounding(weight: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """(scales, zeros), both [O, G]: the range of each group and output in 16 steps. weight: [O, I]; groups: [I]."""
    scales, zeros = [], []
    for group in range(INPUTS // GROUP):
        part = weight[:, groups == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        scale = ((high - low) / 15).half().float()
        scales.append(scale)
        zeros.append((-low / scale).round())
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def make(kind: str, generator: torch.Generator) -> dict[str, Tensor]:
    groups = torch.arange(INPUTS) // GROUP
    if kind.endswith("act_order"):
        groups = groups[torch.randperm(INPUTS, generator=generator)]
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data.copy_(torch.randn(OUTPUTS, INPUTS, generator=generator) / 8)
    scales, zeros = rounding(linear.weight.data, groups)
    cls = AwqTorchLinear if kind == "awq" else TorchLinear
    packed = cls(
        bits=BITS,
        group_size=GROUP,
        sym=False,
        desc_act=kind.endswith("act_order"),
        in_features=INPUTS,
        out_features=OUTPUTS,
        register_buffers=True,
    )
    packed.pack(linear, scales, zeros, groups.to(torch.int32))
    packed.eval()
    if kind == "awq":
        weight = packed._dequantize_weight_for_inference(torch.empty(0), dtype=torch.float16)
    else:
        weight = packed.dequantize_weight()
        if "v2" not in kind:
            convert_gptq_v2_to_v1_format_module(packed, SimpleNamespace(bits=BITS, pack_dtype=torch.int32))
    names = ("qweight", "qzeros", "scales") + (() if kind == "awq" else ("g_idx",))
    tensors = {name: getattr(packed, name).detach().contiguous() for name in names}
    difference = float((weight.T.float() - linear.weight.data).abs().max())
    assert difference < float(scales.max()), difference  # it is the same weight, rounded
    return {**tensors, "weight": weight.T.contiguous()}


if __name__ == "__main__":
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for kind in ("awq", "gptq", "gptq_act_order", "gptq_v2", "gptq_v2_act_order"):
        tensors |= {f"{kind}.{name}": tensor for name, tensor in make(kind, generator).items()}
    save_file(tensors, FILE)
