// A whole decoder layer for a few tokens on the CPU: what every build of cpu_layer_kernel.cc implements.
//
// cpu_layer.cc owns the jax.ffi entry, the pieces of work and the threads. A layer goes through Stages in order; the
// pieces of one stage are independent of each other and need all of the stages before.
#pragma once
#include <cstdint>

#include "cpu_attention.h"
#include "cpu_linear.h"

namespace twinfer {

enum class Activation : int64_t { kSilu = 0, kGeluTanh = 1, kGelu = 2 };

// Arrays of a layer, in the order in which they are handed over; a layer lacks some of them.
enum Part {
  kAttnNorm, kQkv, kQkvBias, kQNorm, kKNorm, kO, kOBias, kPostAttnNorm,
  kFfnNorm, kGateUp, kGateUpBias, kDown, kDownBias, kPostFfnNorm,
  kQkvScale, kOScale, kGateUpScale, kDownScale,      // float32, a factor for each column of the product
  kQkvFixed, kOFixed, kGateUpFixed, kDownFixed,      // float32, the fixed scale of a product's inputs
  kParts
};

// A product's weight, and where its scales stand from kQkvScale and kQkvFixed on.
enum Weight { kOfQkv, kOfO, kOfGateUp, kOfDown, kWeights };
constexpr Part kWeightParts[kWeights] = {kQkv, kO, kGateUp, kDown};

enum Stage {
  kProject,   // mid = qkv(norm(x)); pieces of its columns
  kPlace,     // norms and turns of heads, keys and values to their pages; pieces of tokens
  kAttend,    // attended; pieces are attention's items
  kOut,       // x1 = x + o(attended), or mixed = o(attended) with sandwich norms; pieces of columns
  kAddMixed,  // x1 = x + norm(mixed); pieces of tokens
  kFeed,      // hidden = act(gate(norm(x1))) * up(norm(x1)); pieces of columns
  kDownwards, // out = x1 + down(hidden), or mixed = down(hidden); pieces of columns
  kAddFed,    // out = x1 + norm(mixed); pieces of tokens
  kStages
};

// Letters: T tokens, D width, N query heads, K KV heads, H head size, F ffn width, R turned dims of a head.
// x, out and the parts are of one type, float32 or bfloat16; everything between is float32 rounded to that type.
struct Layer {
  int64_t tokens, width, ffn, half;  // T, D, F, R / 2; N, K and H stand in `attention`
  bool narrow;                       // bfloat16
  bool sandwich;
  Activation activation;
  float eps, offset;
  const void* x;  // [T, D]
  void* out;      // [T, D]
  const void* parts[kParts];
  bool codes[kWeights];    // the weight is int8; its column factors are there
  bool rounded[kWeights];  // inputs are rounded to int8 first, by token or by their fixed scale
  const float* cos;  // [T, R / 2]
  const float* sin;
  const int32_t* write_page;    // [T]
  const int32_t* write_offset;  // [T]
  Call attention;               // q is mid, out is attended
  float* mid;                   // [T, N + 2K, H]
  float* attended;              // [T, N, H]
  float* x1;                    // [T, D]
  float* hidden;                // [T, F]
  float* mixed;                 // [T, D]
};

constexpr int64_t kMaxTokens = 16;
constexpr int64_t kTile = 192;  // most columns of a piece

// One build's function: pieces [first, last) of a stage. A thread passes `fresh` with its first pieces of a stage: what
// it keeps from there on (the normed and packed rows of x) is of that stage.
using LayerKernel = void (*)(const Layer&, Stage, int64_t first, int64_t last, bool fresh);
void layer_base(const Layer&, Stage, int64_t, int64_t, bool);
void layer_v3(const Layer&, Stage, int64_t, int64_t, bool);     // AVX2 and FMA
void layer_v4(const Layer&, Stage, int64_t, int64_t, bool);     // AVX-512
void layer_v4dot(const Layer&, Stage, int64_t, int64_t, bool);  // AVX-512 with products of bfloat16

}  // namespace twinfer
