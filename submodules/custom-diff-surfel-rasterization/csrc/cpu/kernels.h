// The table of inner kernels. One object per CPU generation fills one; rasterize.cpp picks the best that runs here.
#pragma once
#include "../common/types.h"

// Tile of one image. Planes are (channels, H, W); null where not asked for. T = float or double.
template <class T> struct TileJob {
  const Record<T>* records;
  const T* features;                 // (N, F)
  const T* background;               // (F) or null
  const Pair* pairs;
  int count, channels, tile_x, tile_y, width, height;
  T near, depth_scale;               // depth_scale = far near/(far - near): m(d) = const - depth_scale/d
  // forward's results, read again by backward
  T *transmittance, *moments;        // moments: 1/d of the first surfel, sum w m, sum w m^2 (m relative to the first surfel's)
  int32_t *last, *median;            // 1 + index in `pairs` of the last blended surfel, of the median surfel; null in inference
  uint8_t* out_bytes;                // the features' planes as bytes, in place of out_features; or null
  T *out_features, *out_alpha, *out_depth, *out_normal, *out_median, *out_distortion;
  // backward
  const T *g_features, *g_alpha, *g_depth, *g_normal, *g_median, *g_distortion;
  T* slots;                          // (pairs, slot_stride): kGeometrySums geometry sums, then the features' gradient
  int slot_stride;
  T* g_background;                   // (F) of this tile, or null
  T* scratch;                        // scratch_size(channels) numbers, 64-byte aligned, one per thread
};

// Rows first .. last - 1 of one plane of the image loss (ssim.h).
template <class T> struct LossBand {
  const T *image, *target, *weight;  // planes; `weights` planes, or null
  int width, height, first, last, weights;
  T* gradient;                       // plane, or null: of `scale` times the plane's sum of similarities
  T scale;
  double* sums;                      // (1 + weights): of the similarities, of weight times |image - target|
  T* scratch;                        // kLossRows rows of loss_pitch(width) numbers, 64-byte aligned
};

constexpr int kLossRows = 85;
inline int64_t loss_pitch(int width) { return (width + 64) / 16 * 16; }

inline int64_t scratch_size(int channels) { return int64_t(kTilePixels) * (channels + 16) + 16 * channels; }

template <class T> struct Kernels {
  // Projects one surfel and writes (tile, block mask) for every tile it touches; returns how many, and its screen radius (0: culled).
  int (*place)(const Camera<T>&, const SurfelInput<T>&, T near, int cutoff, int width, int height, Record<T>&, int& radius,
               uint32_t* tiles, uint32_t* blocks);
  void (*project_backward)(const Camera<T>&, const SurfelInput<T>&, T near, int width, int height, const T* sums,
                           SurfelGradient<T>& out);
  // [channel count: kChannelPaths, 0 = any][aux maps or not]
  void (*forward[5][2])(const TileJob<T>&);
  void (*backward[5][2])(const TileJob<T>&);
  void (*loss_band)(const LossBand<T>&);
};

constexpr int kChannelPaths[5] = {0, 3, 4, 7, 8};
