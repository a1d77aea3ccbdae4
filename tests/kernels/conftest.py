"""Every test of this folder runs in triton's interpreter: it is switched on before anything imports triton."""

from __future__ import annotations

from tests.kernels import interpreter

__all__ = ["interpreter"]
