// Vectors of floats, of the width of the instruction set this file is compiled for.
//
// Each isa_*.cpp sets the target and includes the kernels once. Everything lives in an anonymous namespace
// and uses no standard templates: an inline function compiled for AVX-512 must never be merged by the linker
// into code that runs on an older processor.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(GATE4D_AVX512) || defined(GATE4D_AVX2)
#include <immintrin.h>
#endif

#define GATE4D_INLINE inline __attribute__((always_inline))
// Loops over registers must unroll completely: an array that does not is kept in memory.
#define GATE4D_UNROLL _Pragma("GCC unroll 16")

namespace {

#if defined(GATE4D_AVX512)
constexpr int W = 16;  // lanes
constexpr int J = 8;   // rows of a register tile; J x 3 accumulators fit the 32 registers
#elif defined(GATE4D_AVX2)
constexpr int W = 8;
constexpr int J = 4;
#else
constexpr int W = 4;
constexpr int J = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));

GATE4D_INLINE vf load(const float* p) {
  vf x;
  memcpy(&x, p, sizeof x);
  return x;
}
GATE4D_INLINE vi load(const int32_t* p) {
  vi x;
  memcpy(&x, p, sizeof x);
  return x;
}
GATE4D_INLINE vu load(const uint32_t* p) {
  vu x;
  memcpy(&x, p, sizeof x);
  return x;
}
GATE4D_INLINE void store(float* p, vf x) { memcpy(p, &x, sizeof x); }
GATE4D_INLINE void store(uint32_t* p, vu x) { memcpy(p, &x, sizeof x); }

GATE4D_INLINE vf set1(float x) { return x - vf{}; }
GATE4D_INLINE vi set1(int32_t x) { return x - vi{}; }
GATE4D_INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }

GATE4D_INLINE bool any(vi mask) {
#if defined(GATE4D_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(GATE4D_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t bits = 0;
  for (int i = 0; i < W; ++i) bits |= mask[i];
  return bits != 0;
#endif
}

