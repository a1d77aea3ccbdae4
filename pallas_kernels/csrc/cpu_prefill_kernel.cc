// Attention of one Item of many query tokens: blocks of 32 queries by up to 128 keys, online softmax in float32.
//
// Compiled once per instruction set, see cpu_block.h. Keys and values are packed once an item and block, then all the
// item's queries pass over them. Builds that multiply bfloat16 round the probabilities to it.
#include <algorithm>
#include <cmath>
#include <memory>
#include <type_traits>

#include "cpu_block.h"
#include "cpu_prefill.h"

namespace twinfer {
namespace {

constexpr float kNever = -1e30f;  // finite: a row of masked keys alone gives no NaN
constexpr float kLog2e = 1.44269504f;
constexpr int kKeys = 128;  // keys attended together
constexpr int kMaxQueries = 256, kMaxHead = 256;

#if defined(__AVX512F__)
inline Vec most(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
#elif defined(__AVX__)
inline Vec most(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
#else
inline Vec most(Vec a, Vec b) { return (Vec)_mm_max_ps((__m128)a, (__m128)b); }
#endif

// 2^x for x <= 0, relative error below 2e-7; below -126 it may stay 2^-126.
inline Vec exp2(Vec x) {
#if defined(__AVX512F__)
  const Vec whole = (Vec)_mm512_roundscale_ps((__m512)x, 0);
#else
  x = most(splat(-126.0f), x);  // NaN stays
  const Vec shifted = x + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
  const Vec whole = shifted - 12582912.0f;
#endif
  const Vec r = x - whole;
  Vec p = splat(1.3400432166e-3f);
  p = p * r + 9.6760370979e-3f;
  p = p * r + 5.5503272142e-2f;
  p = p * r + 2.4022107356e-1f;
  p = p * r + 6.9314720671e-1f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  const IVec power = (reinterpret_cast<const IVec&>(shifted) - 0x4b400000 + 127) << 23;
  return p * reinterpret_cast<const Vec&>(power);
#endif
}

inline Vec rotated(Vec v, int by) {
  IVec lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = (i + by) % kLanes;
  return __builtin_shuffle(v, lanes);
}
inline float highest(Vec v) {
#pragma GCC unroll 4
  for (int by = kLanes / 2; by; by /= 2) v = most(v, rotated(v, by));
  return v[0];
}
inline float total_of(Vec v) {
#pragma GCC unroll 4
  for (int by = kLanes / 2; by; by /= 2) v += rotated(v, by);
  return v[0];
}

inline void put(Vec v, float* p) { store(p, v); }
#ifdef __AVX512BF16__
inline void put(Vec v, uint16_t* p) {
  const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &half, 32);
}
#endif

struct Scratch {
  alignas(64) Cell q[kMaxQueries * kMaxHead];
  alignas(64) float out[kMaxQueries * kMaxHead];
  alignas(64) Cell k[kKeys * kMaxHead], v[kKeys * kMaxHead];  // packed
  alignas(64) float scores[kSide][kKeys];
  alignas(64) Cell p[kSide][kKeys];
  float top[kMaxQueries], total[kMaxQueries];  // running maximum (of scores x log2 e) and sum
};

Scratch& scratch() {
  static thread_local const std::unique_ptr<Scratch> mine(new Scratch);  // not in the thread's own block: 1 MB
  return *mine;
}

// Keys [begin, begin + count) of the row, packed with their values; depths are padded with zeros.
template <class C>
void pack(const Call& call, const Item& item, int64_t begin, int count, int64_t depth, Scratch& s) {
  const C *keys[kKeys], *values[kKeys];
  const int64_t head = call.page_tokens * call.head_size;  // one head of one page
  for (int j = 0; j < count; ++j) {
    const int64_t at = begin + j;
    int64_t page = call.page_table[item.row * call.max_pages + at / call.page_tokens];
    page = std::clamp<int64_t>(page, 0, call.num_pages - 1);
    keys[j] = static_cast<const C*>(call.cache) + (page * 2 * call.kv_heads + item.kv_head) * head +
              at % call.page_tokens * call.head_size;
    values[j] = keys[j] + call.kv_heads * head;
  }
  const int64_t padded = round_up(count, kSide);
  for (int j = 0; j < padded; j += kPanel)
    pack_columns(keys + j, std::clamp(count - j, 0, kPanel), call.head_size, depth, s.k + j * depth);
  pack_rows(values, count, call.head_size, padded, s.v);
  if (call.head_size % kSide)  // the second panel of the last block
    std::fill_n(s.v + call.head_size * padded, kPanel * padded, Cell(0));
}

// Cap one query's scores and mask those outside [low, high).
inline void prepare(const Call& call, int low, int high, int padded, float* scores) {
  if (call.logit_cap != 0)
    for (int j = low; j < high; ++j) scores[j] = call.logit_cap * std::tanh(scores[j] * call.scale / call.logit_cap);
  for (int j = 0; j < low; ++j) scores[j] = kNever;
  for (int j = high; j < padded; ++j) scores[j] = kNever;
}

// padded: a multiple of 32.
inline float highest(const float* scores, int padded) {
  Vec even = load(scores), odd = load(scores + kSide / 2);
  for (int j = kLanes; j < kSide / 2; j += kLanes) {
    even = most(even, load(scores + j));
    odd = most(odd, load(scores + kSide / 2 + j));
  }
  for (int j = kSide; j < padded; j += 2 * kLanes) {
    even = most(even, load(scores + j));
    odd = most(odd, load(scores + j + kLanes));
  }
  return highest(most(even, odd));
}

// p = 2^(score x scale - top), 0 where masked; returns the sum.
template <bool Masked>
inline float exponentiate(const float* scores, int padded, float scale, float top, Cell* p) {
  Vec sums{};
#pragma GCC unroll 2
  for (int j = 0; j < padded; j += kLanes) {
    const Vec score = load(scores + j);
    Vec e = exp2(score * scale - top);
    if constexpr (Masked) e = score > splat(kNever) ? e : Vec{};
    put(e, p + j);
    sums += e;
  }
  return total_of(sums);
}

// 32 queries from m0 on against the first `count` of the keys packed from `begin` on, `packed` with the padding.
void attend_block(const Call& call, const Item& item, int heads, int m0, int64_t begin, int count, int64_t packed,
                  int64_t depth, Scratch& s) {
  const int queries = std::min(kSide, item.count * heads - m0), padded = int(round_up(count, kSide));
  for (int j = 0; j < padded; j += kSide)
    block<false>(s.q + m0 * depth, depth, s.k + j * depth, kPanel * depth, depth, &s.scores[0][j], kKeys);
  const float scale = call.logit_cap == 0 ? call.scale * kLog2e : kLog2e;
  float factors[kSide];
  bool masked[kSide] = {};
  const int64_t oldest = item.first_position + m0 / heads;
  const bool full = !call.window && queries == kSide && count == padded && begin + count <= oldest + 1;
  for (int i = 0; i < kSide && (!full || call.logit_cap != 0); ++i) {
    const int64_t position = item.first_position + (m0 + i) / heads;
    const int64_t first = call.window ? position - call.window + 1 : 0;
    const int64_t seen = i < queries ? count : 0;
    const int low = int(std::clamp<int64_t>(first - begin, 0, seen));
    const int high = int(std::clamp<int64_t>(position + 1 - begin, low, seen));
    masked[i] = low > 0 || high < padded;
    prepare(call, low, high, padded, s.scores[i]);
  }
  for (int i = 0; i < kSide; ++i) factors[i] = highest(s.scores[i], padded);
  float* const top = s.top + m0;
  float* const total = s.total + m0;
  for (int i = 0; i < kSide; i += kLanes) {
    const Vec before = load(top + i), now = most(before, load(factors + i) * scale);
    store(top + i, now);
    store(factors + i, exp2(before - now));
  }
  for (int i = 0; i < kSide; ++i) {
    const float sum = masked[i] ? exponentiate<true>(s.scores[i], padded, scale, top[i], s.p[i])
                                : exponentiate<false>(s.scores[i], padded, scale, top[i], s.p[i]);
    total[i] = total[i] * factors[i] + sum;
    float* const out = s.out + (m0 + i) * depth;
    if (factors[i] != 1.0f)
      for (int h = 0; h < depth; h += kLanes) store(out + h, load(out + h) * factors[i]);
  }
  for (int h = 0; h < depth; h += kSide)
    block<true>(s.p[0], kKeys, s.v + h * packed, kPanel * packed, padded, s.out + m0 * depth + h, depth);
}

template <class Q, class C>
void attend(const Call& call, const Item& item) {
  Scratch& s = scratch();
  const Tiles tiles;
  const int size = int(call.head_size), group = int(call.heads / call.kv_heads);
  const int64_t depth = round_up(size, kSide);
  const int piece = std::max(1, kMaxQueries / item.count);
  for (int g0 = 0; g0 < group; g0 += piece) {
    const int heads = std::min(piece, group - g0), queries = item.count * heads;
    const int padded = int(round_up(queries, kSide));
    // where a query lies among `stride` heads a token
    const auto place = [&](int m, int64_t stride) {
      return ((int64_t(item.first_token) + m / heads) * stride + item.kv_head * group + g0 + m % heads) * size;
    };
    std::fill_n(s.q, padded * depth, Cell(0));
    std::fill_n(s.out, padded * depth, 0.0f);
    std::fill_n(s.top, padded, kNever);
    std::fill_n(s.total, padded, 0.0f);
    for (int m = 0; m < queries; ++m) {
      const Q* source = static_cast<const Q*>(call.q) + place(m, call.q_heads);
      for (int h = 0; h < size; ++h)
        if constexpr (std::is_same_v<Q, Cell>) s.q[m * depth + h] = source[h];
        else s.q[m * depth + h] = cell(widen(source[h]));
    }
    const int64_t last = item.first_position + item.count;  // one past the last key that any query sees
    int64_t begin = call.window ? std::max<int64_t>(0, item.first_position - call.window + 1) : 0;
    for (; begin < last; begin += kKeys) {
      const int count = int(std::min<int64_t>(kKeys, last - begin));
      pack<C>(call, item, begin, count, depth, s);
      for (int m0 = 0; m0 < queries; m0 += kSide) {
        const int64_t oldest = item.first_position + m0 / heads;
        const int64_t newest = item.first_position + (std::min(m0 + kSide, queries) - 1) / heads;
        const int seen = int(std::min<int64_t>(count, newest + 1 - begin));
        const bool past = call.window && begin + count <= oldest - call.window + 1;
        if (seen > 0 && !past) attend_block(call, item, heads, m0, begin, seen, round_up(count, kSide), depth, s);
      }
    }
    for (int m = 0; m < queries; ++m) {
      Q* target = static_cast<Q*>(call.out) + place(m, call.heads);
      const float inverse = s.total[m] > 0 ? 1.0f / s.total[m] : 0.0f;
      for (int h = 0; h < size; ++h) narrow(s.out[m * depth + h] * inverse, target + h);
    }
  }
}

}  // namespace

#define TWINFER_JOIN2(a, b) a##b
#define TWINFER_JOIN(a, b) TWINFER_JOIN2(a, b)
void TWINFER_JOIN(prefill_, TWINFER_ISA)(const Call& call, const Item& item) {
#ifdef __AVX512BF16__
  attend<uint16_t, uint16_t>(call, item);
#else
  const bool wide_q = call.q_type == Type::kF32, wide_cache = call.cache_type == Type::kF32;
  if (wide_q && wide_cache) attend<float, float>(call, item);
  else if (wide_q) attend<float, uint16_t>(call, item);
  else if (wide_cache) attend<uint16_t, float>(call, item);
  else attend<uint16_t, uint16_t>(call, item);
#endif
}

}  // namespace twinfer
