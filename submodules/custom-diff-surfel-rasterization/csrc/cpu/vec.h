// Vectors of pixels. Vec<T> is the widest vector of the CPU that this object is compiled for; a block of 16 pixels is 16/L of them.
// A generic form stands on the compiler's vector extensions (any CPU, float and double); float on AVX2 and AVX-512 is spelled out.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "../common/surfel.h"

namespace SURFEL_NAMESPACE {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float FloatReg __attribute__((vector_size(kVectorBytes)));
typedef double DoubleReg __attribute__((vector_size(kVectorBytes)));
typedef int32_t IntReg __attribute__((vector_size(kVectorBytes)));
typedef int64_t LongReg __attribute__((vector_size(kVectorBytes)));

template <class T> struct Vec {
  static constexpr int L = kVectorBytes / sizeof(T);
  static constexpr bool is_float = sizeof(T) == 4;
  using Int = std::conditional_t<is_float, int32_t, int64_t>;
  using Reg = std::conditional_t<is_float, FloatReg, DoubleReg>;
  using Mask = std::conditional_t<is_float, IntReg, LongReg>;
  Reg r;
  Vec() = default;
  Vec(Reg v) : r(v) {}
  Vec(T s) : r(s - Reg{}) {}
  Vec(int s) : Vec(T(s)) {}
  static Vec load(const T* p) { return Vec(*reinterpret_cast<const Reg*>(p)); }
  void store(T* p) const { *reinterpret_cast<Reg*>(p) = r; }
  static Vec load_unaligned(const T* p) {
    Vec v;
    std::memcpy(&v.r, p, sizeof(Reg));
    return v;
  }
  void store_unaligned(T* p) const { std::memcpy(p, &r, sizeof(Reg)); }
  friend Vec operator+(Vec a, Vec b) { return Vec(a.r + b.r); }
  friend Vec operator-(Vec a, Vec b) { return Vec(a.r - b.r); }
  friend Vec operator*(Vec a, Vec b) { return Vec(a.r * b.r); }
  friend Mask operator<(Vec a, Vec b) { return a.r < b.r; }
  friend Mask operator<=(Vec a, Vec b) { return a.r <= b.r; }
  friend Mask operator>(Vec a, Vec b) { return a.r > b.r; }
  friend Mask operator>=(Vec a, Vec b) { return a.r >= b.r; }
  friend Vec select(Mask m, Vec a, Vec b) { return Vec(m ? a.r : b.r); }
  friend Vec minimum(Vec a, Vec b) { return Vec(a.r < b.r ? a.r : b.r); }
  friend Vec maximum(Vec a, Vec b) { return Vec(a.r > b.r ? a.r : b.r); }
  friend Vec negative(Vec a) { return Vec(-a.r); }
  friend Vec fma(Vec a, Vec b, Vec c) { return Vec(a.r * b.r + c.r); }
  friend Vec reciprocal(Vec a) { return Vec(Reg{} + T(1)) / a; }
  friend Vec operator/(Vec a, Vec b) { return Vec(a.r / b.r); }
  friend Vec square_root(Vec a) {
    for (int i = 0; i < L; i++) a.r[i] = std::sqrt(a.r[i]);
    return a;
  }
  static bool any(Mask m) {
    Int s = 0;
    for (int i = 0; i < L; i++) s |= m[i];
    return s != 0;
  }
  friend T sum(Vec a) {
    T s = 0;
    for (int i = 0; i < L; i++) s += a.r[i];
    return s;
  }
  friend T highest(Vec a) {
    T s = a.r[0];
    for (int i = 1; i < L; i++) s = a.r[i] > s ? a.r[i] : s;
    return s;
  }
};

// 2^x by a degree-5 minimax polynomial on [-1/2, 1/2] (relative error 7.5e-8), x clamped to the normal numbers.
template <class V> inline V exp2_polynomial(V f) {
  V p = fma(V(1.327647199e-3f), f, V(9.675541334e-3f));
  p = fma(p, f, V(5.550713273e-2f));
  p = fma(p, f, V(2.402211972e-1f));
  p = fma(p, f, V(6.931469671e-1f));
  return fma(p, f, V(1.000000072f));
}

template <class T> inline Vec<T> exp2(Vec<T> x) {
  using V = Vec<T>;
  if constexpr (sizeof(T) == 4) {
    x = maximum(x, V(-126.f));
    const auto whole = __builtin_convertvector(x.r + (x.r < 0 ? V(-0.5f).r : V(0.5f).r), typename V::Mask);
    const V fraction(x.r - __builtin_convertvector(whole, typename V::Reg));
    const typename V::Mask bits = (whole + 127) << 23;
    return exp2_polynomial(fraction) * V((typename V::Reg)bits);
  } else {                           // double serves gradient checks: exact, not fast
    V out;
    for (int i = 0; i < V::L; i++) out.r[i] = std::exp2(x.r[i]);
    return out;
  }
}

#if defined(__AVX512F__)
template <> struct Vec<float> {
  static constexpr int L = 16;
  using Mask = __mmask16;
  __m512 r;
  Vec() = default;
  Vec(__m512 v) : r(v) {}
  Vec(float s) : r(_mm512_set1_ps(s)) {}
  Vec(int s) : Vec(float(s)) {}
  static Vec load(const float* p) { return _mm512_load_ps(p); }
  void store(float* p) const { _mm512_store_ps(p, r); }
  static Vec load_unaligned(const float* p) { return _mm512_loadu_ps(p); }
  void store_unaligned(float* p) const { _mm512_storeu_ps(p, r); }
  friend Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.r, b.r); }
  friend Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.r, b.r); }
  friend Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.r, b.r); }
  friend Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.r, b.r); }
  friend Vec square_root(Vec a) { return _mm512_sqrt_ps(a.r); }
  friend Mask operator<(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ); }
  friend Mask operator<=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_LE_OQ); }
  friend Mask operator>(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_GT_OQ); }
  friend Mask operator>=(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.r, b.r, _CMP_GE_OQ); }
  friend Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m, b.r, a.r); }
  friend Vec minimum(Vec a, Vec b) { return _mm512_min_ps(a.r, b.r); }
  friend Vec maximum(Vec a, Vec b) { return _mm512_max_ps(a.r, b.r); }
  friend Vec negative(Vec a) { return _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(a.r), _mm512_set1_epi32(INT32_MIN))); }
  friend Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.r, b.r, c.r); }
  friend Vec reciprocal(Vec a) {     // 14 bits and one Newton step
    const __m512 y = _mm512_rcp14_ps(a.r);
    return _mm512_fmadd_ps(y, _mm512_fnmadd_ps(a.r, y, _mm512_set1_ps(1.f)), y);
  }
  static bool any(Mask m) { return m != 0; }
  friend float sum(Vec a) { return _mm512_reduce_add_ps(a.r); }
  friend float highest(Vec a) { return _mm512_reduce_max_ps(a.r); }
};
template <> inline Vec<float> exp2(Vec<float> x) {
  x = maximum(x, Vec<float>(-126.f));
  const __m512 whole = _mm512_roundscale_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_polynomial(x - Vec<float>(whole)).r, whole);
}
#elif defined(__AVX2__)
template <> struct Vec<float> {
  static constexpr int L = 8;
  struct Mask {
    __m256 r;
    friend Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.r, b.r)}; }
  };
  __m256 r;
  Vec() = default;
  Vec(__m256 v) : r(v) {}
  Vec(float s) : r(_mm256_set1_ps(s)) {}
  Vec(int s) : Vec(float(s)) {}
  static Vec load(const float* p) { return _mm256_load_ps(p); }
  void store(float* p) const { _mm256_store_ps(p, r); }
  static Vec load_unaligned(const float* p) { return _mm256_loadu_ps(p); }
  void store_unaligned(float* p) const { _mm256_storeu_ps(p, r); }
  friend Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.r, b.r); }
  friend Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.r, b.r); }
  friend Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.r, b.r); }
  friend Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.r, b.r); }
  friend Vec square_root(Vec a) { return _mm256_sqrt_ps(a.r); }
  friend Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ)}; }
  friend Mask operator<=(Vec a, Vec b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_LE_OQ)}; }
  friend Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_GT_OQ)}; }
  friend Mask operator>=(Vec a, Vec b) { return {_mm256_cmp_ps(a.r, b.r, _CMP_GE_OQ)}; }
  friend Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.r, a.r, m.r); }
  friend Vec minimum(Vec a, Vec b) { return _mm256_min_ps(a.r, b.r); }
  friend Vec maximum(Vec a, Vec b) { return _mm256_max_ps(a.r, b.r); }
  friend Vec negative(Vec a) { return _mm256_xor_ps(a.r, _mm256_set1_ps(-0.f)); }
  friend Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.r, b.r, c.r); }
  friend Vec reciprocal(Vec a) {     // 12 bits and one Newton step
    const __m256 y = _mm256_rcp_ps(a.r);
    return _mm256_fmadd_ps(y, _mm256_fnmadd_ps(a.r, y, _mm256_set1_ps(1.f)), y);
  }
  static bool any(Mask m) { return _mm256_movemask_ps(m.r) != 0; }
  friend float sum(Vec a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  friend float highest(Vec a) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(a.r), _mm256_extractf128_ps(a.r, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
};
template <> inline Vec<float> exp2(Vec<float> x) {
  x = maximum(x, Vec<float>(-126.f));
  const __m256 whole = _mm256_round_ps(x.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23);
  return exp2_polynomial(x - Vec<float>(whole)) * Vec<float>(_mm256_castsi256_ps(bits));
}
#endif

}  // namespace SURFEL_NAMESPACE
