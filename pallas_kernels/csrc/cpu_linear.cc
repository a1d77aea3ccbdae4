// jax.ffi entry of products of a few rows with [out, in] weights on the CPU.
//
// The rows of the weights are taken in pieces from a shared counter, by this thread and by helpers on XLA's own pool. As
// in cpu_attention.cc this thread only ever waits for pieces that a running helper has taken.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_linear.h"
#include "cpu_pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace twinfer {
namespace {

const ProductBuild& choose_product() {
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && multiplies_bf16_well()) return product_v4dot;
  if (wide) return product_v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return product_v3;
  return product_base;
}

constexpr int64_t kPieceBytes = 96 << 10;    // weights of a piece: small enough to balance, large enough to stream
constexpr int64_t kInlineBytes = 128 << 10;  // weights below which a helper costs more than it brings

struct Shared {
  Product product;
  const ProductBuild* build;
  std::vector<char> packed;
  int64_t n, piece, pieces;
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    for (;;) {
      const int64_t i = next.fetch_add(1);
      if (i >= pieces) return;
      Product part = product;
      part.y += i * piece;
      build->multiply(part, i * piece, std::min(n, (i + 1) * piece));
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

}  // namespace

bool multiplies_bf16_well() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
}

namespace {

bool type_of(ffi::DataType type, bool& narrow) {
  narrow = type == ffi::DataType::BF16;
  return narrow || type == ffi::DataType::F32;
}

ffi::Error linear(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  auto x_dims = x.dimensions(), w_dims = w.dimensions();
  if (x_dims.size() != 2 || w_dims.size() != 2 || x_dims[1] != w_dims[1])
    return ffi::Error::InvalidArgument("x must be [M, K], w [N, K]");
  auto shared = std::make_shared<Shared>();
  Product& p = shared->product;
  bool narrow_x = false;
  p.codes = w.element_type() == ffi::DataType::S8;
  if (!type_of(x.element_type(), narrow_x) || !(p.codes || type_of(w.element_type(), p.narrow_w)))
    return ffi::Error::InvalidArgument("float32 or bfloat16 only, weights int8 as well");
  if (p.codes) p.narrow_w = narrow_x;
  p.m = x_dims[0], p.k = x_dims[1], p.y_stride = shared->n = w_dims[0];
  p.w = w.untyped_data(), p.y = y->typed_data();
  static const ProductBuild& build = choose_product();
  shared->build = &build;
  std::vector<float> widened;  // x as float32, when it came as bfloat16
  const float* from = static_cast<const float*>(x.untyped_data());
  if (narrow_x) {
    widened.resize(p.m * p.k);
    const uint16_t* bits = static_cast<const uint16_t*>(x.untyped_data());
    for (int64_t i = 0; i < p.m * p.k; ++i) {
      const uint32_t word = uint32_t(bits[i]) << 16;
      std::memcpy(&widened[i], &word, 4);
    }
    from = widened.data();
  }
  shared->packed.resize(build.packed_bytes(p.m, p.k) + 64);
  char* room = shared->packed.data();
  room += (64 - reinterpret_cast<uintptr_t>(room) % 64) % 64;
  build.pack(from, p.m, p.k, p.narrow_w, room);
  p.x = room;
  const int64_t row_bytes = p.k * (p.codes ? 1 : p.narrow_w ? 2 : 4);
  shared->piece = std::max<int64_t>(24, kPieceBytes / row_bytes / 24 * 24);  // whole blocks of 8, 6, 4 or 2 rows
  shared->pieces = (shared->n + shared->piece - 1) / shared->piece;
  if (shared->n * row_bytes * std::max<int64_t>(1, p.m / 4) > kInlineBytes) {
    const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, shared->pieces - 1);
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
  }
  shared->work();
  wait_for(shared->done, shared->pieces);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace twinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    twinfer_cpu_linear, twinfer::linear,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Ret<ffi::Buffer<ffi::F32>>());
