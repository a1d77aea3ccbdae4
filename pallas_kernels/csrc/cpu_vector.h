// Vectors of TWINFER_LANES floats: loads that widen bfloat16, stores that round to it, sums across lanes.
//
// Included by the kernel files, which are compiled once per instruction set; everything is local to each of them.
#pragma once
#include <cstdint>
#include <cstring>

#include <immintrin.h>

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
inline Vec load(const int8_t* p) {  // g++ 12 makes scalar code of __builtin_convertvector from bytes
#if TWINFER_LANES == 16 && defined(__AVX512F__)
  return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif TWINFER_LANES == 8 && defined(__AVX2__)
  return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  int32_t four;
  Vec out{};
  for (int i = 0; i < kLanes; i += 4) {
    std::memcpy(&four, p + i, 4);
    const __m128 wide = _mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four)));
    std::memcpy(reinterpret_cast<float*>(&out) + i, &wide, 16);
  }
  return out;
#endif
}
inline float widen(float x) { return x; }
inline float widen(int8_t x) { return x; }
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

#ifdef __AVX512F__
// Lanes of a where Mask has 0, of b where it has 1, plus the others turned by Turn: one step of a sum across lanes that
// keeps the sums of both.
template <int Mask, int Level>
inline __m512 halve(__m512 a, __m512 b) {
  const __m512 kept = _mm512_mask_blend_ps(Mask, a, b);
  __m512 other = _mm512_mask_blend_ps(Mask, b, a);

  if constexpr (Level == 2) other = _mm512_shuffle_f32x4(other, other, 0xB1);
  if constexpr (Level == 1) other = _mm512_permute_ps(other, 0x4E);
  if constexpr (Level == 0) other = _mm512_permute_ps(other, 0xB1);
  return _mm512_add_ps(kept, other);
}
#endif

// The sums over lanes of eight vectors.
inline void sum8(const Vec* v, float* out) {
#ifdef __AVX512F__
  __m512 a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = halve<0xF0F0, 2>((__m512)v[i], (__m512)v[i + 4]);
  for (int i = 0; i < 2; ++i) b[i] = halve<0xCCCC, 1>(a[i], a[i + 2]);
  const __m512 all = halve<0xAAAA, 0>(b[0], b[1]);
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm512_castps512_ps256(all), high));
#else
  if constexpr (kLanes == 8) {
    Vec all = fold(fold(fold(v[0], v[1]), fold(v[2], v[3])), fold(fold(v[4], v[5]), fold(v[6], v[7])));
    std::memcpy(out, &all, sizeof(all));
  } else {
    for (int half = 0; half < 2; ++half) {
      Vec all = fold(fold(v[4 * half], v[4 * half + 1]), fold(v[4 * half + 2], v[4 * half + 3]));
      std::memcpy(out + 4 * half, &all, sizeof(all));
    }
  }
#endif
}

inline float sum(Vec v) {
  float lanes[kLanes];
  store(lanes, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// exp(x) for x <= 0, relative error below 2e-7: 2^n * p(r), r = x - n ln 2 (Cody-Waite), p of degree 6.
inline Vec exp(Vec x) {
  const Vec low = splat(-87.0f);
  IVec under = x < low;
  x = under ? low : x;
  Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low mantissa bits
  IVec n = reinterpret_cast<IVec&>(shifted) - 0x4b400000;
  Vec whole = shifted - 12582912.0f;
  Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  IVec power = (n + 127) << 23;
  Vec out = p * reinterpret_cast<Vec&>(power);
  return under ? Vec{} : out;
}

}  // namespace
}  // namespace twinfer
