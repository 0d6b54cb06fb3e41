// The tile kernels: a warp draws a tile of 8x8 pixels, P = 2 a lane, four warps a block each on its own; tiles are taken longest
// first. With P = 1 two warps share a tile, a half each: for few tiles, whose longest lists a single warp would be late with.
// A template draws F channels, `first` .. `first` + F - 1; other counts are drawn in several launches (see rasterize.cu). Aux maps,
// alpha and the state go with the launch of channel 0.
#pragma once
#include "device.h"
#include "../common/pixel.h"

namespace surfel {

constexpr int round_up(int n, int k) { return (n + k - 1) / k * k; }

// 32 surfels of a tile's list, in shared memory: record, features, [normal].
template <class T, int F, bool kAux> struct Stage {
  static constexpr int kNormal = kRecord + round_up(F, 4), kRow = kNormal + (kAux ? 4 : 0);
  alignas(16) T row[kWarp][kRow];
  uint32_t id[kWarp];

  __device__ __forceinline__ void load(const Job<T>& j, int b, int first, int lane, uint32_t surfel) {
    const int64_t i = int64_t(b) * j.surfels + surfel;
    T* const to = row[lane];
    id[lane] = surfel;
    const Four<T>* const from = reinterpret_cast<const Four<T>*>(j.records + i * kRecord);
#pragma unroll
    for (int k = 0; k < kRecord / 4; k++) reinterpret_cast<Four<T>*>(to)[k] = from[k];
    const T* const f = j.features + j.s_features * b + int64_t(surfel) * j.channels + first;
#pragma unroll
    for (int c = 0; c < F; c++) to[kRecord + c] = first + c < j.channels ? f[c] : T(0);
    if (kAux && j.normals)
      for (int k = 0; k < 3; k++) to[kNormal + k] = j.normals[3 * i + k];
  }
  __device__ __forceinline__ Record<T> record(int k) const {
    Record<T> s;
    const T* const from = row[k];
#pragma unroll
    for (int i = 0; i < kRecord; i++) (&s.centre_x)[i] = from[i];
    return s;
  }
};

// A warp's tile and its lanes' pixels: (x, y) and (x, y + 4).
template <int P> struct Place {
  int b, tile, x, y, lane;
  bool in_image[P];
};
template <class T, int P> __device__ __forceinline__ bool find_place(const Job<T>& j, int warp, Place<P>& p) {
  const int64_t position = int64_t(blockIdx.x) * kWarpsPerBlock + warp;
  if (position >= int64_t(j.images) * j.tiles * (2 / P)) return false;
  p.tile = j.tile_order[position / (2 / P)];
  p.lane = threadIdx.x % kWarp;
  p.b = p.tile / j.tiles;
  const int local = p.tile - p.b * j.tiles, ty = local / j.tiles_x, tx = local - ty * j.tiles_x;
  p.x = tx * kEdge + p.lane % kEdge;
  p.y = ty * kEdge + p.lane / kEdge + (P == 1 ? int(position % 2) * 4 : 0);
  for (int i = 0; i < P; i++) p.in_image[i] = p.x < j.width && p.y + 4 * i < j.height;
  return true;
}

template <int P> __device__ __forceinline__ bool any_of(const bool* v) {
  bool any = v[0];
  for (int i = 1; i < P; i++) any |= v[i];
  return any;
}

// Front to back.
template <class T, int F, bool kAux, int P>
__global__ void __launch_bounds__(kWarpsPerBlock * kWarp) forward_tiles(const Job<T> j, int first) {
  __shared__ Stage<T, F, kAux> stages[kWarpsPerBlock];
  Place<P> p;
  if (!find_place(j, threadIdx.x / kWarp, p)) return;
  Stage<T, F, kAux>& stage = stages[threadIdx.x / kWarp];
  const TileList list = tile_list(j, p.tile);
  const T px = T(p.x) + T(0.5), py = T(p.y) + T(0.5);
  T trans[P], colour[P][F] = {};
  int last[P] = {};
  bool live[P];
  for (int i = 0; i < P; i++) {
    trans[i] = T(1);
    live[i] = p.in_image[i];
  }
  T depth[P] = {}, normal[P][3] = {}, median[P] = {}, nearest[P] = {}, moment1[P] = {}, moment2[P] = {}, distortion[P] = {};
  int median_index[P] = {};

  for (int base = 0; base < list.count; base += kWarp) {
    __syncwarp();
    if (base + p.lane < list.count) stage.load(j, p.b, first, p.lane, j.ids[list.start + base + p.lane]);
    __syncwarp();
    const int count = smaller(kWarp, list.count - base);
    for (int k = 0; k < count; k++) {
      const Record<T> s = stage.record(k);
      Hit<T, bool> hit[P];
      bool valid[P];
#pragma unroll
      for (int i = 0; i < P; i++) {
        hit[i] = meet<T, bool>(s, px, py + T(4 * i), j.near);
        valid[i] = hit[i].valid && live[i];
      }
      if (!__any_sync(kAllLanes, any_of<P>(valid))) continue;
      const T* const f = stage.row[k] + kRecord;
#pragma unroll
      for (int i = 0; i < P; i++) {
        if (!valid[i]) continue;
        const T alpha = minimum(hit[i].raw_alpha, T(kMaxAlpha)), before = trans[i], after = fma(-alpha, before, before);
        if (after < T(kMinTransmittance)) {
          live[i] = false;
          continue;
        }
        const T weight = alpha * before;
        trans[i] = after;
        last[i] = base + k + 1;
#pragma unroll
        for (int c = 0; c < F; c++) colour[i][c] = fma(weight, f[c], colour[i][c]);
        if (kAux) {
          const T d = hit[i].inverse_w * s.z;
          depth[i] = fma(weight, d, depth[i]);
          if (j.out_normal)
            for (int a = 0; a < 3; a++) normal[i][a] = fma(weight, stage.row[k][stage.kNormal + a], normal[i][a]);
          if (j.out_median && before > T(0.5)) {
            median[i] = d;
            median_index[i] = base + k + 1;
          }
          if (j.out_distortion) {    // unchanged by a shift of m, so m counts from the first surfel's: no cancellation near 1
            const T inverse_d = T(1) / d;
            if (before >= T(1)) nearest[i] = inverse_d;
            const T m = (nearest[i] - inverse_d) * j.depth_scale, wm = weight * m;
            const T gap = fma(m, m * (T(1) - before), moment2[i]) - T(2) * m * moment1[i];
            distortion[i] = fma(weight, gap, distortion[i]);
            moment1[i] += wm;
            moment2[i] = fma(wm, m, moment2[i]);
          }
        }
      }
    }
    if (!__any_sync(kAllLanes, any_of<P>(live))) break;
  }

  const int64_t area = int64_t(j.width) * j.height;
#pragma unroll
  for (int i = 0; i < P; i++) {
    if (!p.in_image[i]) continue;
    const int64_t pixel = int64_t(p.y + 4 * i) * j.width + p.x, at = p.b * area + pixel;
    const T* const back = j.background ? j.background + j.s_background * p.b : nullptr;
#pragma unroll
    for (int c = 0; c < F; c++)
      if (first + c < j.channels)
        j.out_features[(int64_t(p.b) * j.channels + first + c) * area + pixel] =
            back ? fma(back[first + c], trans[i], colour[i][c]) : colour[i][c];
    if (first > 0) continue;
    j.out_alpha[at] = T(1) - trans[i];
    if (j.last) {
      j.transmittance[at] = trans[i];
      j.last[at] = last[i];
    }
    if (kAux) {
      if (j.out_depth) j.out_depth[at] = depth[i];
      if (j.out_normal)
        for (int a = 0; a < 3; a++) j.out_normal[(3 * p.b + a) * area + pixel] = normal[i][a];
      if (j.out_median) j.out_median[at] = median[i];
      if (j.median) j.median[at] = median_index[i];
      if (j.out_distortion) j.out_distortion[at] = distortion[i];
      if (j.moments) {
        T* const m = j.moments + 3 * p.b * area + pixel;
        m[0] = nearest[i];
        m[area] = moment1[i];
        m[2 * area] = moment2[i];
      }
    }
  }
}

// Sums N values over the lanes, each sum into one lane: at every step a lane keeps half of its values and hands over the others,
// so N values cost about N shuffles in all. Afterwards values[0] of the lane holds the sum number scattered_index<N>(lane).
template <int N, int kDistance> struct ReduceScatter {
  template <class T> static __device__ __forceinline__ void run(T* values, int lane) {
    constexpr int kept = (N + 1) / 2;
    const bool upper = lane & kDistance;
#pragma unroll
    for (int i = 0; i < kept; i++) {
      const T other = i + kept < N ? values[i + kept] : T(0), sent = upper ? values[i] : other, own = upper ? other : values[i];
      values[i] = own + __shfl_xor_sync(kAllLanes, sent, kDistance);
    }
    ReduceScatter<kept, kDistance / 2>::run(values, lane);
  }
};
template <int N> struct ReduceScatter<N, 0> {
  template <class T> static __device__ __forceinline__ void run(T*, int) {}
};
// -1: the lane holds none.
template <int N> __device__ __forceinline__ int scattered_index(int lane) {
  int width = N, real = N, index = 0;          // values a lane stands for, of which `real` are not padding
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    const int kept = (width + 1) / 2;
    if (lane & distance) {
      index += kept;
      real -= kept;
    } else {
      real = smaller(real, kept);
    }
    width = kept;
  }
  return real > 0 ? index : -1;
}

