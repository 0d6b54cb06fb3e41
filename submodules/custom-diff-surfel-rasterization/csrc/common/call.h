// What crosses the C interface of every back end. No functions here.
#pragma once
#include <cstdint>

// Mirrored by abi.py. Pointers are to contiguous arrays of the call's scalar type; strides are in elements between images, 0 when
// all images share the array. Outputs that are not wanted are null; `as_bytes`: out_features holds uint8, 255 for 1. Gradient outputs
// come zeroed.
struct Call {
  int64_t batch, surfels, channels, width, height, aux, cutoff, threads, as_bytes;
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

// Image loss: ssim (B), l1 (B, weights), and if wanted the gradient of the former, d_similarity (B, C, H, W). Backward makes d_image.
struct LossCall {
  int64_t batch, channels, height, width, weights, threads, s_weight;
  const void *image, *target, *weight;   // (B, C, H, W), likewise, (B or 1, weights, H, W) or null: one weight, 1 everywhere
  void *ssim, *l1, *d_similarity;
  void* partial;                         // CUDA's scratch of forward: 1 + weights numbers for each block of pixels, see cuda.py
  const void *g_ssim, *g_l1;
  void* d_image;
};

// A step of Adam on the first `used` arrays, of `count` numbers each; `rate` and `step` are one float each, the step counted from 1.
// `skip` is null, or one float: not 0, and nothing changes. CUDA only, by value to the kernel: it must stay below 4 KiB.
constexpr int kAdamArrays = 48;
struct AdamArray {
  void* value;
  const void* gradient;
  void *mean, *square;
  const float *rate, *step;
  int64_t count, first_block;            // `first_block` is set by the library
};
struct AdamCall {
  AdamArray arrays[kAdamArrays];
  int64_t used;
  double beta1, beta2, epsilon;
  const float* skip;
};
