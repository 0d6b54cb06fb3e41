// Chooses the inner kernels for this CPU.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include "kernels.h"

#define DECLARE(name)                        \
  const Kernels<float>* name##_float();      \
  const Kernels<double>* name##_double();
DECLARE(surfel_base)
#ifdef SURFEL_X86
DECLARE(surfel_avx2)
DECLARE(surfel_avx512)
#endif

enum Level { kBase, kAvx2, kAvx512 };

inline Level best_level() {
#ifdef SURFEL_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBase;
}

// The best set of kernels for this CPU. SURFEL_CPU = base | avx2 lowers the choice (for tests and bug reports).
inline Level level() {
  static const Level chosen = [] {
    const Level best = best_level();
    const char* name = std::getenv("SURFEL_CPU");
    if (name && !std::strcmp(name, "base")) return kBase;
    if (name && !std::strcmp(name, "avx2")) return std::min(best, kAvx2);
    return best;
  }();
  return chosen;
}

template <class T> const Kernels<T>* select_kernels();
#ifdef SURFEL_X86
#define SELECT(T) (level() == kAvx512 ? surfel_avx512_##T() : level() == kAvx2 ? surfel_avx2_##T() : surfel_base_##T())
#else
#define SELECT(T) surfel_base_##T()
#endif
template <> inline const Kernels<float>* select_kernels<float>() { return SELECT(float); }
template <> inline const Kernels<double>* select_kernels<double>() { return SELECT(double); }
