// Kernels over surfels: gradients of the inputs from the per-surfel sums, SH colours, and the background's gradient.
#pragma once
#include "device.h"
#include "../common/sh.h"

namespace surfel {

// A thread per surfel and per `images` images (1, or all of them when an input is shared: its gradient is summed in registers).
template <class T> __global__ void __launch_bounds__(128) surfel_gradients(const Job<T> j, int images) {
  __shared__ Camera<T> camera;
  const int n = blockIdx.x * blockDim.x + threadIdx.x, b0 = blockIdx.y * images;
  SurfelGradient<T> shared{};
  for (int b = b0; b < b0 + images; b++) {
    share_camera(j, b, camera);
    if (n >= j.surfels) continue;
    const int64_t i = int64_t(b) * j.surfels + n;
    const LoadedSurfel<T> surfel(j, b, n);
    const Four<T>* const from = reinterpret_cast<const Four<T>*>(j.sums + i * j.geometry_sums);
    T sums[kGeometrySums] = {};
    bool touched = false;                      // a culled surfel may hold NaN
#pragma unroll
    for (int q = 0; q < kGeometrySums / 4; q++) {
      if (4 * q >= j.geometry_sums) break;
      const Four<T> four = from[q];
#pragma unroll
      for (int k = 0; k < 4; k++) touched |= (sums[4 * q + k] = four.v[k]) != T(0);
    }
    SurfelGradient<T> g{};
    if (touched) project_backward(camera, surfel.input(), j.near, j.width, j.height, sums, g);
    for (int k = 0; k < 3; k++) shared.mean[k] += g.mean[k];
    for (int k = 0; k < 4; k++) shared.quat[k] += g.quat[k];
    for (int k = 0; k < 2; k++) shared.scale[k] += g.scale[k];
    shared.opacity += g.opacity;
    if (j.s_means)
      for (int k = 0; k < 3; k++) j.d_means[3 * i + k] = g.mean[k];
    if (j.s_quats)
      for (int k = 0; k < 4; k++) j.d_quats[4 * i + k] = g.quat[k];
    if (j.s_scales)
      for (int k = 0; k < 2; k++) j.d_scales[2 * i + k] = g.scale[k];
    if (j.s_opacities) j.d_opacities[i] = g.opacity;
    for (int k = 0; k < 2; k++) j.d_screen[2 * i + k] = g.screen[k];
  }
  if (n >= j.surfels) return;
  if (!j.s_means)
    for (int k = 0; k < 3; k++) j.d_means[3 * int64_t(n) + k] = shared.mean[k];
  if (!j.s_quats)
    for (int k = 0; k < 4; k++) j.d_quats[4 * int64_t(n) + k] = shared.quat[k];
  if (!j.s_scales)
    for (int k = 0; k < 2; k++) j.d_scales[2 * int64_t(n) + k] = shared.scale[k];
  if (!j.s_opacities) j.d_opacities[n] = shared.opacity;
}

// dL/d(background) = sum over pixels of the incoming gradient times the transmittance; blockIdx.y is (image, channel).
template <class T> __global__ void __launch_bounds__(256) background_gradient(const Job<T> j) {
  const int b = blockIdx.y / j.channels, c = blockIdx.y % j.channels;
  const int64_t area = int64_t(j.width) * j.height;
  const T *const g = j.g_features + int64_t(blockIdx.y) * area, *const trans = j.transmittance + b * area;
  T sum = 0;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < area; i += int64_t(gridDim.x) * blockDim.x)
    sum = fma(g[i], trans[i], sum);
  for (int o = kWarp / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
  if (threadIdx.x % kWarp == 0) atomicAdd(j.d_background + j.s_background * b + c, sum);
}

template <class T> __global__ void __launch_bounds__(128) sh_colours(const ShCall c) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, b = blockIdx.y;
  if (n >= c.surfels) return;
  T eye[3];
  camera_position(load_camera<T>(static_cast<const T*>(c.viewmats) + c.s_viewmats * b, nullptr), eye);
  sh_colour((int)c.degree, static_cast<const T*>(c.means) + c.s_means * b + 3 * n, eye,
            static_cast<const T*>(c.sh) + c.s_sh * b + 3 * c.coefficients * n, static_cast<T*>(c.colours) + 3 * (b * c.surfels + n));
}

// As surfel_gradients; the outputs come zeroed and are added to by one thread each.
template <class T> __global__ void __launch_bounds__(128) sh_gradients(const ShCall c, int images) {
  const int64_t n = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (n >= c.surfels) return;
  for (int64_t b = int64_t(blockIdx.y) * images; b < int64_t(blockIdx.y + 1) * images; b++) {
    T eye[3];
    camera_position(load_camera<T>(static_cast<const T*>(c.viewmats) + c.s_viewmats * b, nullptr), eye);
    const int64_t mean = c.s_means * b + 3 * n, sh = c.s_sh * b + 3 * c.coefficients * n;
    sh_colour_backward((int)c.degree, static_cast<const T*>(c.means) + mean, eye, static_cast<const T*>(c.sh) + sh,
                       static_cast<const T*>(c.g_colours) + 3 * (b * c.surfels + n), static_cast<T*>(c.d_means) + mean,
                       static_cast<T*>(c.d_sh) + sh);
  }
}

}  // namespace surfel
