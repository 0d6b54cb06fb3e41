// The image loss: SSIM and weighted L1 of a square of pixels of one plane a block, and the gradient of the SSIM, in one pass over
// shared memory. A pixel's gradient comes from the 11x11 windows that hold it, and theirs from the 21x21 pixels around: a block reads
// kOut + 20 pixels a side, blurs along x, along y, has kOut + 10 similarities a side, and blurs their derivatives back.
// Within a pass every thread slides over a piece of a row or column, so that it reads a number from shared memory once.
#pragma once
#include "device.h"
#include "../common/ssim.h"

namespace surfel {

struct LossJob { int channels, width, height, weights, tiles_x, tiles; int64_t s_weight; };

constexpr int kLossThreads = 256;
constexpr int larger_of(int a, int b) { return a < b ? b : a; }

// Calls weigh(i, value) for the inputs of `kLength` windows that begin at `from`, `step` apart, and returns their sums in `out`.
template <int kLength, class T, class Value>
__device__ __forceinline__ void slide(T* out, Value value) {
#pragma unroll
  for (int i = 0; i < kLength; i++) out[i] = T(0);
#pragma unroll
  for (int i = 0; i < kLength + kReach; i++) {
    const T v = value(i);
#pragma unroll
    for (int k = 0; k < kLength; k++)
      if (i - k >= 0 && i - k < kWindow) out[k] = fma(v, window_weight<T>(i - k), out[k]);
  }
}

template <class T, bool kGradient> struct LossTile {
  static constexpr int kOut = sizeof(T) == 4 ? 32 : 16;              // pixels a side
  static constexpr int kMap = kOut + (kGradient ? kReach : 0);       // similarities a side, of windows that begin here
  static constexpr int kIn = kMap + kReach;
  static constexpr int kAcross = 11, kPieces = (kMap + kAcross - 1) / kAcross;     // first blur along x: a thread's piece of a row
  static constexpr int kDown = kMap == 42 ? 7 : kMap == 26 ? 13 : 4;               // then along y, of a column
  static constexpr int kBackAcross = kOut / 2, kBackDown = 4;                      // and of the derivatives
  // odd distances between rows: no bank conflicts where neighbouring threads have neighbouring rows
  static constexpr int kInPitch = (kPieces * kAcross + kReach) | 1, kPitch = kMap | 1, kOutPitch = kOut | 1;
  static constexpr int kFirst = larger_of(2 * kIn * kInPitch, kGradient ? 3 * kMap * kPitch : 0);
  static constexpr int kSecond = larger_of(2 * kIn * kPitch, kGradient ? 3 * kMap * kOutPitch : 0);
  static_assert(kMap % kDown == 0 && kMap / kDown * kMap <= kLossThreads && kPieces * kIn <= kLossThreads, "one piece a thread");
  static_assert(6 * kMap <= kLossThreads && kOut / kBackDown * kOut <= kLossThreads, "one piece a thread");
};

// partial (blocks, 1 + weights): the block's sums of similarities and of weight times |x - y|.
template <class T, bool kGradient>
__global__ void __launch_bounds__(kLossThreads, 3)
loss_tiles(const LossJob j, const T* image, const T* target, const T* weight, T* gradient, T* partial) {
  using L = LossTile<T, kGradient>;
  __shared__ T first[L::kFirst], second[L::kSecond], warp_sums[kLossThreads / kWarp];
  const int thread = threadIdx.x, plane = blockIdx.y, tile = blockIdx.x;
  const int x0 = tile % j.tiles_x * L::kOut, y0 = tile / j.tiles_x * L::kOut;
  const int begin_x = kGradient ? x0 - kReach : x0, begin_y = kGradient ? y0 - kReach : y0;      // the first window's corner
  const int64_t area = int64_t(j.width) * j.height;
  image += plane * area;
  target += plane * area;

  T* const xs = first;
  T* const ys = first + L::kIn * L::kInPitch;
  for (int i = thread; i < L::kIn * L::kIn; i += kLossThreads) {
    const int row = i / L::kIn, column = i - row * L::kIn, y = begin_y + row, x = begin_x + column;
    const bool inside = x >= 0 && y >= 0 && x < j.width && y < j.height;
    const int64_t at = int64_t(y) * j.width + x;
    xs[row * L::kInPitch + column] = inside ? image[at] : T(0);
    ys[row * L::kInPitch + column] = inside ? target[at] : T(0);
  }
  __syncthreads();

  // Means of x and y, then of x^2 + y^2 and x y: along x into `second`, along y into registers.
  T* const across0 = second;
  T* const across1 = second + L::kIn * L::kPitch;
  const int column = thread % L::kMap, top = thread / L::kMap * L::kDown;
  const bool has_windows = thread < L::kMap * (L::kMap / L::kDown);
  T moments[4][L::kDown];
#pragma unroll
  for (int pass = 0; pass < 2; pass++) {
    if (thread < L::kIn * L::kPieces) {
      const int row = thread % L::kIn, left = thread / L::kIn * L::kAcross;
      const T* const x = xs + row * L::kInPitch + left;
      const T* const y = ys + row * L::kInPitch + left;
      T out[L::kAcross];
#pragma unroll
      for (int q = 0; q < 2; q++) {
        if (pass == 0)
          slide<L::kAcross>(out, [&](int i) { return q == 0 ? x[i] : y[i]; });
        else
          slide<L::kAcross>(out, [&](int i) { return q == 0 ? fma(x[i], x[i], y[i] * y[i]) : x[i] * y[i]; });
        T* const to = (q == 0 ? across0 : across1) + row * L::kPitch + left;
#pragma unroll
        for (int k = 0; k < L::kAcross; k++)
          if (left + k < L::kMap) to[k] = out[k];
      }
    }
    __syncthreads();
    if (has_windows) {
      slide<L::kDown>(moments[2 * pass], [&](int i) { return across0[(top + i) * L::kPitch + column]; });
      slide<L::kDown>(moments[2 * pass + 1], [&](int i) { return across1[(top + i) * L::kPitch + column]; });
    }
    if (pass == 0) __syncthreads();
  }

  T* const slopes = first;                       // the pixels are no longer needed
  T similar = 0;
  if (has_windows) {
#pragma unroll
    for (int k = 0; k < L::kDown; k++) {
      const int row = top + k, x = begin_x + column, y = begin_y + row;
      const bool inside = x >= 0 && y >= 0 && x < j.width - kReach && y < j.height - kReach;
      const Similarity<T> s = similarity<T>(moments[0][k], moments[1][k], moments[2][k], moments[3][k]);
      if (inside && x >= x0 && y >= y0) similar += s.value;
      if (kGradient) {
        T* const to = slopes + row * L::kPitch + column;
        to[0] = inside ? s.d_mean : T(0);
        to[L::kMap * L::kPitch] = inside ? s.d_squares : T(0);
        to[2 * L::kMap * L::kPitch] = inside ? s.d_product : T(0);
      }
    }
  }
  __syncthreads();

  if (kGradient && thread < 6 * L::kMap) {       // a row of one of the three, in two halves
    const int row = thread % L::kMap, which = thread / L::kMap, q = which / 2, left = which % 2 * L::kBackAcross;
    const T* const from = slopes + (q * L::kMap + row) * L::kPitch + left;
    T* const to = second + (q * L::kMap + row) * L::kOutPitch + left;
    T out[L::kBackAcross];
    slide<L::kBackAcross>(out, [&](int i) { return from[i]; });
#pragma unroll
    for (int k = 0; k < L::kBackAcross; k++) to[k] = out[k];
  }
  __syncthreads();

  const int own_x = x0 + thread % L::kOut, own_row = thread / L::kOut * L::kBackDown;
  const bool has_pixels = own_row < L::kOut && own_x < j.width;
  T difference[L::kBackDown] = {};
  if (has_pixels) {
    T spread[3][L::kBackDown];
    if (kGradient)
#pragma unroll
      for (int q = 0; q < 3; q++)
        slide<L::kBackDown>(spread[q], [&](int i) { return second[(q * L::kMap + own_row + i) * L::kOutPitch + thread % L::kOut]; });
    const T scale = T(1) / (T(j.channels) * T(j.width - kReach) * T(j.height - kReach));
#pragma unroll
    for (int k = 0; k < L::kBackDown; k++) {
      if (y0 + own_row + k >= j.height) continue;
      const int64_t at = int64_t(y0 + own_row + k) * j.width + own_x;
      const T x = image[at], y = target[at];
      difference[k] = x < y ? y - x : x - y;
      if (kGradient) gradient[plane * area + at] = scale * (spread[0][k] + fma(y, spread[2][k], T(2) * x * spread[1][k]));
    }
  }

  // The block's sums.
  const int b = plane / j.channels;
  T* const out = partial + (int64_t(plane) * j.tiles + tile) * (1 + j.weights);
  for (int q = 0; q <= j.weights; q++) {
    T sum = q == 0 ? similar : T(0);
    if (q > 0 && has_pixels)
#pragma unroll
      for (int k = 0; k < L::kBackDown; k++) {
        if (y0 + own_row + k >= j.height) continue;
        const int64_t at = (q - 1) * area + int64_t(y0 + own_row + k) * j.width + own_x;
        sum = weight ? fma(weight[j.s_weight * b + at], difference[k], sum) : sum + difference[k];
      }
#pragma unroll
    for (int o = kWarp / 2; o > 0; o /= 2) sum += __shfl_xor_sync(kAllLanes, sum, o);
    if (thread % kWarp == 0) warp_sums[thread / kWarp] = sum;
    __syncthreads();
    if (thread == 0) {
      for (int w = 1; w < kLossThreads / kWarp; w++) sum += warp_sums[w];
      out[q] = sum;
    }
    __syncthreads();
  }
}

// A block per image and quantity adds up its tiles, in order.
template <class T> __global__ void __launch_bounds__(kLossThreads) loss_sums(const LossJob j, const T* partial, T* ssim, T* l1) {
  __shared__ double sums[kLossThreads];
  const int b = blockIdx.y, q = blockIdx.x, parts = j.channels * j.tiles;
  double sum = 0;
  for (int i = threadIdx.x; i < parts; i += kLossThreads) sum += partial[(int64_t(b) * parts + i) * (1 + j.weights) + q];
  sums[threadIdx.x] = sum;
  for (int half = kLossThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x > 0) return;
  if (q == 0)
    ssim[b] = T(sums[0] / (double(j.channels) * (j.width - kReach) * (j.height - kReach)));
  else
    l1[int64_t(b) * j.weights + q - 1] = T(sums[0] / (double(j.channels) * j.width * j.height));
}

constexpr int kLossPixels = 4;                   // a thread

template <class T> __global__ void __launch_bounds__(kLossThreads)
loss_gradient(const LossJob j, const T* image, const T* target, const T* weight, const T* similarity, const T* g_ssim, const T* g_l1,
              T* out) {
  const int plane = blockIdx.y, b = plane / j.channels;
  const int64_t area = int64_t(j.width) * j.height, first = int64_t(blockIdx.x) * (kLossThreads * kLossPixels) + threadIdx.x;
  const T through_ssim = g_ssim ? g_ssim[b] : T(0), scale = T(1) / (T(j.channels) * T(area));
#pragma unroll
  for (int i = 0; i < kLossPixels; i++) {
    const int64_t pixel = first + i * kLossThreads, at = plane * area + pixel;
    if (pixel >= area) continue;
    const T x = image[at], y = target[at];
    T l1 = 0;
    if (g_l1)
      for (int q = 0; q < j.weights; q++)
        l1 = fma(g_l1[b * j.weights + q], weight ? weight[j.s_weight * b + q * area + pixel] : T(1), l1);
    out[at] = fma(through_ssim, similarity[at], x == y ? T(0) : x < y ? -l1 * scale : l1 * scale);
  }
}

}  // namespace surfel
