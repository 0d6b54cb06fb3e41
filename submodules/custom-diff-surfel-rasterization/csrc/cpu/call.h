// What crosses the C interface, and the host code's small tools.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>

// Mirrored by cpu.py. Pointers are to contiguous arrays of the call's scalar type; strides are in elements between images, 0 when
// all images share the array. Outputs that are not wanted are null. Gradient outputs come zeroed.
struct Call {
  int64_t batch, surfels, channels, width, height, aux, cutoff, threads;
  double near, far;
  int64_t s_means, s_quats, s_scales, s_opacities, s_features, s_viewmats, s_Ks, s_background;
  const void *means, *quats, *scales, *opacities, *features, *viewmats, *Ks, *background;
  void *out_features, *out_alpha, *out_depth, *out_normal, *out_median, *out_distortion;
  int32_t* radii;
  void* state;                       // transmittance (B,H,W), [moments (B,3,H,W)], last (B,H,W), [median (B,H,W)]
  const void *g_features, *g_alpha, *g_depth, *g_normal, *g_median, *g_distortion;
  void *d_means, *d_quats, *d_scales, *d_opacities, *d_features, *d_background, *d_screen;
};

struct ShCall {
  int64_t batch, surfels, coefficients, degree, threads;
  int64_t s_means, s_sh, s_viewmats;
  const void *means, *sh, *viewmats;
  void* colours;
  const void* g_colours;
  void *d_means, *d_sh;
};

// 64-byte aligned, uninitialised, grows only.
template <class T> class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* reserve(size_t count) {
    if (count > capacity_) {
      std::free(data_);
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      capacity_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  T& operator[](size_t i) { return data_[i]; }
  T* get() { return data_; }

 private:
  T* data_ = nullptr;
  size_t capacity_ = 0;
};
