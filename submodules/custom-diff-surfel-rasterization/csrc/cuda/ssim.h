// The image loss: SSIM and weighted L1 of a square of pixels of one plane a block, and the gradient of the SSIM, in one pass over
// shared memory. A pixel's gradient comes from the 11x11 windows that hold it, and theirs from the 21x21 pixels around: a block reads
// kOut + 20 pixels a side, blurs along y, along x, has kOut + 10 similarities a side, and blurs their derivatives back.
// Within a pass every thread slides over a piece of a row or column, so that it reads a number from shared memory once.
#pragma once
#include "device.h"
#include "../common/ssim.h"

namespace surfel {

struct LossJob { int channels, width, height, weights, tiles_x, tiles; int64_t s_weight; };

constexpr int kLossThreads = 256;
constexpr int larger_of(int a, int b) { return a < b ? b : a; }

// kMaps maps under kLength neighbouring windows: read(i, v) gives their numbers at place i of the kLength + 10.
template <int kMaps, int kLength, class T, class Read>
__device__ __forceinline__ void slide(T (*out)[kLength], Read read) {
#pragma unroll
  for (int q = 0; q < kMaps; q++)
#pragma unroll
    for (int k = 0; k < kLength; k++) out[q][k] = T(0);
#pragma unroll
  for (int i = 0; i < kLength + kReach; i++) {
    T v[kMaps];
    read(i, v);
#pragma unroll
    for (int k = 0; k < kLength; k++)
      if (i - k >= 0 && i - k < kWindow)
#pragma unroll
        for (int q = 0; q < kMaps; q++) out[q][k] = fma(v[q], window_weight<T>(i - k), out[q][k]);
  }
}

// The sign of the difference, -1, 0 or 1, travels in the last two bits of the gradient of the similarity (an error of 4e-7 in it):
// backward need not read the pictures again.
// Either type's low half comes first in memory.
template <class T> SURFEL_FN T with_sign(T value, int sign) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = (bits & ~3u) | uint32_t(sign + 1);
  memcpy(&value, &bits, 4);
  return value;
}
template <class T> SURFEL_FN int sign_of(T value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return int(bits & 3u) - 1;
}

template <class T, bool kGradient> struct LossTile {
  static constexpr int kOut = sizeof(T) == 4 ? 32 : 16;              // pixels a side
  static constexpr int kMap = kOut + (kGradient ? kReach : 0);       // similarities a side, of windows that begin here
  static constexpr int kIn = kMap + kReach;
  static constexpr int kDown = 11, kPieces = (kMap + kDown - 1) / kDown;           // first blur along y: a thread's piece of a column
  static constexpr int kAcross = kMap == 42 ? 7 : kMap == 26 ? 13 : 4;             // then along x, of a row
  static constexpr int kBackAcross = kOut / 2, kBackDown = 4;                      // and of the derivatives
  // odd distances between rows: no bank conflicts where neighbouring threads have neighbouring rows
  static constexpr int kInPitch = kIn | 1, kPitch = kMap | 1, kOutPitch = kOut | 1;
  static constexpr int kMoments = 4 * kMap * kInPitch, kSlopes = kGradient ? 3 * kMap * kPitch : 0;
  static constexpr int kShared = larger_of(kMoments, kSlopes + (kGradient ? 3 * kMap * kOutPitch : 0));
  static_assert(kMap % kAcross == 0 && kMap / kAcross * kMap <= kLossThreads && kPieces * kIn <= kLossThreads, "one piece a thread");
  static_assert(6 * kMap <= kLossThreads && kOut / kBackDown * kOut <= kLossThreads, "one piece a thread");
};

