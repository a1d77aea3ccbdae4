// Attention of decode rows on a CPU in one call: query-key norm, rope, cache write, softmax attention over pages.
//
// Every row has one token. A task is one KV head of one row with its G query heads; tasks share nothing, so they run in
// any order on the OpenMP threads of the process (torch's: the library is linked against none of its own). Values are
// rounded to the activations' dtype where the plain torch code rounds them: behind the norm and behind the turn.
// What is not finite is stored as 0. Called by cuda_kernels/cpu_decode.py through ctypes; the two structs agree.
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int64_t kParallelBytes = 64 << 10;  // keys and values below which waking threads costs more than it brings
constexpr int kMaxSize = 256;                 // head size

struct Decode {
  const void* qkv;            // [S, N + 2K, H]
  void* out;                  // [S, N, H]
  void* cache;                // [2, K, pool_tokens, H]
  const float* norm;          // [N + K, H], offset included; null = no query-key norm
  const float* cos;           // [S, R / 2]; null = no rope
  const float* sin;
  const int32_t* page_table;  // [S, max_pages]
  const int64_t* write_at;    // [S] of the pool
  const int64_t* index;       // [S] of each token in its sequence
  int64_t rows, heads, kv_heads, size, half, pool_tokens, page_tokens, max_pages, window, wide;
  float scale, logit_cap, eps;
};

#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define INLINE inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

INLINE float widen(float value) { return value; }
INLINE float widen(uint16_t value) { return as_float(uint32_t(value) << 16); }

INLINE void narrow(float value, float* to) { *to = value; }
INLINE void narrow(float value, uint16_t* to) {  // to nearest even; a NaN stays one
  uint32_t bits = as_bits(value);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  *to = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}

template <class E>
INLINE float rounded(float value) {
  E kept;
  narrow(value, &kept);
  return widen(kept);
}

INLINE float finite(float value) { return (as_bits(value) & 0x7f800000) == 0x7f800000 ? 0.0f : value; }

// exp(x) of x <= 0, relative error about 2e-7; 0 below -87.
INLINE float exp_negative(float x) {
  float scaled = x * 1.44269504f;
  scaled = scaled < -126.0f ? -126.0f : scaled;
  float whole = std::floor(scaled);
  float part = (x < -87.3f ? -87.3f : x) - whole * 0.693359375f;
  part -= whole * -2.12194440e-4f;
  float series = 1.98412698e-4f;
  series = series * part + 1.38888889e-3f;
  series = series * part + 8.33333333e-3f;
  series = series * part + 4.16666667e-2f;
  series = series * part + 1.66666667e-1f;
  series = series * part + 0.5f;
  series = series * part + 1.0f;
  series = series * part + 1.0f;
  float power = as_float(uint32_t(int32_t(whole) + 127) << 23);
  return x < -87.0f ? 0.0f : series * power;
}

// Norm and turn of one head, rounded as E. from: [H] -> to: f32 [H].
template <class E, int H>
INLINE void prepare(const Decode& d, const E* from, int64_t head, int64_t row, float* to) {
  const int64_t size = H ? H : d.size;
  for (int64_t h = 0; h < size; ++h) to[h] = widen(from[h]);
  if (d.norm) {
    float sum = 0;
    for (int64_t h = 0; h < size; ++h) sum += to[h] * to[h];
    const float inverse = 1.0f / std::sqrt(sum / float(size) + d.eps);
    const float* weight = d.norm + head * size;
    for (int64_t h = 0; h < size; ++h) to[h] = rounded<E>(to[h] * inverse * weight[h]);
  }
  if (d.cos) {
    const float *cos = d.cos + row * d.half, *sin = d.sin + row * d.half;
    for (int64_t h = 0; h < d.half; ++h) {
      const float first = to[h], second = to[h + d.half];
      to[h] = rounded<E>(first * cos[h] - second * sin[h]);
      to[h + d.half] = rounded<E>(second * cos[h] + first * sin[h]);
    }
  }
}

float* scratch(int64_t count) {  // f32 [count], a thread's own, kept for its next task
  static thread_local float* numbers = nullptr;
  static thread_local int64_t room = 0;
  if (count > room) {
    std::free(numbers);
    room = count + count / 2;
    numbers = static_cast<float*>(std::malloc(size_t(room) * sizeof(float)));
    if (!numbers) std::abort();
  }
  return numbers;
}

