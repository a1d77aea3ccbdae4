// A rectangle of y = x w^T: its weights are packed once, then 32 rows of x at a time pass over them.
//
// Compiled once per instruction set, see cpu_block.h: sums are float32, rounded once when they are written.
#include <algorithm>
#include <vector>

#include "cpu_block.h"
#include "cpu_gemm.h"

namespace twinfer {
namespace {

// Weights of columns [first, last), packed; columns are filled up to a multiple of 32.
void pack_weights(const Gemm& g, int64_t first, int64_t last, int64_t depth, Cell* panels) {
  for (int64_t n = first; n < round_up(last - first, kSide) + first; n += kPanel, panels += depth * kPanel) {
    const uint16_t* columns[kPanel];
    const int count = int(std::clamp<int64_t>(last - n, 0, kPanel));
    for (int j = 0; j < count; ++j) columns[j] = g.w + (n + j) * g.k;
    pack_columns(columns, count, g.k, depth, panels);
  }
}

// Rows [first, first + 32) of x as cells; rows beyond the last are zero.
void widen_rows(const Gemm& g, int64_t first, int64_t depth, Cell* out) {
  for (int64_t m = first; m < first + kSide; ++m, out += depth) {
    const int64_t n = m < g.m ? g.k : 0;
    const uint16_t* x = g.x + m * g.k;
    for (int64_t k = 0; k < n; ++k)
      if constexpr (kPairs) out[k] = x[k];
      else out[k] = widen(x[k]);
    std::fill(out + n, out + depth, Cell(0));
  }
}

inline void put(Vec v, float* p) { store(p, v); }
inline void put(Vec v, uint16_t* p) {
#ifdef __AVX512BF16__
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, 32);
#else
  for (int i = 0; i < kLanes; ++i) narrow(v[i], p + i);
#endif
}

template <class Y>
inline void write(const float* block, Y* y, int64_t ldy, int rows, int columns) {
  for (int r = 0; r < rows; ++r) {
    int c = 0;
    for (; c + kLanes <= columns; c += kLanes) put(load(block + r * kSide + c), y + r * ldy + c);
    for (; c < columns; ++c) narrow(block[r * kSide + c], y + r * ldy + c);
  }
}

template <class Y>
void multiply(const Gemm& g, const Rectangle& at) {
  const int64_t depth = round_up(g.k, kSide);
  static thread_local std::vector<Cell> room;
  const size_t weights = kGemmColumns * depth, wanted = weights + kSide * depth + 32;
  if (room.size() < wanted) room.resize(wanted);
  Cell* const panels = reinterpret_cast<Cell*>(round_up(reinterpret_cast<int64_t>(room.data()), 64));
  Cell* const copied = panels + weights;
  alignas(64) float sums[kSide * kSide];
  pack_weights(g, at.column, at.column_end, depth, panels);
  const Tiles tiles;
  for (int64_t m = at.row; m < at.row_end; m += kSide) {
    const Cell* x = copied;
    bool direct = false;
    if constexpr (kPairs) {
      direct = depth == g.k && m + kSide <= g.m;
      if (direct) x = g.x + m * g.k;
    }
    if (!direct) widen_rows(g, m, depth, copied);
    for (int64_t n = at.column; n < at.column_end; n += kSide) {
      block<false>(x, depth, panels + (n - at.column) * depth, kPanel * depth, depth, sums, kSide);
      write(sums, static_cast<Y*>(g.y) + m * g.n + n, g.n, int(std::min<int64_t>(kSide, at.row_end - m)),
            int(std::min<int64_t>(kSide, at.column_end - n)));
    }
  }
}

}  // namespace

#define TWINFER_JOIN(a, b) a##b
#define TWINFER_NAME(isa) TWINFER_JOIN(gemm_, isa)
void TWINFER_NAME(TWINFER_ISA)(const Gemm& g, const Rectangle& at) {
  if (g.narrow_y) multiply<uint16_t>(g, at);
  else multiply<float>(g, at);
}

}  // namespace twinfer
