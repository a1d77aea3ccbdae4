"""Triton's interpreter where there is no GPU: import this before triton.

Four faults of the interpreter of triton 3.6 are mended: it turns one-element arrays to integers as numpy 2.4 no longer
allows, so that `range` over a number read from memory fails; `dot` takes bfloat16 bits for integers; its sums are those
of numpy's BLAS, whose order depends on where in a tile a row stands (OpenBLAS on Zen, 16 rows and more), which it does
not on a GPU; and values become e4m3 by leaving bits out, where a GPU rounds to the nearest.
"""

from __future__ import annotations

import os

import numpy as np
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read where triton is imported first
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_index

    plain_dot = interpreter.InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype.name != "bf16":
            return x
        return interpreter.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), interpreter.tl.float32)

    def dot(self, a, b, d, *rest):
        a, b = wide(a), wide(b)
        if a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return plain_dot(self, a, b, d, *rest)
        total, product = np.zeros_like(d.data), np.empty_like(d.data)
        for column, row in zip(np.ascontiguousarray(a.data.T), b.data, strict=True):  # one order for every element
            np.multiply(column[:, None], row[None, :], out=product)
            total += product
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot

    plain_fp_to_fp = interpreter.InterpreterBuilder.create_fp_to_fp

    def fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar != interpreter.tl.float8e4nv or src.dtype.scalar != interpreter.tl.float32:
            return plain_fp_to_fp(self, src, dst_type, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn).view(torch.uint8)
        return interpreter.TensorHandle(rounded.numpy().reshape(src.data.shape), dst_type.scalar)

    interpreter.InterpreterBuilder.create_fp_to_fp = fp_to_fp