// a * b + c
GATE4D_INLINE vf fma(vf a, vf b, vf c) {
#if defined(GATE4D_AVX512)
  return _mm512_fmadd_ps(a, b, c);
#elif defined(GATE4D_AVX2)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

// 1 - a * b for numbers in [0, 1], with a small relative error also near 0.
GATE4D_INLINE vf one_minus_product(vf a, vf b) {
#if defined(GATE4D_AVX512) || defined(GATE4D_AVX2)
  return fma(a, -b, set1(1.0f));
#else
  return (1.0f - a) + a * (1.0f - b);  // the rounded product would lose what is left of 1
#endif
}

// The second operand where either is NaN, as x86 defines it: max(bound, x) keeps a NaN in x.
GATE4D_INLINE vf max(vf a, vf b) {
#if defined(GATE4D_AVX512)
  return _mm512_max_ps(a, b);
#elif defined(GATE4D_AVX2)
  return _mm256_max_ps(a, b);
#else
  return select(a > b, a, b);
#endif
}

// As max: min(bound, x) keeps a NaN in x.
GATE4D_INLINE vf min(vf a, vf b) {
#if defined(GATE4D_AVX512)
  return _mm512_min_ps(a, b);
#elif defined(GATE4D_AVX2)
  return _mm256_min_ps(a, b);
#else
  return select(a < b, a, b);
#endif
}

// A product as it is rounded: the compiler must not join it with the sum that follows into a fused multiply-add.
template <class V>
GATE4D_INLINE V rounded(V x) {
#if defined(GATE4D_AVX512)
  asm("" : "+v"(x));
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

GATE4D_INLINE vf sqrt(vf x) {
#if defined(GATE4D_AVX512)
  return _mm512_sqrt_ps(x);
#elif defined(GATE4D_AVX2)
  return _mm256_sqrt_ps(x);
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

GATE4D_INLINE float sum(vf x) {
  float s = 0;
  for (int i = 0; i < W; ++i) s += x[i];
  return s;
}

// Below this, 2^x is 0: the end of the denormals, or of the normal numbers where the exponent is built by hand.
#if defined(GATE4D_AVX512)
constexpr float ZERO_EXPONENT = -152.0f;
#else
constexpr float ZERO_EXPONENT = -127.0f;
#endif
GATE4D_INLINE vf clamp_exponent(vf x) { return max(set1(ZERO_EXPONENT), x); }

// 2^x for a clamped x <= 100 or so; NaN for NaN. Relative error under 1e-7.
GATE4D_INLINE vf exp2_clamped(vf x) {
#if defined(GATE4D_AVX512)
  const vf n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(GATE4D_AVX2)
  const vf n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf n = (x + magic) - magic;
#endif
  const vf f = x - n;
  vf p = set1(0.0013276472454890609f);
  p = fma(p, f, set1(0.009675540961325169f));
  p = fma(p, f, set1(0.05550713092088699f));
  p = fma(p, f, set1(0.24022120237350464f));
  p = fma(p, f, set1(0.6931469440460205f));
  p = fma(p, f, set1(1.0000001192092896f));
#if defined(GATE4D_AVX512)
  return _mm512_scalef_ps(p, n);
#else
  // n = -127 makes a factor of exactly 0. NaN travels in p.
  const vi exponent = __builtin_convertvector(select(n == n, n, vf{}), vi) + 127;
  return p * (vf)(exponent << 23);
#endif
}

GATE4D_INLINE vf exp2(vf x) { return exp2_clamped(clamp_exponent(x)); }

// log2(x) for normal x > 0; finite for 0 and denormals, so that 0 * log2(0) is 0. Absolute error under 2e-7, and the
// rounding of the result.
GATE4D_INLINE vf log2(vf x) {
#if defined(GATE4D_AVX512)
  // By 16ths of the mantissa: a third of the multiplications of one polynomial over all of it.
  const vf inverse = {0.969696999f, 0.914285719f, 0.864864886f, 0.820512831f, 0.780487776f, 0.744186044f,
                      0.711111128f, 0.680851042f, 0.653061211f, 0.627451003f, 0.603773594f, 0.581818163f,
                      0.561403513f, 0.542372882f, 0.524590135f, 0.507936537f};
  const vf log_of = {0.0443940759f, 0.129283011f, 0.209453329f, 0.285402209f, 0.357552052f, 0.426264763f,
                     0.491853058f,  0.554588914f, 0.614709854f, 0.67242527f,  0.727920413f, 0.781359732f,
                     0.832889974f,  0.882643044f, 0.930737436f, 0.977279842f};
  x = max(set1(1.17549435e-38f), x);
  const vf e = _mm512_getexp_ps(x), m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
  const __m512i part = _mm512_srli_epi32((__m512i)m, 19);
  const vf r = fma(m, _mm512_permutexvar_ps(part, inverse), set1(-1.0f));  // in [-1/33, 1/33]
  vf p = fma(r, set1(0.481229782f), set1(-0.721623659f));
  p = fma(p, r, set1(1.44269502f));
  return fma(p, r, e + _mm512_permutexvar_ps(part, log_of));
#else
  const vi bits = (vi)x;
  const vi e = (bits - 0x3f400000) >> 23;  // mantissa in [0.75, 1.5)
  const vf m = (vf)(bits - (e << 23)) - 1.0f;
  vf p = set1(-0.09588237851858139f);
  p = fma(p, m, set1(0.2038797289133072f));
  p = fma(p, m, set1(-0.25062817335128784f));
  p = fma(p, m, set1(0.29009759426116943f));
  p = fma(p, m, set1(-0.3603389263153076f));
  p = fma(p, m, set1(0.4808468520641327f));
  p = fma(p, m, set1(-0.7213506102561951f));
  p = fma(p, m, set1(1.4426952600479126f));
  return fma(p, m, __builtin_convertvector(e, vf));
#endif
}

// 16-bit storage types, converted at the edges of a kernel.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

GATE4D_INLINE float to_float(float x) { return x; }
GATE4D_INLINE float to_float(bf16 x) {
  const uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
GATE4D_INLINE float to_float(fp16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16;
  const uint32_t rest = x.bits & 0x7fff;
  float f;
  uint32_t u = (rest << 13) + 0x38000000u;  // rebias the exponent by 112
  if (rest >= 0x7c00) u += 0x38000000u;     // infinity and NaN keep the largest exponent
  memcpy(&f, &u, 4);
  if (rest < 0x0400) f = (float)rest * 0x1p-24f;  // zero and denormals
  memcpy(&u, &f, 4);
  u |= sign;
  memcpy(&f, &u, 4);
  return f;
}

GATE4D_INLINE void from_float(float x, float* out) { *out = x; }
GATE4D_INLINE void from_float(float x, bf16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  out->bits = x != x ? 0x7fc0 : (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
GATE4D_INLINE void from_float(float x, fp16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = (u >> 16) & 0x8000;
  u &= 0x7fffffff;
  uint32_t h;
  if (u > 0x7f800000) {
    h = 0x7e00;  // NaN
  } else if (u >= 0x477ff000) {
    h = 0x7c00;  // rounds to infinity
  } else if (u < 0x38800000) {
    float f;  // denormal: let the adder round
    memcpy(&f, &u, 4);
    f += 0.5f;
    memcpy(&h, &f, 4);
    h -= 0x3f000000;
  } else {
    h = (u + 0xfff + ((u >> 13) & 1) - 0x38000000) >> 13;
  }
  out->bits = (uint16_t)(h | sign);
}

GATE4D_INLINE vf load(const bf16* p) {
  vf x;
#if defined(GATE4D_AVX512)
  x = (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(GATE4D_AVX2)
  x = (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
#endif
  return x;
}
GATE4D_INLINE vf load(const fp16* p) {
  vf x;
#if defined(GATE4D_AVX512)
  x = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(GATE4D_AVX2)
  x = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  for (int i = 0; i < W; ++i) x[i] = to_float(p[i]);
#endif
  return x;
}
GATE4D_INLINE void store(bf16* p, vf x) {
#if defined(GATE4D_AVX512_BF16)
  const __m256bh y = _mm512_cvtneps_pbh(x);
  memcpy(p, &y, sizeof y);
#else
  for (int i = 0; i < W; ++i) from_float(x[i], p + i);
#endif
}
GATE4D_INLINE void store(fp16* p, vf x) {
#if defined(GATE4D_AVX512)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(GATE4D_AVX2)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < W; ++i) from_float(x[i], p + i);
#endif
}

// Whether none of n numbers is NaN or infinite.
inline bool all_finite(const float* x, int64_t n) {
  constexpr int32_t exponent = 0x7f800000;
  vi bad = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) bad |= ((vi)load(x + i) & exponent) == exponent;
  bool found = any(bad);
  for (; i < n; ++i) found |= x[i] - x[i] != 0;
  return !found;
}

// n elements of any storage type to floats and back.
template <class T>
GATE4D_INLINE void load_row(const T* from, int n, float* to) {
  int i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = to_float(from[i]);
}
template <class T>
GATE4D_INLINE void store_row(const float* from, int n, T* to) {
  int i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i));
  for (; i < n; ++i) from_float(from[i], to + i);
}

constexpr int round_up(int x, int step) { return (x + step - 1) / step * step; }
constexpr int min(int a, int b) { return a < b ? a : b; }
constexpr int max(int a, int b) { return a > b ? a : b; }

}  // namespace
