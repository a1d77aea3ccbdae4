// jax.ffi entry of ragged paged attention on the CPU: writes new keys and values, then attends, in one call a layer.
//
// Work is split into items (row, KV head, tile of queries) taken from a shared counter by this thread and by helpers on
// XLA's own pool. This thread never waits for a task that has not begun: it takes the remaining items itself, then waits
// only for items that a running helper has already taken (a wait for a queued task would hang with one core).
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_attention.h"
#include "cpu_pool.h"
#include "cpu_prefill.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace twinfer {
namespace {

Kernel choose_kernel() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return attend_v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return attend_v3;
  return attend_base;
}

}  // namespace

Kernel choose_prefill(Type q_type, Type cache_type, Isa isa) {
  static constexpr Kernel kernels[] = {prefill_base, prefill_v3, prefill_v4, prefill_v4dot, prefill_amx};
  if (isa > Isa::kV4 && (q_type != Type::kBf16 || cache_type != Type::kBf16)) isa = Isa::kV4;
  return kernels[int(isa)];
}

namespace {

struct Shared {
  Call call;
  Kernel kernel, prefill;
  std::vector<Item> items;
  std::atomic<size_t> next{0}, done{0};

  void work() {
    for (;;) {
      size_t i = next.fetch_add(1);
      if (i >= items.size()) return;
      const bool many = is_prefill(items[i].count, call.heads / call.kv_heads);
      (many ? prefill : kernel)(call, items[i]);
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

inline uint16_t to_bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void put(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * 4); }
inline void put(const uint16_t* from, uint16_t* to, int64_t n) { std::memcpy(to, from, n * 2); }
inline void put(const float* from, uint16_t* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = to_bf16(from[i]);
}
inline void put(const uint16_t* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = uint32_t(from[i]) << 16;
    std::memcpy(to + i, &bits, 4);
  }
}

// kv 0 = keys, 1 = values. source: [T, K, H]; cache: [P, 2, K, page, H] of this layer.
template <class S, class C>
void write(const Call& call, const void* source, int kv, const int32_t* pages, const int32_t* offsets, int64_t tokens) {
  const S* from = static_cast<const S*>(source);
  C* cache = const_cast<C*>(static_cast<const C*>(call.cache));
  for (int64_t t = 0; t < tokens; ++t) {
    if (pages[t] <= 0 || pages[t] >= call.num_pages || offsets[t] < 0 || offsets[t] >= call.page_tokens) continue;
    for (int64_t k = 0; k < call.kv_heads; ++k) {
      int64_t at = ((int64_t(pages[t]) * 2 + kv) * call.kv_heads + k) * call.page_tokens + offsets[t];
      put(from + (t * call.kv_heads + k) * call.head_size, cache + at * call.head_size, call.head_size);
    }
  }
}

void write_both(const Call& call, const void* k, const void* v, const int32_t* pages, const int32_t* offsets, int64_t tokens) {
  const void* sources[2] = {k, v};
  for (int kv = 0; kv < 2; ++kv) {
    const bool wide = call.q_type == Type::kF32, wide_cache = call.cache_type == Type::kF32;
    if (wide && wide_cache) write<float, float>(call, sources[kv], kv, pages, offsets, tokens);
    else if (wide) write<float, uint16_t>(call, sources[kv], kv, pages, offsets, tokens);
    else if (wide_cache) write<uint16_t, float>(call, sources[kv], kv, pages, offsets, tokens);
    else write<uint16_t, uint16_t>(call, sources[kv], kv, pages, offsets, tokens);
  }
}

bool type_of(ffi::DataType type, Type& out) {
  if (type == ffi::DataType::F32) out = Type::kF32;
  else if (type == ffi::DataType::BF16 || type == ffi::DataType::U16) out = Type::kBf16;
  else return false;
  return true;
}

constexpr int64_t kInlineWork = 1 << 19;  // multiply-adds below which helpers cost more than they bring

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, ffi::AnyBuffer cache,
                     ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> query_starts,
                     ffi::Buffer<ffi::S32> num_new, ffi::Buffer<ffi::S32> num_computed, ffi::Buffer<ffi::S32> num_rows,
                     ffi::Buffer<ffi::S32> write_page, ffi::Buffer<ffi::S32> write_offset,
                     ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> cache_out, int64_t layer,
                     int64_t window, float scale, float logit_cap) {
  auto dims = q.dimensions(), pages = cache.dimensions();
  if (dims.size() != 3 || pages.size() != 6) return ffi::Error::InvalidArgument("q must be [T, N, H], cache rank 6");
  if (cache_out->untyped_data() != cache.untyped_data()) return ffi::Error::Internal("the cache was not donated");
  auto shared = std::make_shared<Shared>();
  Call& call = shared->call;
  if (!type_of(q.element_type(), call.q_type) || !type_of(cache.element_type(), call.cache_type))
    return ffi::Error::InvalidArgument("float32 or bfloat16 only");
  call.heads = dims[1], call.head_size = dims[2], call.kv_heads = pages[3], call.page_tokens = pages[4];
  call.num_pages = pages[1], call.q_heads = call.heads;
  if (call.head_size % 16 || call.head_size > 256) return ffi::Error::InvalidArgument("head size must be 16 i <= 256");
  const int64_t layer_elements = pages[1] * pages[2] * pages[3] * pages[4] * pages[5];
  const int64_t element_bytes = call.cache_type == Type::kF32 ? 4 : 2;
  call.q = q.untyped_data(), call.out = out->untyped_data();
  call.cache = static_cast<const char*>(cache.untyped_data()) + layer * layer_elements * element_bytes;
  call.page_table = page_table.typed_data(), call.max_pages = page_table.dimensions()[1];
  call.window = window, call.scale = scale, call.logit_cap = logit_cap;

  const int64_t tokens = dims[0], rows = page_table.dimensions()[0];
  write_both(call, k.untyped_data(), v.untyped_data(), write_page.typed_data(), write_offset.typed_data(), tokens);

  int64_t work = 0, attended = 0;
  const int64_t live = std::min<int64_t>(rows, num_rows.typed_data()[0]);
  for (int64_t r = 0; r < live; ++r) {
    const int32_t start = query_starts.typed_data()[r], computed = num_computed.typed_data()[r];
    const int32_t count = int32_t(std::min<int64_t>(num_new.typed_data()[r], tokens - start));
    const int64_t group = call.heads / call.kv_heads;
    const int32_t most = is_prefill(count, group) ? int32_t(prefill_tile(group)) : kTileTokens;
    for (int32_t at = std::max(0, count - 1) / most * most; at >= 0; at -= most) {  // the longest first
      const int32_t tile = std::min(most, count - at);
      if (tile <= 0) break;
      for (int32_t head = 0; head < call.kv_heads; ++head)
        shared->items.push_back({int32_t(r), head, start + at, tile, computed + at});
      int64_t keys = computed + at + tile;
      if (window) keys = std::min<int64_t>(keys, window + tile);
      work += 2 * keys * tile * call.heads * call.head_size;
    }
    if (count > 0) attended = std::max<int64_t>(attended, start + count);
  }
  // padding tokens: defined output
  const int64_t token_bytes = call.heads * call.head_size * (call.q_type == Type::kF32 ? 4 : 2);
  std::memset(static_cast<char*>(call.out) + attended * token_bytes, 0, (tokens - attended) * token_bytes);

  static const Kernel kernel = choose_kernel();
  shared->kernel = kernel;
  shared->prefill = choose_prefill(call.q_type, call.cache_type, chosen_isa());
  const size_t count = shared->items.size();
  if (work > kInlineWork && count > 1) {
    const int64_t helpers = std::min<int64_t>(pool.num_threads() - 1, int64_t(count) - 1);
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
  }
  shared->work();
  wait_for(shared->done, count);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace twinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(twinfer_cpu_attention, twinfer::attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // q
                                  .Arg<ffi::AnyBuffer>()          // k
                                  .Arg<ffi::AnyBuffer>()          // v
                                  .Arg<ffi::AnyBuffer>()          // cache, donated
                                  .Arg<ffi::Buffer<ffi::S32>>()   // page_table [S, max_pages]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // query_starts [S]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // num_new [S]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // num_computed [S]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // num_rows [1]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // write_page [T]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // write_offset [T]
                                  .Ret<ffi::AnyBuffer>()          // out
                                  .Ret<ffi::AnyBuffer>()          // cache
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("window")
                                  .Attr<float>("scale")
                                  .Attr<float>("logit_cap"));

extern "C" const char* twinfer_cpu_attention_source() { return TWINFER_SOURCE; }
