// Products of 32 x 32 blocks: C (+)= A B. The pieces of cpu_gemm_kernel.cc and cpu_prefill_kernel.cc.
//
// Compiled once per instruction set, everything local to each. A is row-major. B is packed in panels of 16 columns, one
// after another, each [depth][16] floats; where the processor multiplies bfloat16, A and B are bfloat16 and a panel is
// [depth / 2][16][2]: two neighbours in depth lie together, as vdpbf16ps and tdpbf16ps take them. The depth is a
// multiple of 32: packing fills up with zeros. C is float32.
#pragma once
#include <immintrin.h>

#include "cpu_vector.h"

namespace twinfer {
namespace {

constexpr int kSide = 32;   // rows and columns of a block, and the step of the depth
constexpr int kPanel = 16;  // columns of a panel

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

#ifdef __AVX512BF16__
typedef uint16_t Cell;  // an element of A or B
#else
typedef float Cell;
#endif
constexpr bool kPairs = sizeof(Cell) == 2;

// The instruction set's state around a run of products on this thread.
struct Tiles {
#ifdef __AMX_BF16__
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
#else
  Tiles() {}
#endif
};

#if defined(__AMX_BF16__)

// c [32][ldc] (+)= a [32][lda] b, b: two panels, `next` elements apart.
template <bool Add>
inline void block(const Cell* a, int64_t lda, const Cell* b, int64_t next, int64_t depth, float* c, int64_t ldc) {
  if constexpr (Add) {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + 16, ldc * 4);
    _tile_loadd(2, c + 16 * ldc, ldc * 4);
    _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 32) {
    _tile_loadd(4, a + k, lda * 2);
    _tile_loadd(6, b + k * kPanel, 64);
    _tile_loadd(7, b + next + k * kPanel, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * lda + k, lda * 2);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + 16, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
}

#else

// Accumulators held in registers: R rows by V vectors, V * kLanes columns. step: elements of b between two vectors.
template <bool Add, int R, int V>
inline void strip(const Cell* a, int64_t lda, const Cell* b, int64_t step, int64_t depth, float* c, int64_t ldc) {
  Vec acc[R][V] = {};
  if constexpr (Add) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = load(c + r * ldc + v * kLanes);
  }
#ifdef __AVX512BF16__
  for (int64_t k = 0; k < depth; k += 2) {
    __m512bh right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + v * step + k * kPanel);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * lda + k, 4);
      const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], left, right[v]);
    }
  }
#else
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) right[v] = load(b + v * step + k * kPanel);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += a[r * lda + k] * right[v];
  }
#endif
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + r * ldc + v * kLanes, acc[r][v]);
}

template <bool Add>
inline void block(const Cell* a, int64_t lda, const Cell* b, int64_t next, int64_t depth, float* c, int64_t ldc) {
  if constexpr (kLanes == kPanel) {
    for (int r = 0; r < kSide; r += 8) strip<Add, 8, 2>(a + r * lda, lda, b, next, depth, c + r * ldc, ldc);
  } else {
    constexpr int kVectors = kPanel / kLanes, kRows = 8 / kVectors;
    for (int half = 0; half < 2; ++half)
      for (int r = 0; r < kSide; r += kRows)
        strip<Add, kRows, kVectors>(a + r * lda, lda, b + half * next, kLanes, depth,
                                    c + r * ldc + half * kPanel, ldc);
  }
}

#endif

// Turns a square of kLanes x kLanes 32-bit lanes in place.
inline void turn_square(Vec* v) {
#pragma GCC unroll 4
  for (int d = kLanes / 2; d; d /= 2) {
    IVec upper, lower;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      upper[i] = i & d ? kLanes + i - d : i;
      lower[i] = i & d ? kLanes + i : i + d;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i)
      if (!(i & d)) {
        const Vec a = v[i], b = v[i + d];
        v[i] = __builtin_shuffle(a, b, upper);
        v[i + d] = __builtin_shuffle(a, b, lower);
      }
  }
}

inline Cell cell(float x) {
  Cell out;
  narrow(x, &out);
  return out;
}

// One panel whose column j is the array columns[j], of which n elements count; columns from count on are zero.
template <class S>
inline void pack_columns(const S* const* columns, int count, int64_t n, int64_t depth, Cell* panel) {
  constexpr int kWide = kPairs ? 2 * kLanes : kLanes;  // elements of a column that a vector takes
  const int64_t whole = n / kWide * kWide;
  for (int j = 0; j < kPanel; j += kLanes)
    for (int64_t k = 0; k < whole; k += kWide) {
      Vec v[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (j + i >= count) v[i] = Vec{};
        else if constexpr (kPairs) v[i] = load(reinterpret_cast<const float*>(columns[j + i] + k));  // bits, moved only
        else v[i] = load(columns[j + i] + k);
      }
      turn_square(v);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i)
        store(reinterpret_cast<float*>(panel + (k + i * (kWide / kLanes)) * kPanel) + j, v[i]);
    }
  constexpr int kPair = kPairs ? 2 : 1;
  for (int64_t k = whole; k < depth; ++k)
    for (int j = 0; j < kPanel; ++j)
      panel[k / kPair * kPair * kPanel + j * kPair + k % kPair] =
          j < count && k < n ? cell(widen(columns[j][k])) : Cell(0);
}

// Panels of matrix whose row k is the array rows[k], of n elements, count rows: [ceil(n / 16)] panels of depth rows.
template <class S>
inline void pack_rows(const S* const* rows, int64_t count, int64_t n, int64_t depth, Cell* panels) {
  for (int64_t h = 0; h < n; h += kPanel, panels += depth * kPanel) {
    if constexpr (kPairs) {
      for (int64_t k = 0; k < depth; k += 2) {
        typedef uint16_t Half __attribute__((vector_size(32), aligned(2)));
        typedef uint32_t Whole __attribute__((vector_size(64), aligned(4)));
        Whole pair{};
        if (k < count) pair = __builtin_convertvector(*reinterpret_cast<const Half*>(rows[k] + h), Whole);
        if (k + 1 < count) pair |= __builtin_convertvector(*reinterpret_cast<const Half*>(rows[k + 1] + h), Whole) << 16;
        *reinterpret_cast<Whole*>(panels + k * kPanel) = pair;
      }
    } else {
      for (int64_t k = 0; k < depth; ++k)
        for (int j = 0; j < kPanel; j += kLanes)
          store(panels + k * kPanel + j, k < count ? load(rows[k] + h + j) : Vec{});
    }
  }
}

}  // namespace
}  // namespace twinfer
