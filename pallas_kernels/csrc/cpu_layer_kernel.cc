// The stages of a decoder layer for a few tokens, piece by piece. See cpu_layer.h.
//
// Compiled once per instruction set: -DTWINFER_ISA=base|v3|v4|v4dot -DTWINFER_LANES=4|8|16 (floats a vector register).
// What every column of a product needs, the normed rows of x, each thread works out for itself: they are few, and it
// saves a wait for the others. bfloat16 layers round where the separate operations would.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu_layer.h"
#include "cpu_vector.h"

namespace twinfer {

#define TWINFER_JOIN2(a, b) a##b
#define TWINFER_JOIN(a, b) TWINFER_JOIN2(a, b)
#define TWINFER_PRODUCT TWINFER_JOIN(product_, TWINFER_ISA)

namespace {

// A thread's own memory: rows of x as the products want them, and a piece of a product.
struct Own {
  std::vector<float> rows;    // [T, K]
  std::vector<char> packed;
  float scale[kMaxTokens];  // of the packed rows' codes
  alignas(64) float tile[kMaxTokens][kTile];
  alignas(64) float tile2[kMaxTokens][kTile];
};

inline float settled(float x, const float*) { return x; }
inline float settled(float x, const uint16_t*) {  // rounded to bfloat16
  uint16_t bits;
  narrow(x, &bits);
  return widen(bits);
}

// to[i] = from[i] / rms(from) * (weight[i] + offset), rounded to T.
template <class T, class S>
void norm(const S* from, const T* weight, int64_t size, float eps, float offset, float* to) {
  Vec squares{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec x = load(from + i);
    squares += x * x;
  }
  float total = sum(squares);
  for (; i < size; ++i) total += widen(from[i]) * widen(from[i]);
  const float scale = 1.0f / std::sqrt(total / float(size) + eps);
  for (i = 0; i < size; ++i) to[i] = settled(widen(from[i]) * scale * (widen(weight[i]) + offset), weight);
}

char* room(Own& own, int64_t tokens, int64_t k) {
  const int64_t bytes = TWINFER_PRODUCT.packed_bytes(tokens, k) + 64;
  if (int64_t(own.packed.size()) < bytes) own.packed.resize(bytes);
  return own.packed.data() + (64 - reinterpret_cast<uintptr_t>(own.packed.data()) % 64) % 64;
}

// What int8 leaves of a row, and the scale of its codes; what is not finite makes the scale NaN.
float round_row(const float* from, int64_t size, const float* fixed, float* to) {
  Vec most{}, odd{};  // odd: 0, or NaN once a number is not finite
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const Vec x = load(from + i), magnitude = x < Vec{} ? -x : x;
    most = magnitude > most ? magnitude : most;
    odd += x * 0.0f;
  }
  float largest = 0, broken = sum(odd);
  for (int lane = 0; lane < kLanes; ++lane) largest = std::max(largest, most[lane]);
  for (; i < size; ++i) largest = std::max(largest, std::fabs(from[i])), broken += from[i] * 0.0f;
  const float scale = (fixed ? *fixed : std::max(largest, 1e-12f) / 127.0f) + broken, low = fixed ? -128.0f : -127.0f;
  for (i = 0; i < size; ++i) {
    const float ratio = from[i] / scale, kept = ratio != ratio ? 0.0f : std::min(std::max(ratio, low), 127.0f);
    to[i] = (kept + 12582912.0f) - 12582912.0f;  // 1.5 * 2^23: to the nearest, ties to even
  }
  return scale;
}

// Rows of x [T, K] as the product with `weight` wants them.
void pack_rows(const Layer& l, Own& own, const float* x, int64_t k, Weight weight) {
  if (l.rounded[weight]) {
    if (int64_t(own.rows.size()) < l.tokens * k) own.rows.resize(l.tokens * k);
    const float* fixed = static_cast<const float*>(l.parts[kQkvFixed + weight]);
    for (int64_t t = 0; t < l.tokens; ++t) own.scale[t] = round_row(x + t * k, k, fixed, &own.rows[t * k]);
    x = own.rows.data();
  }
  TWINFER_PRODUCT.pack(x, l.tokens, k, l.narrow, room(own, l.tokens, k));
}

// norm(x), packed. x: [T, D].
template <class T, class S>
void pack_normed(const Layer& l, Own& own, const S* x, Part norm_weight, Weight weight) {
  if (int64_t(own.rows.size()) < l.tokens * l.width) own.rows.resize(l.tokens * l.width);
  for (int64_t t = 0; t < l.tokens; ++t)
    norm(x + t * l.width, static_cast<const T*>(l.parts[norm_weight]), l.width, l.eps, l.offset,
         &own.rows[t * l.width]);
  pack_rows(l, own, own.rows.data(), l.width, weight);
}

// Columns [first, last) of the packed rows times `weight`, times its scales, plus its bias, rounded to T.
template <class T>
void multiply(const Layer& l, Own& own, Weight weight, Part bias, int64_t k, int64_t first, int64_t last,
              float (*tile)[kTile]) {
  Product p{room(own, l.tokens, k), l.parts[kWeightParts[weight]], tile[0], l.narrow, l.tokens, k, kTile,
            l.codes[weight]};
  TWINFER_PRODUCT.multiply(p, first, last);
  if (const float* scale = static_cast<const float*>(l.parts[kQkvScale + weight]))
    for (int64_t t = 0; t < l.tokens; ++t) {
      const float of_row = l.rounded[weight] ? own.scale[t] : 1.0f;
      for (int64_t i = 0; i < last - first; ++i) tile[t][i] = tile[t][i] * of_row * scale[first + i];
    }
  const T* added = static_cast<const T*>(l.parts[bias]);
  for (int64_t t = 0; t < l.tokens; ++t)
    for (int64_t i = 0; i < last - first; ++i)
      tile[t][i] = settled(added ? tile[t][i] + widen(added[first + i]) : tile[t][i], static_cast<const T*>(nullptr));
}

template <class T>
void project(const Layer& l, Own& own, int64_t first, int64_t last) {
  const int64_t columns = (l.attention.heads + 2 * l.attention.kv_heads) * l.attention.head_size;
  multiply<T>(l, own, kOfQkv, kQkvBias, l.width, first, last, own.tile);
  for (int64_t t = 0; t < l.tokens; ++t)
    std::copy(own.tile[t], own.tile[t] + (last - first), l.mid + t * columns + first);
}

// One head of one token: norm, then turn, in place.
template <class T>
void turn(const Layer& l, float* head, const T* weight, int64_t token) {
  if (weight) norm(static_cast<const float*>(head), weight, l.attention.head_size, l.eps, l.offset, head);
  const float *cos = l.cos + token * l.half, *sin = l.sin + token * l.half;
  for (int64_t i = 0; i < l.half; ++i) {
    const float a = head[i], b = head[i + l.half];
    head[i] = settled(a * cos[i] - b * sin[i], static_cast<const T*>(nullptr));
    head[i + l.half] = settled(b * cos[i] + a * sin[i], static_cast<const T*>(nullptr));
  }
}

template <class T, class C>
void place(const Layer& l, int64_t token) {
  const Call& a = l.attention;
  float* head = l.mid + token * (a.heads + 2 * a.kv_heads) * a.head_size;
  for (int64_t n = 0; n < a.heads; ++n, head += a.head_size)
    turn(l, head, static_cast<const T*>(l.parts[kQNorm]), token);
  const int32_t page = l.write_page[token], offset = l.write_offset[token];
  const bool inside = page > 0 && page < a.num_pages && offset >= 0 && offset < a.page_tokens;
  C* cache = const_cast<C*>(static_cast<const C*>(a.cache));
  for (int64_t n = 0; n < 2 * a.kv_heads; ++n, head += a.head_size) {  // keys, then values
    if (n < a.kv_heads) turn(l, head, static_cast<const T*>(l.parts[kKNorm]), token);
    C* to = cache + ((int64_t(page) * 2 * a.kv_heads + n) * a.page_tokens + offset) * a.head_size;
    if (inside)
      for (int64_t i = 0; i < a.head_size; ++i) narrow(head[i], to + i);
  }
}

// x + tile, rounded. For sandwich layers: the tile, to be normed first.
template <class T, class S>
void add(const Layer& l, Own& own, const S* x, int64_t first, int64_t last, float* wide, T* out) {
  for (int64_t t = 0; t < l.tokens; ++t) {
    const float* tile = own.tile[t];
    const int64_t at = t * l.width + first, count = last - first;
    if (l.sandwich) std::copy(tile, tile + count, l.mixed + at);
    else if (out) for (int64_t i = 0; i < count; ++i) narrow(widen(x[at + i]) + tile[i], out + at + i);
    else for (int64_t i = 0; i < count; ++i) wide[at + i] = settled(widen(x[at + i]) + tile[i], out);
  }
}

template <class T, class S>
void add_normed(const Layer& l, const S* x, Part weight, int64_t token, float* wide, T* out) {
  float* mixed = l.mixed + token * l.width;
  norm(static_cast<const float*>(mixed), static_cast<const T*>(l.parts[weight]), l.width, l.eps, l.offset, mixed);
  for (int64_t i = 0, at = token * l.width; i < l.width; ++i, ++at) {
    if (out) narrow(widen(x[at]) + mixed[i], out + at);
    else wide[at] = settled(widen(x[at]) + mixed[i], out);
  }
}

inline Vec magnitude(Vec x) { return x < Vec{} ? -x : x; }

inline Vec activated(Vec x, Activation activation) {
  if (activation == Activation::kGelu) {
    for (int i = 0; i < kLanes; ++i) x[i] = 0.5f * x[i] * std::erfc(-x[i] * 0.70710678f);
    return x;
  }
  // sigmoid(z), of z = 2 u for tanh(u): gelu_tanh is x (1 + tanh(u)) / 2 = x sigmoid(2 u)
  const Vec z = activation == Activation::kSilu ? x : 1.5957691216f * (x + 0.044715f * x * x * x);
  const Vec small = exp(-magnitude(z));
  return x * (z < Vec{} ? small : splat(1.0f)) / (1.0f + small);
}

template <class T>
void feed(const Layer& l, Own& own, int64_t first, int64_t last) {
  const T* type = nullptr;
  multiply<T>(l, own, kOfGateUp, kGateUpBias, l.width, first, last, own.tile);
  multiply<T>(l, own, kOfGateUp, kGateUpBias, l.width, l.ffn + first, l.ffn + last, own.tile2);
  for (int64_t t = 0; t < l.tokens; ++t) {
    float *gate = own.tile[t], *up = own.tile2[t], *to = l.hidden + t * l.ffn + first;
    for (int64_t i = 0; i < last - first; i += kLanes) store(gate + i, activated(load(gate + i), l.activation));
    for (int64_t i = 0; i < last - first; ++i) to[i] = settled(settled(gate[i], type) * up[i], type);
  }
}

// What a thread needs before its first piece of a stage.
template <class T>
void prepare(const Layer& l, Own& own, Stage stage) {
  const int64_t mixed = l.attention.heads * l.attention.head_size;
  if (stage == kProject) pack_normed<T>(l, own, static_cast<const T*>(l.x), kAttnNorm, kOfQkv);
  if (stage == kOut) pack_rows(l, own, l.attended, mixed, kOfO);
  if (stage == kFeed) pack_normed<T>(l, own, static_cast<const float*>(l.x1), kFfnNorm, kOfGateUp);
  if (stage == kDownwards) pack_rows(l, own, l.hidden, l.ffn, kOfDown);
}

template <class T>
void run(const Layer& l, Stage stage, int64_t first, int64_t last, bool fresh) {
  static thread_local Own own;
  const T* x = static_cast<const T*>(l.x);
  const float* x1 = l.x1;
  T *out = static_cast<T*>(l.out), *none = nullptr;
  if (fresh) prepare<T>(l, own, stage);
  switch (stage) {
    case kProject: return project<T>(l, own, first, last);
    case kPlace:
      for (int64_t t = first; t < last; ++t)
        l.attention.cache_type == Type::kF32 ? place<T, float>(l, t) : place<T, uint16_t>(l, t);
      return;
    case kOut:
      multiply<T>(l, own, kOfO, kOBias, l.attention.heads * l.attention.head_size, first, last, own.tile);
      return add(l, own, x, first, last, l.x1, none);
    case kAddMixed:
      for (int64_t t = first; t < last; ++t) add_normed(l, x, kPostAttnNorm, t, l.x1, none);
      return;
    case kFeed: return feed<T>(l, own, first, last);
    case kDownwards:
      multiply<T>(l, own, kOfDown, kDownBias, l.ffn, first, last, own.tile);
      return add(l, own, x1, first, last, nullptr, out);
    case kAddFed:
      for (int64_t t = first; t < last; ++t) add_normed(l, x1, kPostFfnNorm, t, nullptr, out);
      return;
    default: return;
  }
}

}  // namespace

void TWINFER_JOIN(layer_, TWINFER_ISA)(const Layer& l, Stage stage, int64_t first, int64_t last, bool fresh) {
  l.narrow ? run<uint16_t>(l, stage, first, last, fresh) : run<float>(l, stage, first, last, fresh);
}

}  // namespace twinfer
