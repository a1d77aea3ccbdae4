"""Build pallas_kernels/prebuilt/libtwinfer_cpu-<machine>.so from the C++ files beside this one.

    python pallas_kernels/csrc/build_cpu.py [--output FILE]

The result is shipped, so that nobody needs a compiler to install twinfer. The library carries the digest of the sources
it was made from; a test rebuilds nothing but compares that digest.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
KERNELS = (
    "cpu_attention_kernel.cc",
    "cpu_linear_kernel.cc",
    "cpu_layer_kernel.cc",
)  # compiled once per instruction set
BLOCK_KERNELS = ("cpu_gemm_kernel.cc", "cpu_prefill_kernel.cc")  # these for AMX as well
ENTRIES = ("cpu_attention.cc", "cpu_linear.cc", "cpu_layer.cc", "cpu_gemm.cc", "cpu_isa.cc")
HEADERS = ("vector", "pool", "attention", "linear", "layer", "isa", "block", "gemm", "prefill")
SOURCES = (*(f"cpu_{name}.h" for name in HEADERS), *KERNELS, *BLOCK_KERNELS, *ENTRIES)
BUILDS = {  # name: (lanes, flags)
    "base": (4, ("-march=x86-64-v2",)),
    "v3": (8, ("-march=x86-64-v3",)),
    "v4": (16, ("-march=x86-64-v4",)),
    "v4dot": (16, ("-march=x86-64-v4", "-mavx512bf16", "-DTWINFER_DOT")),
    "amx": (16, ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")),
}


def source_digest() -> str:
    """sha256 over the C++ sources, hex."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((HERE / name).read_bytes())
    return digest.hexdigest()


def library_path() -> Path:
    return HERE.parent / "prebuilt" / f"libtwinfer_cpu-{platform.machine()}.so"


def build(output: Path) -> None:
    """Compile with g++. Raises CalledProcessError."""
    import jax.ffi

    flags = ["-std=c++17", "-O3", "-fPIC", "-fno-exceptions", "-fvisibility=hidden", "-fno-math-errno", "-Wno-psabi"]
    flags += ["-ffunction-sections", "-w", "-isystem", jax.ffi.include_dir()]
    flags += ["-ffp-contract=fast", "-fno-trapping-math"]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for name, (lanes, extra) in BUILDS.items():
            options = [*extra, "-mprefer-vector-width=512", f"-DTWINFER_ISA={name}"]
            for kernel in BLOCK_KERNELS if name == "amx" else KERNELS + BLOCK_KERNELS:
                objects.append(f"{folder}/{kernel}-{name}.o")
                command = ["g++", *flags, *options, f"-DTWINFER_LANES={lanes}", "-c", str(HERE / kernel)]
                subprocess.run([*command, "-o", objects[-1]], check=True)
        source = f'-DTWINFER_SOURCE="{source_digest()}"'
        for entry in ENTRIES:
            objects.append(f"{folder}/{entry}.o")
            command = ["g++", *flags, "-march=x86-64-v2", "-fvisibility=default", source]
            subprocess.run([*command, "-c", str(HERE / entry), "-o", objects[-1]], check=True)
        link = ["g++", "-shared", "-static-libgcc", "-Wl,--gc-sections", "-s"]
        output.parent.mkdir(exist_ok=True)
        subprocess.run([*link, *objects, "-o", str(output)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=library_path())
    args = parser.parse_args()
    build(args.output)
    print(f"{args.output}: {args.output.stat().st_size} bytes, sources {source_digest()[:12]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
