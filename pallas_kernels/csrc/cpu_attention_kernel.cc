// Attention of one Item: online softmax over blocks of kBlock keys, float32 throughout.
//
// Compiled once per instruction set: -DTWINFER_ISA=base|v3|v4 -DTWINFER_LANES=4|8|16 (floats a vector register).
// One query token: dot products along H, the keys lie that way. More: keys are turned to [H][kBlock] first and scores are
// a small matrix product, four queries at a time, so that each loaded vector is used four times.
#include <algorithm>
#include <cmath>

#include "cpu_attention.h"
#include "cpu_vector.h"

namespace twinfer {
namespace {

constexpr float kNever = -1e30f;  // finite: a block of masked keys alone gives no NaN
constexpr int kMaxHead = 256;
constexpr int kGroupQueries = 8 * kTileTokens;  // most queries (tokens x heads of the group) attended together

inline float capped(float x, float cap) { return cap * std::tanh(x / cap); }

// Keys [begin, end) of one page for one head, at most kBlock of them, lying one after another.
template <class C>
struct Keys {
  const C* k;
  const C* v;
  int count;
};

template <class C>
inline Keys<C> keys_at(const Call& call, const Item& item, int64_t begin, int64_t end) {
  int64_t page = call.page_table[item.row * call.max_pages + begin / call.page_tokens];
  page = std::clamp<int64_t>(page, 0, call.num_pages - 1);
  int64_t offset = begin % call.page_tokens;
  int64_t head = call.page_tokens * call.head_size;  // one head of one page
  const C* base = static_cast<const C*>(call.cache) + (page * 2 * call.kv_heads + item.kv_head) * head;
  int64_t count = std::min({end - begin, call.page_tokens - offset, int64_t(kBlock)});
  const C* k = base + offset * call.head_size;
  return {k, k + call.kv_heads * head, int(count)};
}

// scores[m][j] = q[m] . k[j], along H, eight keys at a time.
template <class C>
inline void score_along(const float* q, int queries, const Keys<C>& keys, int size, float (*scores)[kBlock]) {
  int j = 0;
  for (; j + 8 <= keys.count; j += 8) {
    const C* k = keys.k + j * size;
    for (int m = 0; m < queries; ++m) {
      Vec dots[8] = {};
      for (int h = 0; h < size; h += kLanes) {
        const Vec query = load(q + m * size + h);
        for (int i = 0; i < 8; ++i) dots[i] += query * load(k + i * size + h);
      }
      sum8(dots, &scores[m][j]);
    }
  }
  for (; j < keys.count; ++j) {
    const C* k = keys.k + j * size;
    for (int m = 0; m < queries; ++m) {
      Vec dot{};
      for (int h = 0; h < size; h += kLanes) dot += load(q + m * size + h) * load(k + h);
      scores[m][j] = sum(dot);
    }
  }
}

// The same by blocks: keys turned to turned[H][kBlock], Q queries at a time.
template <int Q>
inline void score_block(const float* q, const float (*turned)[kBlock], int size, float (*scores)[kBlock]) {
  for (int j = 0; j < kBlock; j += 4 * kLanes) {
    Vec acc[Q][4] = {};
    for (int h = 0; h < size; ++h) {
      Vec k[4];
      for (int b = 0; b < 4; ++b) k[b] = load(&turned[h][j + b * kLanes]);
      for (int m = 0; m < Q; ++m)
        for (int b = 0; b < 4; ++b) acc[m][b] += q[m * size + h] * k[b];
    }
    for (int m = 0; m < Q; ++m)
      for (int b = 0; b < 4; ++b) store(&scores[m][j + b * kLanes], acc[m][b]);
  }
}

template <class C>
inline void turn(const Keys<C>& keys, int size, float (*turned)[kBlock]) {
  for (int h = 0; h < size; ++h)
    for (int j = 0; j < kBlock; ++j) turned[h][j] = j < keys.count ? widen(keys.k[j * size + h]) : 0.0f;
}

// acc[m] += sum_j p[m][j] * v[j], Q queries at a time, four vectors of H at a time.
template <int Q, class C>
inline void mix(const float (*p)[kBlock], const Keys<C>& keys, int size, float* acc) {
  int h = 0;
  for (; h + 4 * kLanes <= size; h += 4 * kLanes) {
    Vec sums[Q][4];
    for (int m = 0; m < Q; ++m)
      for (int b = 0; b < 4; ++b) sums[m][b] = load(acc + m * size + h + b * kLanes);
    for (int j = 0; j < keys.count; ++j) {
      Vec v[4];
      for (int b = 0; b < 4; ++b) v[b] = load(keys.v + j * size + h + b * kLanes);
      for (int m = 0; m < Q; ++m)
        for (int b = 0; b < 4; ++b) sums[m][b] += p[m][j] * v[b];
    }
    for (int m = 0; m < Q; ++m)
      for (int b = 0; b < 4; ++b) store(acc + m * size + h + b * kLanes, sums[m][b]);
  }
  for (; h < size; h += kLanes)
    for (int m = 0; m < Q; ++m) {
      Vec sums = load(acc + m * size + h);
      for (int j = 0; j < keys.count; ++j) sums += p[m][j] * load(keys.v + j * size + h);
      store(acc + m * size + h, sums);
    }
}

// Cap, mask and exponentiate one query's scores in place; returns the factor for what was accumulated before.
inline float soften(const Call& call, int64_t position, int64_t begin, int count, float* scores, float& top, float& total) {
  if (call.logit_cap != 0)
    for (int j = 0; j < count; ++j) scores[j] = capped(scores[j], call.logit_cap);
  int64_t first = call.window ? position - call.window + 1 : 0;
  int low = int(std::clamp<int64_t>(first - begin, 0, count));
  int high = int(std::clamp<int64_t>(position + 1 - begin, low, count));
  for (int j = 0; j < low; ++j) scores[j] = kNever;
  for (int j = high; j < kBlock; ++j) scores[j] = kNever;
  Vec most = splat(kNever);
  for (int j = 0; j < kBlock; j += kLanes) {
    Vec s = load(scores + j);
    most = s > most ? s : most;
  }
  float peak = top;
  for (int i = 0; i < kLanes; ++i) peak = std::max(peak, most[i]);
  float factor = top == peak ? 1.0f : std::exp(top - peak);
  top = peak;
  Vec sums{};
  for (int j = 0; j < kBlock; j += kLanes) {
    Vec s = load(scores + j);
    IVec seen = s > splat(kNever);
    Vec p = seen ? exp(s - peak) : Vec{};
    store(scores + j, p);
    sums += p;
  }
  total = total * factor + sum(sums);
  return factor;
}

template <class Q, class C>
void attend(const Call& call, const Item& item) {
  const int size = int(call.head_size), group = int(call.heads / call.kv_heads);
  // wide groups go through in pieces, so that the buffers are of fixed size
  const int piece = std::max(1, kGroupQueries / kTileTokens);
  alignas(64) thread_local float q[(kGroupQueries + 4) * kMaxHead];
  alignas(64) thread_local float acc[(kGroupQueries + 4) * kMaxHead];
  alignas(64) thread_local float scores[kGroupQueries + 4][kBlock];
  alignas(64) thread_local float turned[kMaxHead][kBlock];
  float top[kGroupQueries + 4], total[kGroupQueries + 4];
  for (int g0 = 0; g0 < group; g0 += piece) {
    const int heads = std::min(piece, group - g0), queries = item.count * heads;
    const int padded = (queries + 3) / 4 * 4;
    for (int m = 0; m < queries; ++m) {
      int64_t at = (int64_t(item.first_token) + m / heads) * call.q_heads + item.kv_head * group + g0 + m % heads;
      const Q* source = static_cast<const Q*>(call.q) + at * size;
      for (int h = 0; h < size; ++h) q[m * size + h] = widen(source[h]) * call.scale;
    }
    std::fill(q + queries * size, q + padded * size, 0.0f);
    std::fill(acc, acc + padded * size, 0.0f);
    std::fill(top, top + padded, kNever);
    std::fill(total, total + padded, 0.0f);
    const int64_t last = item.first_position + item.count;  // one past the last key that any query sees
    int64_t begin = call.window ? std::max<int64_t>(0, item.first_position - call.window + 1) : 0;
    while (begin < last) {
      Keys<C> keys = keys_at<C>(call, item, begin, last);
      if (queries < 8) {
        score_along(q, queries, keys, size, scores);
      } else {
        turn(keys, size, turned);
        for (int m = 0; m < padded; m += 4) score_block<4>(q + m * size, turned, size, scores + m);
      }
      for (int m = 0; m < queries; ++m) {
        float factor =
            soften(call, item.first_position + m / heads, begin, keys.count, scores[m], top[m], total[m]);
        if (factor != 1.0f)
          for (int h = 0; h < size; h += kLanes) store(acc + m * size + h, load(acc + m * size + h) * factor);
      }
      int m = 0;
      for (; m + 4 <= queries; m += 4) mix<4>(scores + m, keys, size, acc + m * size);
      for (; m + 2 <= queries; m += 2) mix<2>(scores + m, keys, size, acc + m * size);
      for (; m < queries; ++m) mix<1>(scores + m, keys, size, acc + m * size);
      begin += keys.count;
    }
    for (int m = 0; m < queries; ++m) {
      int64_t at = (int64_t(item.first_token) + m / heads) * call.heads + item.kv_head * group + g0 + m % heads;
      Q* target = static_cast<Q*>(call.out) + at * size;
      float inverse = total[m] > 0 ? 1.0f / total[m] : 0.0f;
      for (int h = 0; h < size; ++h) narrow(acc[m * size + h] * inverse, target + h);
    }
  }
}

}  // namespace

#define TWINFER_JOIN2(a, b) a##b
#define TWINFER_JOIN(a, b) TWINFER_JOIN2(a, b)
void TWINFER_JOIN(attend_, TWINFER_ISA)(const Call& call, const Item& item) {
  const bool wide_q = call.q_type == Type::kF32, wide_cache = call.cache_type == Type::kF32;
  if (wide_q && wide_cache) return attend<float, float>(call, item);
  if (wide_q) return attend<float, uint16_t>(call, item);
  if (wide_cache) return attend<uint16_t, float>(call, item);
  return attend<uint16_t, uint16_t>(call, item);
}

}  // namespace twinfer
