// A range of weight rows against all rows of x. Each weight comes from memory once, whatever the rows of x (they are
// few), so that a decode step costs the time to stream its weights.
//
// Compiled once per instruction set: -DTWINFER_ISA=base|v3|v4|v4dot -DTWINFER_LANES=4|8|16 (floats a vector register).
// R weight rows by M rows of x are accumulated in registers along K, then summed across lanes eight at a time. The next
// R rows are asked for meanwhile, line by line: R streams of short rows are more than the hardware's own prefetch sees.
#include <algorithm>

#include "cpu_linear.h"
#include "cpu_vector.h"

namespace twinfer {
namespace {

// A code that is multiplied as bfloat16, which holds it: in the order in which weights of bfloat16 are, so that sums are
// theirs to the bit. Codes as int8_t are multiplied as float32 are.
struct NarrowCode {
  int8_t code;
};
inline float widen(NarrowCode x) { return x.code; }

// One step of an accumulator along K: how many elements, the type that x is packed in, and the place of each element of
// a step in the packed x. Weights of bfloat16 are the halves of 32-bit words: even elements are shifted up, odd ones
// masked, so x has its even elements first.
template <class W>
struct Lane {
  static constexpr int kStep = kLanes;
  using X = float;
  struct Wide {
    Vec w;
  };
  static inline int place(int j) { return j; }
  static inline Wide weight(const W* w) { return {load(w)}; }
  static inline Wide value(const X* x) { return {load(x)}; }
  static inline void add(Vec& acc, const Wide& x, const Wide& w) { acc += x.w * w.w; }
};
#ifdef TWINFER_DOT
template <>
struct Lane<uint16_t> {  // two products a lane in one instruction
  static constexpr int kStep = 2 * kLanes;
  using X = uint16_t;
  using Wide = __m512i;
  static inline int place(int j) { return j; }
  static inline Wide weight(const uint16_t* w) { return _mm512_loadu_si512(w); }
  static inline Wide value(const uint16_t* x) { return _mm512_loadu_si512(x); }
  static inline void add(Vec& acc, const Wide& x, const Wide& w) {
    acc = (Vec)_mm512_dpbf16_ps((__m512)acc, (__m512bh)x, (__m512bh)w);
  }
};
template <>
struct Lane<NarrowCode> : Lane<uint16_t> {
  static inline Wide weight(const NarrowCode* w) {
    const auto* codes = reinterpret_cast<const int8_t*>(w);
    return (Wide)_mm512_cvtne2ps_pbh((__m512)load(codes + kLanes), (__m512)load(codes));
  }
};
#else
template <>
struct Lane<uint16_t> {
  static constexpr int kStep = 2 * kLanes;
  using X = float;
  struct Wide {
    Vec even, odd;
  };
  static inline int place(int j) { return j / 2 + (j & 1) * kLanes; }
  static inline Wide weight(const uint16_t* w) {
    const UVec words = *reinterpret_cast<const UVec*>(w), even = words << 16, odd = words & 0xffff0000u;
    return {reinterpret_cast<const Vec&>(even), reinterpret_cast<const Vec&>(odd)};
  }
  static inline Wide value(const X* x) { return {load(x), load(x + kLanes)}; }
  static inline void add(Vec& acc, const Wide& x, const Wide& w) {
    acc += x.even * w.even;
    acc += x.odd * w.odd;
  }
};
template <>
struct Lane<NarrowCode> : Lane<uint16_t> {
  static inline Wide weight(const NarrowCode* w) {
    HVec bits;
    std::memcpy(&bits, w, sizeof(bits));
    const IVec pairs = (IVec)__builtin_convertvector(bits, UVec);
    return {__builtin_convertvector(pairs << 24 >> 24, Vec), __builtin_convertvector(pairs << 16 >> 24, Vec)};
  }
};
#endif

// AVX-512 has 32 registers for accumulators, weights and a value of x; the others have 16.
constexpr int kMostRows = kLanes == 16 ? 8 : 4;  // rows of x of a group
constexpr int weight_rows(int m) {
  if (kLanes == 16) return m <= 2 ? 8 : m == 4 ? 6 : 3;
  return m == 1 ? 8 : m == 2 ? 4 : 3;
}
// Rows of the group that starts with `left` rows to go: a power of two, padded.
inline int64_t group_rows(int64_t left) {
  int64_t rows = 1;
  while (rows < left && rows < kMostRows) rows *= 2;
  return rows;
}

// `next`: the R weight rows that come after these, or these again at the end of the range. y gets `kept` of M rows.
template <int R, int M, class W>
inline void block(const typename Lane<W>::X* x, const W* w, const W* next, float* y, int64_t y_stride, int64_t k,
                  int64_t kept) {
  using L = Lane<W>;
  constexpr int kSums = (R * M + 7) / 8 * 8;
  Vec acc[kSums] = {};
  const int64_t whole = k / L::kStep * L::kStep;
  for (int64_t i = 0; i < whole; i += L::kStep, x += M * L::kStep) {
    typename L::Wide weights[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      weights[r] = L::weight(w + r * k + i);
      if (sizeof(W) > 1 || i % 64 == 0) __builtin_prefetch(next + r * k + i, 0, 2);  // codes: 64 a line
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const auto value = L::value(x + m * L::kStep);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) L::add(acc[m * R + r], value, weights[r]);
    }
  }
  float sums[kSums];
#pragma GCC unroll 8
  for (int i = 0; i < kSums; i += 8) sum8(acc + i, sums + i);
  for (int64_t i = whole; i < k; ++i)
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) sums[m * R + r] += widen(x[m * L::kStep + L::place(i - whole)]) * widen(w[r * k + i]);
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m) {
    if (m >= kept) break;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) y[m * y_stride + r] = sums[m * R + r];
  }
}

