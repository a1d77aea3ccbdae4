// Vectors of TWINFER_LANES floats: loads that widen bfloat16, stores that round to it, sums across lanes.
//
// Included by the kernel files, which are compiled once per instruction set; everything is local to each of them.
#pragma once
#include <cstdint>
#include <cstring>

namespace twinfer {
namespace {

constexpr int kLanes = TWINFER_LANES;
typedef float Vec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2), aligned(2)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<Vec*>(p) = v; }
inline Vec splat(float x) { return x - Vec{}; }

inline Vec load(const uint16_t* p) {  // bfloat16 bits are the upper half of float32 bits
  UVec wide = __builtin_convertvector(*reinterpret_cast<const HVec*>(p), UVec) << 16;
  return reinterpret_cast<Vec&>(wide);
}
inline float widen(float x) { return x; }
inline float widen(uint16_t x) {
  uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void narrow(float x, float* p) { *p = x; }
inline void narrow(float x, uint16_t* p) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  *p = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Lane i of the result: the sum of lanes that are i apart in pairs, of a in the lower and b in the upper half.
inline Vec fold(Vec a, Vec b) {
  IVec low, high;
  for (int i = 0; i < kLanes / 2; ++i) {
    low[i] = 2 * i, high[i] = 2 * i + 1;
    low[i + kLanes / 2] = kLanes + 2 * i, high[i + kLanes / 2] = kLanes + 2 * i + 1;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
}

// The sums over lanes of eight vectors.
inline void sum8(const Vec* v, float* out) {
  float lanes[kLanes];
  if constexpr (kLanes == 16) {
    Vec all = fold(fold(fold(v[0], v[1]), fold(v[2], v[3])), fold(fold(v[4], v[5]), fold(v[6], v[7])));
    std::memcpy(lanes, &all, sizeof(all));
    for (int i = 0; i < 8; ++i) out[i] = lanes[2 * i] + lanes[2 * i + 1];
  } else if constexpr (kLanes == 8) {
    Vec all = fold(fold(fold(v[0], v[1]), fold(v[2], v[3])), fold(fold(v[4], v[5]), fold(v[6], v[7])));
    std::memcpy(out, &all, sizeof(all));
  } else {
    for (int half = 0; half < 2; ++half) {
      Vec all = fold(fold(v[4 * half], v[4 * half + 1]), fold(v[4 * half + 2], v[4 * half + 3]));
      std::memcpy(out + 4 * half, &all, sizeof(all));
    }
  }
}

inline float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace
}  // namespace twinfer
