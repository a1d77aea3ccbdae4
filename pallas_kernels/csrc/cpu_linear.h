// Products of a few rows with [out, in] weights on the CPU: what every build of cpu_linear_kernel.cc implements.
//
// cpu_linear.cc owns the jax.ffi entry and the threads, cpu_layer.cc uses the same kernels within a decoder layer; the
// kernel file is compiled once per instruction set and sees a range of weight rows at a time.
#pragma once
#include <cstdint>

namespace twinfer {

// y = x w^T. Shapes: x [M, K], packed; w [N, K]; y [M, N] float32, its rows y_stride apart.
struct Product {
  const void* x;
  const void* w;
  float* y;
  bool narrow_w;  // bfloat16 as bits, else float32
  int64_t m, k, y_stride;
  bool codes = false;  // w is int8, to be multiplied as what narrow_w says
};

// One build's functions. A packed x holds groups of rows, each as [K / step][rows of the group][step], padded with
// zeros: float32, or bfloat16 where the build multiplies that and the weights are bfloat16.
struct ProductBuild {
  int64_t (*packed_bytes)(int64_t m, int64_t k);
  void (*pack)(const float* x, int64_t m, int64_t k, bool narrow_w, void* packed);  // x [M, K]
  void (*multiply)(const Product&, int64_t first, int64_t last);  // rows [first, last) of w; `first` goes to y[0]
};
extern const ProductBuild product_base;
extern const ProductBuild product_v3;     // AVX2 and FMA
extern const ProductBuild product_v4;     // AVX-512
extern const ProductBuild product_v4dot;  // AVX-512, bfloat16 multiplied as such

// Whether instructions that multiply bfloat16 beat widening it: so on AMD; Intel's take two cycles, as its widened ones.
bool multiplies_bf16_well();

}  // namespace twinfer
