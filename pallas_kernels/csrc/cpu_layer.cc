// jax.ffi entry of a whole decoder layer for a few tokens on the CPU: one call, one wake-up of the helpers.
//
// A stage's pieces are taken from a shared counter by this thread and by helpers on XLA's own pool; who finds none left
// waits until the last one is done and goes on to the next stage. As in cpu_attention.cc nobody ever waits for a task
// that has not begun: a helper that comes late finds everything done.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "cpu_layer.h"
#include "cpu_pool.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace twinfer {
namespace {

constexpr int64_t kInlineElements = 1 << 17;  // weights of a layer below which helpers cost more than they bring
constexpr int64_t kUnit = 24;                 // columns: whole blocks of 8, 6, 4, 3 or 2

struct Builds {
  LayerKernel layer;
  Kernel attend;
};

Builds choose_builds() {
  __builtin_cpu_init();
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wide && multiplies_bf16_well()) return {layer_v4dot, attend_v4};
  if (wide) return {layer_v4, attend_v4};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {layer_v3, attend_v3};
  return {layer_base, attend_base};
}

struct Progress {
  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int64_t> done{0};
};

struct Shared {
  Layer layer;
  Builds builds;
  std::vector<Item> items;
  std::vector<int64_t> cuts[kStages];  // piece i is [cuts[i], cuts[i + 1])
  Progress progress[kStages];

  void work() {
    for (int stage = 0; stage < kStages; ++stage) {
      const std::vector<int64_t>& cut = cuts[stage];
      const int64_t count = int64_t(cut.size()) - 1;
      Progress& at = progress[stage];
      for (bool fresh = true;; fresh = false) {
        const int64_t i = at.next.fetch_add(1);
        if (i >= count) break;
        if (stage == kAttend)
          for (int64_t item = cut[i]; item < cut[i + 1]; ++item) builds.attend(layer.attention, items[item]);
        else
          builds.layer(layer, Stage(stage), cut[i], cut[i + 1], fresh);
        at.done.fetch_add(1, std::memory_order_release);
      }
      wait_for(at.done, count);
    }
  }
};

// Pieces of n columns: large ones first, so that threads seldom meet, small ones last, so that they end together.
std::vector<int64_t> cut_columns(int64_t n, int64_t threads) {
  std::vector<int64_t> cuts{0};
  while (cuts.back() < n) {
    const int64_t left = n - cuts.back(), share = (left / (2 * threads) + kUnit - 1) / kUnit * kUnit;
    cuts.push_back(cuts.back() + std::min(left, std::clamp(share, kUnit, kTile)));
  }
  return cuts;
}

std::vector<int64_t> cut_each(int64_t n) {
  std::vector<int64_t> cuts(n + 1);
  for (int64_t i = 0; i <= n; ++i) cuts[i] = i;
  return cuts;
}

// The queries of each row and KV head, one item each. Returns one past the last token of a row.
int64_t list_items(Shared& shared, const int32_t* starts, const int32_t* news, const int32_t* computed, int64_t rows) {
  const Layer& l = shared.layer;
  int64_t end = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t count = int32_t(std::min<int64_t>(news[r], l.tokens - starts[r]));
    if (count <= 0) continue;
    for (int32_t head = 0; head < l.attention.kv_heads; ++head)
      shared.items.push_back({int32_t(r), head, starts[r], count, computed[r]});
    end = std::max<int64_t>(end, starts[r] + count);
  }
  return end;
}

float* take(float*& scratch, int64_t count) {
  float* taken = scratch;
  scratch += (count + 15) / 16 * 16;
  return taken;
}