template <class E, int H>
INLINE void attend(const Decode& d, int64_t task) {
  const int64_t size = H ? H : d.size;
  const int64_t row = task / d.kv_heads, kv_head = task % d.kv_heads, group = d.heads / d.kv_heads;
  const E* qkv = static_cast<const E*>(d.qkv) + row * (d.heads + 2 * d.kv_heads) * size;
  E* keys = static_cast<E*>(d.cache) + kv_head * d.pool_tokens * size;
  E* values = keys + d.kv_heads * d.pool_tokens * size;

  float head[kMaxSize];
  prepare<E, H>(d, qkv + (d.heads + kv_head) * size, d.heads + kv_head, row, head);
  E* key = keys + d.write_at[row] * size;
  E* value = values + d.write_at[row] * size;
  const E* fresh = qkv + (d.heads + d.kv_heads + kv_head) * size;
  for (int64_t h = 0; h < size; ++h) narrow(finite(head[h]), key + h);
  for (int64_t h = 0; h < size; ++h) narrow(finite(widen(fresh[h])), value + h);

  const int64_t last = d.index[row] + 1;
  const int64_t first = d.window && last > d.window ? last - d.window : 0;
  const int64_t count = last - first;
  float* queries = scratch(group * (count + 2 * size + 1));  // [G, H], then sums [G, H], totals [G], scores [G, C]
  float* sums = queries + group * size;
  float* totals = sums + group * size;
  float* scores = totals + group;
  for (int64_t g = 0; g < group; ++g)
    prepare<E, H>(d, qkv + (kv_head * group + g) * size, kv_head * group + g, row, queries + g * size);
  for (int64_t i = 0; i < group * size; ++i) sums[i] = 0;

  const int32_t* pages = d.page_table + row * d.max_pages;
  for (int64_t at = first; at < last;) {
    const int64_t page = at / d.page_tokens, end = (page + 1) * d.page_tokens < last ? (page + 1) * d.page_tokens : last;
    const E* from = keys + (pages[page] - page) * d.page_tokens * size;
    for (; at < end; ++at)
      for (int64_t g = 0; g < group; ++g) {
        float sum = 0;
        for (int64_t h = 0; h < size; ++h) sum += queries[g * size + h] * widen(from[at * size + h]);
        scores[g * count + at - first] = sum * d.scale;
      }
  }
  for (int64_t g = 0; g < group; ++g) {
    float* line = scores + g * count;
    if (d.logit_cap > 0)
      for (int64_t c = 0; c < count; ++c) line[c] = d.logit_cap * std::tanh(line[c] / d.logit_cap);
    float largest = line[0], total = 0;
    for (int64_t c = 0; c < count; ++c) largest = line[c] > largest ? line[c] : largest;
    for (int64_t c = 0; c < count; ++c) line[c] = exp_negative(line[c] - largest);
    for (int64_t c = 0; c < count; ++c) total += line[c];
    totals[g] = total;
  }
  for (int64_t at = first; at < last;) {
    const int64_t page = at / d.page_tokens, end = (page + 1) * d.page_tokens < last ? (page + 1) * d.page_tokens : last;
    const E* from = values + (pages[page] - page) * d.page_tokens * size;
    for (int64_t g = 0; g < group; ++g) {
      float total[kMaxSize];
      for (int64_t h = 0; h < size; ++h) total[h] = sums[g * size + h];
      for (int64_t c = at; c < end; ++c) {
        const float part = scores[g * count + c - first];
        for (int64_t h = 0; h < size; ++h) total[h] += part * widen(from[c * size + h]);
      }
      for (int64_t h = 0; h < size; ++h) sums[g * size + h] = total[h];
    }
    at = end;
  }
  E* out = static_cast<E*>(d.out) + (row * d.heads + kv_head * group) * size;
  for (int64_t g = 0; g < group; ++g)
    for (int64_t h = 0; h < size; ++h) narrow(sums[g * size + h] / totals[g], out + g * size + h);
}

template <class E>
INLINE void attend_sized(const Decode& d, int64_t task) {
  if (d.size == 64) return attend<E, 64>(d, task);
  if (d.size == 128) return attend<E, 128>(d, task);
  attend<E, 0>(d, task);
}

CLONES void attend_wide(const Decode& d, int64_t task) { attend_sized<float>(d, task); }
CLONES void attend_narrow(const Decode& d, int64_t task) { attend_sized<uint16_t>(d, task); }

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void twinfer_decode(const Decode* decode) {
  const Decode& d = *decode;
  void (*run)(const Decode&, int64_t) = d.wide ? attend_wide : attend_narrow;
  int64_t seen = 0;
  for (int64_t row = 0; row < d.rows; ++row)
    seen += d.window && d.index[row] >= d.window ? d.window : d.index[row] + 1;
  const bool together = seen * d.kv_heads * d.size * 2 * (d.wide ? 4 : 2) > kParallelBytes;
#pragma omp parallel for schedule(static) if (together)
  for (int64_t task = 0; task < d.rows * d.kv_heads; ++task) run(d, task);
}

__attribute__((visibility("default"))) const char* twinfer_torch_cpu_source() { return TWINFER_SOURCE; }
}
