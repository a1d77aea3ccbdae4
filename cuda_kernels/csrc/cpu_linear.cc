// Products of a few float32 rows with [out, in] weights, on the OpenMP threads of the process (torch's).
//
// The kernel is cpu_linear_kernel.cc of pallas_kernels/csrc, compiled once per instruction set; here are the choice among
// its builds, the packing of x and the pieces of the weight. Called by cuda_kernels/cpu_linear.py through ctypes.
#include "../../pallas_kernels/csrc/cpu_linear.h"

#include <algorithm>
#include <cstdlib>

namespace {

using namespace twinfer;

constexpr int64_t kPieceBytes = 96 << 10;    // weights of a piece: small enough to balance, large enough to stream
constexpr int64_t kInlineBytes = 128 << 10;  // weights below which waking threads costs more than it brings
constexpr int64_t kBlock = 24;               // a multiple of the weight rows of every block of the kernel

const ProductBuild& choose_build() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return product_v4;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? product_v3 : product_base;
}

}  // namespace

// out [rows, outputs] = x [rows, inputs] @ weight [outputs, inputs].T. False, and nothing done, without memory.
extern "C" __attribute__((visibility("default"))) bool twinfer_linear(const float* x, const float* weight, float* out, int64_t rows, int64_t outputs,
                               int64_t inputs) {
  static const ProductBuild& build = choose_build();
  const int64_t bytes = (build.packed_bytes(rows, inputs) + 63) / 64 * 64;
  void* packed = std::aligned_alloc(64, bytes);
  if (!packed) return false;
  build.pack(x, rows, inputs, false, packed);
  const Product product{packed, weight, out, false, rows, inputs, outputs};
  const int64_t piece = std::max<int64_t>(kBlock, kPieceBytes / (inputs * 4) / kBlock * kBlock);
  const bool together = outputs * inputs * 4 * std::max<int64_t>(1, rows / 4) > kInlineBytes;
#pragma omp parallel for schedule(dynamic) if (together)
  for (int64_t first = 0; first < outputs; first += piece) {
    Product part = product;
    part.y += first;
    build.multiply(part, first, std::min(outputs, first + piece));
  }
  std::free(packed);
  return true;
}
