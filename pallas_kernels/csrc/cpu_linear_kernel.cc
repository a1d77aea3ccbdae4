// A range of weight rows against all rows of x. Each weight comes from memory once, whatever the rows of x (they are
// few), so that a decode step costs the time to stream its weights.
//
// Compiled once per instruction set: -DTWINFER_ISA=base|v3|v4 -DTWINFER_LANES=4|8|16 (floats a vector register).
// R weight rows by M rows of x are accumulated in registers along K, then summed across lanes eight at a time.
#include <algorithm>

#include "cpu_linear.h"
#include "cpu_vector.h"

namespace twinfer {
namespace {

// accumulators that fit beside the loaded weights: AVX-512 has 32 registers, the others 16
constexpr int kAccumulators = kLanes == 16 ? 24 : 8;
constexpr int kBlockRows = 4;  // rows of x in registers; with eight of them gcc spills

template <int R, int M, class W, class Y>
inline void block(const float* x, const W* w, Y* y, int64_t n, int64_t k) {
  constexpr int kSums = (R * M + 7) / 8 * 8;
  Vec acc[kSums] = {};
  const int64_t whole = k / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    Vec weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) weights[r] = load(w + r * k + i);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec value = load(x + m * k + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[m * R + r] += value * weights[r];
    }
  }
  float sums[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 8) sum8(acc + i, sums + i);
  for (int64_t i = whole; i < k; ++i)
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sums[m * R + r] += x[m * k + i] * widen(w[r * k + i]);
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) narrow(sums[m * R + r], y + m * n + r);
}

// R rows of w from `w` on, against M rows of x.
template <int R, class W, class Y>
inline void blocks(int64_t m, const float* x, const W* w, Y* y, int64_t n, int64_t k) {
  for (; m >= kBlockRows; m -= kBlockRows, x += kBlockRows * k, y += kBlockRows * n)
    block<R, kBlockRows>(x, w, y, n, k);
  if (m == 3) block<R, 3>(x, w, y, n, k);
  if (m == 2) block<R, 2>(x, w, y, n, k);
  if (m == 1) block<R, 1>(x, w, y, n, k);
}

// R rows of w at a time: they stay in the nearest cache while the rows of x pass over them.
template <int R, class W, class Y>
void rows(const Product& p, int64_t first, int64_t last) {
  const W* w = static_cast<const W*>(p.w);
  Y* y = static_cast<Y*>(p.y);
  for (; first + R <= last; first += R) blocks<R>(p.m, p.x, w + first * p.k, y + first, p.n, p.k);
  for (; first < last; ++first) blocks<1>(p.m, p.x, w + first * p.k, y + first, p.n, p.k);
}

template <class W, class Y>
void all(const Product& p, int64_t first, int64_t last) {
  if (p.m < 3) rows<std::min(8, kAccumulators / 2), W, Y>(p, first, last);
  else rows<kAccumulators / kBlockRows, W, Y>(p, first, last);
}

}  // namespace

#define TWINFER_JOIN(a, b) a##b
#define TWINFER_NAME(isa) TWINFER_JOIN(product_, isa)
void TWINFER_NAME(TWINFER_ISA)(const Product& p, int64_t first, int64_t last) {
  if (p.narrow_w && p.narrow_y) all<uint16_t, uint16_t>(p, first, last);
  else if (p.narrow_w) all<uint16_t, float>(p, first, last);
  else if (p.narrow_y) all<float, uint16_t>(p, first, last);
  else all<float, float>(p, first, last);
}

}  // namespace twinfer
