// jax.ffi entry of products of many rows with [out, in] bfloat16 weights on the CPU.
//
// The output is taken in rectangles from a shared counter, by this thread and by helpers on XLA's own pool. As in
// cpu_attention.cc this thread only ever waits for pieces that a running helper has taken.
#include "cpu_gemm.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "cpu_isa.h"
#include "cpu_pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace twinfer {
namespace {

constexpr int64_t kPiecesAThread = 4;  // at least, where the output is large enough: threads end at about one time
constexpr int64_t kLeastRows = 128;    // of a rectangle: fewer and packing its weights would cost too much
constexpr int64_t kSide = 32;

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

struct Shared {
  Gemm gemm;
  GemmKernel kernel;
  int64_t rows, columns, across, pieces;  // of a rectangle; rectangles side by side; in all
  std::atomic<int64_t> next{0}, done{0};

  void work() {
    for (;;) {
      const int64_t i = next.fetch_add(1);
      if (i >= pieces) return;
      const int64_t row = i / across * rows, column = i % across * columns;
      kernel(gemm, {row, std::min(gemm.m, row + rows), column, std::min(gemm.n, column + columns)});
      done.fetch_add(1, std::memory_order_release);
    }
  }

  void divide(int64_t threads) {
    const int64_t wanted = kPiecesAThread * threads;
    columns = std::clamp(round_up(gemm.n / wanted, kSide), kSide, kGemmColumns);
    across = (gemm.n + columns - 1) / columns;
    const int64_t down = (wanted + across - 1) / across;
    rows = std::max(kLeastRows, round_up((gemm.m + down - 1) / down, kSide));
    pieces = across * ((gemm.m + rows - 1) / rows);
  }
};

ffi::Error gemm(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
                ffi::Result<ffi::AnyBuffer> y) {
  auto x_dims = x.dimensions(), w_dims = w.dimensions();
  if (x_dims.size() != 2 || w_dims.size() != 2 || x_dims[1] != w_dims[1])
    return ffi::Error::InvalidArgument("x must be [M, K], w [N, K]");
  const bool narrow = y->element_type() == ffi::DataType::BF16;
  if (!narrow && y->element_type() != ffi::DataType::F32)
    return ffi::Error::InvalidArgument("y must be float32 or bfloat16");
  static constexpr GemmKernel kernels[] = {gemm_base, gemm_v3, gemm_v4, gemm_v4dot, gemm_amx};
  auto shared = std::make_shared<Shared>();
  shared->gemm = {static_cast<const uint16_t*>(x.untyped_data()), static_cast<const uint16_t*>(w.untyped_data()),
                  y->untyped_data(), narrow, x_dims[0], w_dims[0], x_dims[1]};
  shared->kernel = kernels[int(chosen_isa())];
  shared->divide(pool.num_threads());
  const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, shared->pieces - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
  shared->work();
  wait_for(shared->done, shared->pieces);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace twinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(twinfer_cpu_gemm, twinfer::gemm,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Arg<ffi::Buffer<ffi::BF16>>()
                                  .Ret<ffi::AnyBuffer>());