// Back to front. With q the incoming gradient dotted with what the surfel shows and S the suffix sum of w q (started with the
// background and alpha terms), dL/dalpha = T q - S/(1 - alpha): two numbers of state whatever the channel count.
template <class T, int F, bool kAux, int P>
__global__ void __launch_bounds__(kWarpsPerBlock * kWarp) backward_tiles(const Job<T> j, int first) {
  __shared__ Stage<T, F, kAux> stages[kWarpsPerBlock];
  constexpr int kGeometry = kAux ? 16 : 12, kSums = kGeometry + F;
  Place<P> p;
  if (!find_place(j, threadIdx.x / kWarp, p)) return;
  Stage<T, F, kAux>& stage = stages[threadIdx.x / kWarp];
  const TileList list = tile_list(j, p.tile);
  if (list.count == 0) return;
  const int64_t area = int64_t(j.width) * j.height;
  const T px = T(p.x) + T(0.5), py = T(p.y) + T(0.5);
  T trans[P], suffix[P] = {}, g[P][F] = {};
  T g_depth[P] = {}, g_normal[P][3] = {}, g_median[P] = {}, g_distortion[P] = {};
  T nearest[P] = {}, moment1[P] = {}, moment2[P] = {}, mass[P] = {};
  int last[P] = {}, median[P] = {}, deepest = 0;
#pragma unroll
  for (int i = 0; i < P; i++) {
    trans[i] = T(1);
    if (!p.in_image[i]) continue;
    const int64_t pixel = int64_t(p.y + 4 * i) * j.width + p.x, at = p.b * area + pixel;
    last[i] = j.last[at];
    deepest = larger(deepest, last[i]);
    if (last[i] == 0) continue;
    trans[i] = j.transmittance[at];
    const T* const back = j.background ? j.background + j.s_background * p.b : nullptr;
    T start = j.g_alpha && first == 0 ? -j.g_alpha[at] : T(0);
#pragma unroll
    for (int c = 0; c < F; c++) {
      if (!j.g_features || first + c >= j.channels) continue;
      g[i][c] = j.g_features[(int64_t(p.b) * j.channels + first + c) * area + pixel];
      if (back) start = fma(back[first + c], g[i][c], start);
    }
    suffix[i] = start * trans[i];
    if (kAux) {
      mass[i] = T(1) - trans[i];
      if (j.g_depth) g_depth[i] = j.g_depth[at];
      if (j.g_normal)
        for (int a = 0; a < 3; a++) g_normal[i][a] = j.g_normal[(3 * p.b + a) * area + pixel];
      if (j.g_median) {
        g_median[i] = j.g_median[at];
        median[i] = j.median[at];
      }
      if (j.g_distortion) {
        const T* const m = j.moments + 3 * p.b * area + pixel;
        g_distortion[i] = j.g_distortion[at];
        nearest[i] = m[0];
        moment1[i] = m[area];
        moment2[i] = m[2 * area];
      }
    }
  }
#pragma unroll
  for (int o = kWarp / 2; o > 0; o /= 2) deepest = larger(deepest, __shfl_xor_sync(kAllLanes, deepest, o));

  // Where this lane's sum of every surfel goes: a column of `sums`, or of the features' gradient.
  const int column = scattered_index<kSums>(p.lane), channel = first + column - kGeometry;
  const bool to_geometry = column >= 0 && column < kGeometry;
  const bool to_feature = column >= kGeometry && channel < j.channels;
  T* const target = to_geometry ? j.sums + int64_t(p.b) * j.surfels * j.geometry_sums + column
                                : j.d_features + j.s_features * p.b + channel;
  const int64_t row = to_geometry ? j.geometry_sums : j.channels;

  for (int top = deepest; top > 0; top -= kWarp) {
    const int count = smaller(kWarp, top);
    __syncwarp();
    if (p.lane < count) stage.load(j, p.b, first, p.lane, j.ids[list.start + top - 1 - p.lane]);
    __syncwarp();
    for (int k = 0; k < count; k++) {
      const int index = top - k;               // 1 + index in the list, as `last` counts
      const Record<T> s = stage.record(k);
      Hit<T, bool> hit[P];
      bool blended[P];
#pragma unroll
      for (int i = 0; i < P; i++) {
        hit[i] = meet<T, bool>(s, px, py + T(4 * i), j.near);
        blended[i] = hit[i].valid && index <= last[i];
      }
      if (!__any_sync(kAllLanes, any_of<P>(blended))) continue;
      const T* const f = stage.row[k] + kRecord;
      T sums[kSums] = {};
#pragma unroll
      for (int i = 0; i < P; i++) {
        if (!blended[i]) continue;
        const T alpha = minimum(hit[i].raw_alpha, T(kMaxAlpha)), inverse = reciprocal(T(1) - alpha);
        const T before = trans[i] * inverse, weight = alpha * before;
        trans[i] = before;
        T q = 0, depth_grad = 0;
#pragma unroll
        for (int c = 0; c < F; c++) {
          q = fma(g[i][c], f[c], q);
          sums[kGeometry + c] = fma(weight, g[i][c], sums[kGeometry + c]);
        }
        if (kAux) {
          const T d = hit[i].inverse_w * s.z;
          q = fma(g_depth[i], d, q);
          depth_grad = weight * g_depth[i];
          if (j.g_normal)
            for (int a = 0; a < 3; a++) {
              q = fma(g_normal[i][a], stage.row[k][stage.kNormal + a], q);
              sums[(kAux ? 13 : 0) + a] += weight * g_normal[i][a];
            }
          if (index == median[i]) depth_grad += g_median[i];
          if (j.g_distortion) {
            const T inverse_d = T(1) / d, m = (nearest[i] - inverse_d) * j.depth_scale, gd = g_distortion[i];
            q = fma(gd, fma(m, m * mass[i], moment2[i]) - T(2) * m * moment1[i], q);
            depth_grad = fma(weight * gd * (T(2) * j.depth_scale), (m * mass[i] - moment1[i]) * inverse_d * inverse_d, depth_grad);
          }
        }
        const T slope = hit[i].raw_alpha * (before * q - suffix[i] * inverse);
        suffix[i] = fma(weight, q, suffix[i]);
        add_geometry_sums<kAux>(s, hit[i], slope, depth_grad, sums);
      }
      ReduceScatter<kSums, kWarp / 2>::run(sums, p.lane);
      if (to_geometry || to_feature) atomicAdd(target + row * stage.id[k], sums[0]);
    }
  }
}

}  // namespace surfel
