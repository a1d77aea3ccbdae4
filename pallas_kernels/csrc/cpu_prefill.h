// Attention of many query tokens of one row at once: what every build of cpu_prefill_kernel.cc implements.
//
// Called by cpu_attention.cc for the items that is_prefill names; the builds that multiply bfloat16 take a bfloat16 query
// over a bfloat16 cache alone, so the choice is by types too.
#pragma once
#include <algorithm>

#include "cpu_attention.h"
#include "cpu_isa.h"

namespace twinfer {

constexpr int kPrefillQueries = 128;  // tokens x heads of a group in one item
constexpr int kLeastTokens = 8;       // fewer tokens of a row, or fewer queries than a block has, are left to attend_*

inline bool is_prefill(int64_t tokens, int64_t group) { return tokens >= kLeastTokens && tokens * group >= 32; }
inline int64_t prefill_tile(int64_t group) { return std::max<int64_t>(kLeastTokens, kPrefillQueries / group); }

Kernel choose_prefill(Type q_type, Type cache_type, Isa isa);

void prefill_base(const Call&, const Item&);
void prefill_v3(const Call&, const Item&);
void prefill_v4(const Call&, const Item&);
void prefill_v4dot(const Call&, const Item&);  // AVX512_BF16
void prefill_amx(const Call&, const Item&);   // AMX_BF16

}  // namespace twinfer