// partial (blocks, 1 + weights): the block's sums of similarities and of weight times |x - y|.
template <class T, bool kGradient>
__global__ void __launch_bounds__(kLossThreads, 4)
loss_tiles(const LossJob j, const T* image, const T* target, const T* weight, T* gradient, T* partial) {
  using L = LossTile<T, kGradient>;
  __shared__ T buffer[L::kShared], warp_sums[kLossThreads / kWarp];
  const int thread = threadIdx.x, plane = blockIdx.y, tile = blockIdx.x;
  const int x0 = tile % j.tiles_x * L::kOut, y0 = tile / j.tiles_x * L::kOut;
  const int begin_x = kGradient ? x0 - kReach : x0, begin_y = kGradient ? y0 - kReach : y0;      // the first window's corner
  const int64_t area = int64_t(j.width) * j.height;
  image += plane * area;
  target += plane * area;

  // Means of x, y, x^2 + y^2 and x y under the window: along y into shared memory, along x into registers.
  if (thread < L::kIn * L::kPieces) {
    const int column = thread % L::kIn, top = thread / L::kIn * L::kDown, x = begin_x + column, y = begin_y + top;
    const bool inside_x = (unsigned)x < (unsigned)j.width;
    T down[4][L::kDown];
    slide<4, L::kDown>(down, [&](int i, T* v) {
      const bool inside = inside_x && (unsigned)(y + i) < (unsigned)j.height;
      const int at = (y + i) * j.width + x;
      const T a = inside ? image[at] : T(0), b = inside ? target[at] : T(0);
      v[0] = a;
      v[1] = b;
      v[2] = fma(a, a, b * b);
      v[3] = a * b;
    });
#pragma unroll
    for (int k = 0; k < L::kDown; k++)
      if (top + k < L::kMap)
#pragma unroll
        for (int q = 0; q < 4; q++) buffer[(q * L::kMap + top + k) * L::kInPitch + column] = down[q][k];
  }
  __syncthreads();
  const int row = thread % L::kMap, left = thread / L::kMap * L::kAcross;
  const bool has_windows = thread < L::kMap * (L::kMap / L::kAcross);
  T moments[4][L::kAcross];
  if (has_windows)
    slide<4, L::kAcross>(moments, [&](int i, T* v) {
#pragma unroll
      for (int q = 0; q < 4; q++) v[q] = buffer[(q * L::kMap + row) * L::kInPitch + left + i];
    });
  __syncthreads();

  T* const slopes = buffer;                      // in place of the means
  T* const back = buffer + L::kSlopes;
  T similar = 0;
  if (has_windows) {
#pragma unroll
    for (int k = 0; k < L::kAcross; k++) {
      const int x = begin_x + left + k, y = begin_y + row;
      const bool inside = x >= 0 && y >= 0 && x < j.width - kReach && y < j.height - kReach;
      const Similarity<T> s = similarity<T>(moments[0][k], moments[1][k], moments[2][k], moments[3][k]);
      if (inside && x >= x0 && y >= y0) similar += s.value;
      if (kGradient) {
        T* const to = slopes + row * L::kPitch + left + k;
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
    T* const to = back + (q * L::kMap + row) * L::kOutPitch + left;
    T out[1][L::kBackAcross];
    slide<1, L::kBackAcross>(out, [&](int i, T* v) { v[0] = from[i]; });
#pragma unroll
    for (int k = 0; k < L::kBackAcross; k++) to[k] = out[0][k];
  }
  __syncthreads();

  const int own_x = x0 + thread % L::kOut, own_row = thread / L::kOut * L::kBackDown;
  const bool has_pixels = own_row < L::kOut && own_x < j.width;
  T difference[L::kBackDown] = {};
  if (has_pixels) {
    T spread[3][L::kBackDown];
    if (kGradient)
      slide<3, L::kBackDown>(spread, [&](int i, T* v) {
#pragma unroll
        for (int q = 0; q < 3; q++) v[q] = back[(q * L::kMap + own_row + i) * L::kOutPitch + thread % L::kOut];
      });
    const T scale = T(1) / (T(j.channels) * T(j.width - kReach) * T(j.height - kReach));
#pragma unroll
    for (int k = 0; k < L::kBackDown; k++) {
      if (y0 + own_row + k >= j.height) continue;
      const int64_t at = int64_t(y0 + own_row + k) * j.width + own_x;
      const T x = image[at], y = target[at];
      difference[k] = x < y ? y - x : x - y;
      if (kGradient)
        gradient[plane * area + at] =
            with_sign(scale * (spread[0][k] + fma(y, spread[2][k], T(2) * x * spread[1][k])), (x > y) - (x < y));
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
loss_gradient(const LossJob j, const T* weight, const T* similarity, const T* g_ssim, const T* g_l1, T* out) {
  const int plane = blockIdx.y, b = plane / j.channels;
  const int64_t area = int64_t(j.width) * j.height, first = int64_t(blockIdx.x) * (kLossThreads * kLossPixels) + threadIdx.x;
  const T through_ssim = g_ssim ? g_ssim[b] : T(0), scale = T(1) / (T(j.channels) * T(area));
#pragma unroll
  for (int i = 0; i < kLossPixels; i++) {
    const int64_t pixel = first + i * kLossThreads, at = plane * area + pixel;
    if (pixel >= area) continue;
    const T s = similarity[at];
    T l1 = 0;
    if (g_l1)
      for (int q = 0; q < j.weights; q++)
        l1 = fma(g_l1[b * j.weights + q], weight ? weight[j.s_weight * b + q * area + pixel] : T(1), l1);
    out[at] = fma(through_ssim, s, l1 * scale * T(sign_of(s)));
  }
}

}  // namespace surfel