ffi::Error layer(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::F32> cos, ffi::Buffer<ffi::F32> sin,
                 ffi::AnyBuffer cache, ffi::Buffer<ffi::S32> page_table, ffi::Buffer<ffi::S32> query_starts,
                 ffi::Buffer<ffi::S32> num_new, ffi::Buffer<ffi::S32> num_computed, ffi::Buffer<ffi::S32> num_rows,
                 ffi::Buffer<ffi::S32> write_page, ffi::Buffer<ffi::S32> write_offset, ffi::RemainingArgs parts,
                 ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> cache_out,
                 ffi::Result<ffi::Buffer<ffi::F32>> scratch, int64_t present, int64_t layer_index, int64_t heads,
                 int64_t ffn, int64_t rounded, int64_t window, int64_t activation, float scale, float logit_cap, float eps,
                 float offset) {
  auto dims = x.dimensions(), pages = cache.dimensions();
  if (dims.size() != 2 || pages.size() != 6) return ffi::Error::InvalidArgument("x must be [T, D], cache rank 6");
  if (dims[0] > kMaxTokens) return ffi::Error::InvalidArgument("too many tokens");
  if (cache_out->untyped_data() != cache.untyped_data()) return ffi::Error::Internal("the cache was not donated");
  const bool wide_cache = cache.element_type() == ffi::DataType::F32;
  if (x.element_type() != ffi::DataType::F32 && x.element_type() != ffi::DataType::BF16)
    return ffi::Error::InvalidArgument("float32 or bfloat16 only");

  static const Builds builds = choose_builds();
  auto shared = std::make_shared<Shared>();
  shared->builds = builds;
  Layer& l = shared->layer;
  l = Layer{};
  l.tokens = dims[0], l.width = dims[1], l.ffn = ffn, l.half = cos.dimensions()[1];
  l.narrow = x.element_type() == ffi::DataType::BF16;
  l.activation = Activation(activation), l.eps = eps, l.offset = offset;
  l.x = x.untyped_data(), l.out = out->untyped_data();
  size_t given = 0;
  for (int part = 0; part < kParts; ++part) {
    if (!(present >> part & 1)) continue;
    auto buffer = parts.get<ffi::AnyBuffer>(given++);
    if (!buffer.has_value()) return ffi::Error::InvalidArgument("parts must be as many as are present");
    ffi::DataType wanted = part >= kQkvScale ? ffi::DataType::F32 : x.element_type();
    for (int weight = 0; weight < kWeights; ++weight)
      if (part == kWeightParts[weight] && buffer->element_type() == ffi::DataType::S8)
        l.codes[weight] = true, wanted = ffi::DataType::S8;
    if (buffer->element_type() != wanted)
      return ffi::Error::InvalidArgument("parts must be of x's type, scales float32, weights int8 or of x's type");
    l.parts[part] = buffer->untyped_data();
  }
  for (int weight = 0; weight < kWeights; ++weight) {
    l.rounded[weight] = rounded >> weight & 1;
    if ((l.codes[weight] || l.rounded[weight]) && !l.parts[kQkvScale + weight])
      return ffi::Error::InvalidArgument("a weight of codes without its scales");
  }
  l.sandwich = l.parts[kPostAttnNorm] != nullptr;
  l.cos = cos.typed_data(), l.sin = sin.typed_data();
  l.write_page = write_page.typed_data(), l.write_offset = write_offset.typed_data();

  Call& a = l.attention;
  a.heads = heads, a.kv_heads = pages[3], a.page_tokens = pages[4], a.head_size = pages[5], a.num_pages = pages[1];
  if (a.head_size % 16 || a.head_size > 256) return ffi::Error::InvalidArgument("head size must be 16 i <= 256");
  const int64_t layer_elements = pages[1] * pages[2] * pages[3] * pages[4] * pages[5];
  a.q_type = Type::kF32, a.cache_type = wide_cache ? Type::kF32 : Type::kBf16;
  a.cache = static_cast<const char*>(cache.untyped_data()) + layer_index * layer_elements * (wide_cache ? 4 : 2);
  a.page_table = page_table.typed_data(), a.max_pages = page_table.dimensions()[1];
  a.window = window, a.scale = scale, a.logit_cap = logit_cap;

  const int64_t all_heads = heads + 2 * a.kv_heads, mixed = heads * a.head_size;
  float* room = scratch->typed_data();
  l.mid = take(room, l.tokens * all_heads * a.head_size), l.attended = take(room, l.tokens * mixed);
  l.x1 = take(room, l.tokens * l.width), l.hidden = take(room, l.tokens * ffn);
  l.mixed = take(room, l.tokens * l.width);
  if (room - scratch->typed_data() > int64_t(scratch->element_count()))
    return ffi::Error::InvalidArgument("the scratch memory is too small");
  a.q = l.mid, a.q_heads = all_heads, a.out = l.attended;

  const int64_t rows = std::min<int64_t>(page_table.dimensions()[0], num_rows.typed_data()[0]);
  const int64_t end =
      list_items(*shared, query_starts.typed_data(), num_new.typed_data(), num_computed.typed_data(), rows);
  std::memset(l.attended + end * mixed, 0, (l.tokens - end) * mixed * 4);  // padding tokens: defined output

  const int64_t elements = l.width * (all_heads * a.head_size + mixed + 3 * ffn);
  const int64_t helpers = elements > kInlineElements ? pool.num_threads() - 1 : 0, threads = helpers + 1;
  for (int stage = 0; stage < kStages; ++stage) shared->cuts[stage] = {0};
  shared->cuts[kProject] = cut_columns(all_heads * a.head_size, threads);
  shared->cuts[kPlace] = cut_each(l.tokens);
  shared->cuts[kAttend] = cut_each(int64_t(shared->items.size()));
  shared->cuts[kOut] = shared->cuts[kDownwards] = cut_columns(l.width, threads);
  shared->cuts[kFeed] = cut_columns(ffn, threads);
  if (l.sandwich) shared->cuts[kAddMixed] = shared->cuts[kAddFed] = cut_each(l.tokens);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([shared] { shared->work(); });
  shared->work();
  return ffi::Error::Success();
}

}  // namespace
}  // namespace twinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(twinfer_cpu_layer, twinfer::layer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()          // x
                                  .Arg<ffi::Buffer<ffi::F32>>()   // cos [T, R / 2]
                                  .Arg<ffi::Buffer<ffi::F32>>()   // sin
                                  .Arg<ffi::AnyBuffer>()          // cache, donated
                                  .Arg<ffi::Buffer<ffi::S32>>()   // page_table [S, max_pages]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // query_starts [S]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // num_new [S]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // num_computed [S]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // num_rows [1]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // write_page [T]
                                  .Arg<ffi::Buffer<ffi::S32>>()   // write_offset [T]
                                  .RemainingArgs()                // parts
                                  .Ret<ffi::AnyBuffer>()          // out
                                  .Ret<ffi::AnyBuffer>()          // cache
                                  .Ret<ffi::Buffer<ffi::F32>>()   // scratch
                                  .Attr<int64_t>("present")
                                  .Attr<int64_t>("layer")
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("ffn")
                                  .Attr<int64_t>("rounded")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("activation")
                                  .Attr<float>("scale")
                                  .Attr<float>("logit_cap")
                                  .Attr<float>("eps")
                                  .Attr<float>("offset"));
