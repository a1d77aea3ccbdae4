// Products of a few rows with [out, in] weights on the CPU: what every build of cpu_linear_kernel.cc implements.
//
// cpu_linear.cc owns the jax.ffi entry and the threads; the kernel file is compiled once per instruction set and sees a
// range of weight rows at a time.
#pragma once
#include <cstdint>

namespace twinfer {

// y = x w^T. Shapes: x [M, K] float32; w [N, K] float32, or bfloat16 as bits; y [M, N] float32, or bfloat16 as bits.
struct Product {
  const float* x;
  const void* w;
  void* y;
  bool narrow_w, narrow_y;  // bfloat16
  int64_t m, n, k;
};

// Rows [first, last) of w.
using ProductKernel = void (*)(const Product&, int64_t first, int64_t last);
void product_base(const Product&, int64_t, int64_t);
void product_v3(const Product&, int64_t, int64_t);  // AVX2 and FMA
void product_v4(const Product&, int64_t, int64_t);  // AVX-512

}  // namespace twinfer
