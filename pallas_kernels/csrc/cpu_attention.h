// One attention call over pages on the CPU: what every instruction-set build of cpu_attention_kernel.cc implements.
//
// cpu_attention.cc owns the jax.ffi entry, the write of new keys and values, the work list and the threads; the kernel
// file is compiled once per instruction set and only ever sees one Item at a time.
#pragma once
#include <cstdint>

namespace twinfer {

enum class Type : int { kF32 = 0, kBf16 = 1 };

// Everything that the items of one call share. Shapes: q, out [T, N, H]; cache [L, P, 2, K, page, H].
struct Call {
  const void* q;
  void* out;
  const void* cache;  // already at this layer: [P, 2, K, page, H]
  const int32_t* page_table;  // [S, max_pages]
  Type q_type, cache_type;
  int64_t heads, kv_heads, head_size, page_tokens, max_pages;
  int64_t num_pages;
  int64_t q_heads;  // heads from one token of q to the next: N, or more where keys and values lie beside
  int64_t window;  // 0 = none
  float scale;
  float logit_cap;  // 0 = none
};

// Queries [first_token, first_token + count) of the step, all of one row, at positions from first_position on, for the
// N / K query heads of one KV head.
struct Item {
  int32_t row, kv_head, first_token, count, first_position;
};

constexpr int kTileTokens = 32;  // query tokens of an item
constexpr int kBlock = 64;       // keys attended together

using Kernel = void (*)(const Call&, const Item&);
void attend_base(const Call&, const Item&);
void attend_v3(const Call&, const Item&);  // AVX2 and FMA
void attend_v4(const Call&, const Item&);  // AVX-512

}  // namespace twinfer
