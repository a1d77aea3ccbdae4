// Products of many rows with [out, in] bfloat16 weights: what every build of cpu_gemm_kernel.cc implements.
//
// cpu_gemm.cc owns the jax.ffi entry and the threads; the kernel file is compiled once per instruction set and sees a
// rectangle of the output at a time.
#pragma once
#include <cstdint>

namespace twinfer {

// y = x w^T. Shapes: x [M, K], w [N, K] bfloat16 as bits; y [M, N] float32, or bfloat16 as bits.
struct Gemm {
  const uint16_t* x;
  const uint16_t* w;
  void* y;
  bool narrow_y;  // bfloat16
  int64_t m, n, k;
};

struct Rectangle {  // rows and columns of y, half-open; each begins at a multiple of 32
  int64_t row, row_end, column, column_end;
};

constexpr int64_t kGemmColumns = 128;  // most columns of a rectangle: their weights are packed together

using GemmKernel = void (*)(const Gemm&, const Rectangle&);
void gemm_base(const Gemm&, const Rectangle&);
void gemm_v3(const Gemm&, const Rectangle&);
void gemm_v4(const Gemm&, const Rectangle&);
void gemm_v4dot(const Gemm&, const Rectangle&);  // AVX512_BF16
void gemm_amx(const Gemm&, const Rectangle&);   // AMX_BF16

}  // namespace twinfer