template <int R, int M, class W>
inline void rows(const typename Lane<W>::X* x, const W*& w, float* y, int64_t& done, int64_t count, const Product& p,
                 int64_t kept) {
  for (; done + R <= count; done += R, w += R * p.k)
    block<R, M>(x, w, done + 2 * R <= count ? w + R * p.k : w, y + done, p.y_stride, p.k, kept);
}

// One group of rows of x against all weight rows of the range.
template <int M, class W>
void group(const typename Lane<W>::X* x, const Product& p, int64_t first, int64_t last, float* y, int64_t kept) {
  const W* w = static_cast<const W*>(p.w) + first * p.k;
  int64_t done = 0;
  rows<weight_rows(M), M, W>(x, w, y, done, last - first, p, kept);
  rows<1, M, W>(x, w, y, done, last - first, p, kept);
}

constexpr int64_t kNear = 12;  // weight rows that stay near while the groups of x pass over them: whole blocks

template <class W>
void multiply(const Product& p, int64_t first, int64_t last) {
  constexpr int64_t kStep = Lane<W>::kStep;
  const int64_t padded = (p.k + kStep - 1) / kStep * kStep;
  const int64_t near = p.m > kMostRows ? kNear : last - first;
  for (int64_t from = first; from < last; from += near) {
    const int64_t to = std::min(last, from + near);
    const auto* x = static_cast<const typename Lane<W>::X*>(p.x);
    for (int64_t m = 0; m < p.m;) {
      const int64_t size = group_rows(p.m - m), kept = std::min(size, p.m - m);
      float* y = p.y + m * p.y_stride + (from - first);
      if (size == 1) group<1, W>(x, p, from, to, y, kept);
      else if (size == 2) group<2, W>(x, p, from, to, y, kept);
      else if (size == 4) group<4, W>(x, p, from, to, y, kept);
      else group<kMostRows, W>(x, p, from, to, y, kept);
      m += size, x += size * padded;
    }
  }
}

template <class W>
void pack(const float* x, int64_t m, int64_t k, void* packed) {
  using L = Lane<W>;
  auto* out = static_cast<typename L::X*>(packed);
  for (int64_t at = 0; at < m;) {
    const int64_t size = group_rows(m - at);
    for (int64_t i = 0; i < k; i += L::kStep)
      for (int64_t r = 0; r < size; ++r, out += L::kStep) {
        const int64_t count = at + r < m ? std::min<int64_t>(L::kStep, k - i) : 0;
        const float* from = x + (at + r) * k + i;
        for (int64_t j = 0; j < count; ++j) narrow(from[j], out + L::place(j));
        for (int64_t j = count; j < L::kStep; ++j) out[L::place(j)] = 0;
      }
    at += size;
  }
}

int64_t packed_bytes(int64_t m, int64_t k) { return (m + kMostRows) * (k + 2 * kLanes) * 4; }
void pack_either(const float* x, int64_t m, int64_t k, bool narrow_w, void* packed) {
  narrow_w ? pack<uint16_t>(x, m, k, packed) : pack<float>(x, m, k, packed);
}
void multiply_either(const Product& p, int64_t first, int64_t last) {
  if (p.codes) p.narrow_w ? multiply<NarrowCode>(p, first, last) : multiply<int8_t>(p, first, last);
  else p.narrow_w ? multiply<uint16_t>(p, first, last) : multiply<float>(p, first, last);
}

}  // namespace

#define TWINFER_JOIN(a, b) a##b
#define TWINFER_NAME(isa) TWINFER_JOIN(product_, isa)
extern const ProductBuild TWINFER_NAME(TWINFER_ISA);
const ProductBuild TWINFER_NAME(TWINFER_ISA) = {packed_bytes, pack_either, multiply_either};

}  // namespace twinfer
