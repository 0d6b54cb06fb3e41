// The tile kernels: a group of lanes draws a tile of 8x8 pixels, P a lane; tiles are taken longest first. P = 2: a warp. P = 1: two
// warps, a half each, for few tiles, whose longest lists a single warp would be late with. P = 4: half a warp, beside another tile;
// backward sums over a group's lanes, which is most of its work, in one go for two tiles then.
// A template draws F channels, `first` .. `first` + F - 1; other counts are drawn in several launches (see rasterize.cu). Aux maps,
// alpha and the state go with the launch of channel 0.
#pragma once
#include "device.h"
#include "../common/pixel.h"

namespace surfel {

__host__ __device__ constexpr int round_up(int n, int k) { return (n + k - 1) / k * k; }

template <int P> struct Group {
  static constexpr int kLanes = P == 4 ? 16 : 32, kRows = kLanes / kEdge;    // a lane's pixels are kRows apart
  static constexpr int kPerWarp = kWarp / kLanes, kPerBlock = kWarpsPerBlock * kPerWarp, kPerTile = P == 1 ? 2 : 1;
};

// Some surfels of a tile's list, one a lane, in shared memory: record, features, [normal].
template <class T, int F, bool kAux, int kLanes> struct Stage {
  static constexpr int kNormal = kRecord + round_up(F, 4), kRow = kNormal + (kAux ? 4 : 0);
  alignas(16) T row[kLanes][kRow];
  uint32_t id[kLanes];

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

// A group's tile and its lanes' pixels, (x, y) and below; a group beyond the last tile has none in the image and an empty list.
template <int P> struct Place {
  int b, tile, x, y, lane;                     // lane of the group
  bool in_image[P];
  TileList list;
};
template <class T, int P> __device__ __forceinline__ Place<P> find_place(const Job<T>& j, int group) {
  Place<P> p;
  const int64_t position = int64_t(blockIdx.x) * Group<P>::kPerBlock + group;
  const bool exists = position < int64_t(j.images) * j.tiles * Group<P>::kPerTile;
  p.tile = exists ? j.tile_order[position / Group<P>::kPerTile] : 0;
  p.list = exists ? tile_list(j, p.tile) : TileList{0, 0};
  p.lane = threadIdx.x % Group<P>::kLanes;
  p.b = p.tile / j.tiles;
  const int local = p.tile - p.b * j.tiles, ty = local / j.tiles_x, tx = local - ty * j.tiles_x;
  p.x = tx * kEdge + p.lane % kEdge;
  p.y = ty * kEdge + p.lane / kEdge + (P == 1 ? int(position % 2) * 4 : 0);
  for (int i = 0; i < P; i++) p.in_image[i] = exists && p.x < j.width && p.y + Group<P>::kRows * i < j.height;
  return p;
}

template <int P> __device__ __forceinline__ bool any_of(const bool* v) {
  bool any = v[0];
  for (int i = 1; i < P; i++) any |= v[i];
  return any;
}

// Front to back. kBytes: features go to out_bytes.
template <class T, int F, bool kAux, int P, bool kBytes>
__global__ void __launch_bounds__(kWarpsPerBlock * kWarp) forward_tiles(const Job<T> j, int first) {
  static_assert(Group<P>::kLanes == kWarp, "a warp stops by itself");
  constexpr int kRows = Group<P>::kRows;
  __shared__ Stage<T, F, kAux, kWarp> stages[kWarpsPerBlock];
  const Place<P> p = find_place<T, P>(j, threadIdx.x / kWarp);
  const TileList list = p.list;
  Stage<T, F, kAux, kWarp>& stage = stages[threadIdx.x / kWarp];
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
        hit[i] = meet<T, bool>(s, px, py + T(kRows * i), j.near);
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
    const int64_t pixel = int64_t(p.y + kRows * i) * j.width + p.x, at = p.b * area + pixel;
    const T* const back = j.background ? j.background + j.s_background * p.b : nullptr;
#pragma unroll
    for (int c = 0; c < F; c++) {
      if (first + c >= j.channels) continue;
      const int64_t to = (int64_t(p.b) * j.channels + first + c) * area + pixel;
      const T value = back ? fma(back[first + c], trans[i], colour[i][c]) : colour[i][c];
      if constexpr (kBytes)
        j.out_bytes[to] = to_byte(value);
      else
        j.out_features[to] = value;
    }
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

// Sums N values over the lanes of a group, each sum into one lane: at every step a lane keeps half of its values and hands over the
// others, so N values cost about N shuffles in all. Afterwards the lane holds `kept` sums, those from scattered<N>(lane).first on.
template <int N, int kDistance> struct ReduceScatter {
  static constexpr int kHalf = (N + 1) / 2, kept = ReduceScatter<kHalf, kDistance / 2>::kept;
  template <class T> static __device__ __forceinline__ void run(T* values, int lane) {
    const bool upper = lane & kDistance;
#pragma unroll
    for (int i = 0; i < kHalf; i++) {
      const T other = i + kHalf < N ? values[i + kHalf] : T(0), sent = upper ? values[i] : other, own = upper ? other : values[i];
      values[i] = own + __shfl_xor_sync(kAllLanes, sent, kDistance);
    }
    ReduceScatter<kHalf, kDistance / 2>::run(values, lane);
  }
};
template <int N> struct ReduceScatter<N, 0> {
  static constexpr int kept = N;
  template <class T> static __device__ __forceinline__ void run(T*, int) {}
};
struct Scattered { int first, count; };        // of the lane's sums, `count` are real
template <int N, int kLanes> __device__ __forceinline__ Scattered scattered(int lane) {
  int width = N, real = N, index = 0;          // values a lane stands for, of which `real` are not padding
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    const int kept = (width + 1) / 2;
    if (lane & distance) {
      index += kept;
      real -= kept;
    } else {
      real = smaller(real, kept);
    }
    width = kept;
  }
  return {index, real};
}

// The incoming gradient of a lane's pixels: in registers, or with four pixels a lane, which would leave too few, in shared memory.
template <class T, int F, int P> struct Incoming {
  T g[P][F] = {};
  __device__ __forceinline__ void put(int i, const T* from) {
#pragma unroll
    for (int c = 0; c < F; c++) g[i][c] = from[c];
  }
  __device__ __forceinline__ void get(int i, T* to) const {
#pragma unroll
    for (int c = 0; c < F; c++) to[c] = g[i][c];
  }
};
template <class T, int F> struct Incoming<T, F, 4> {
  static constexpr int kQuads = round_up(F, 4) / 4, kThreads = kWarpsPerBlock * kWarp;
  Four<T> (*shared)[4][kThreads];
  __device__ __forceinline__ Incoming() {
    __shared__ Four<T> memory[kQuads][4][kThreads];
    shared = memory;
  }
  __device__ __forceinline__ void put(int i, const T* from) {
#pragma unroll
    for (int c = 0; c < F; c++) shared[c / 4][i][threadIdx.x].v[c % 4] = from[c];
  }
  __device__ __forceinline__ void get(int i, T* to) const {
#pragma unroll
    for (int q = 0; q < kQuads; q++) {
      const Four<T> four = shared[q][i][threadIdx.x];
#pragma unroll
      for (int c = 4 * q; c < F && c < 4 * q + 4; c++) to[c] = four.v[c % 4];
    }
  }
};

// Back to front. With q the incoming gradient dotted with what the surfel shows and S the suffix sum of w q (started with the
// background and alpha terms), dL/dalpha = T q - S/(1 - alpha): two numbers of state whatever the channel count.
template <class T, int F, bool kAux, int P>
__global__ void __launch_bounds__(kWarpsPerBlock * kWarp, P == 4 && F > 4 ? 5 : 0) backward_tiles(const Job<T> j, int first) {
  constexpr int kLanes = Group<P>::kLanes, kRows = Group<P>::kRows, kGeometry = kAux ? 16 : 12, kSums = kGeometry + F;
  __shared__ Stage<T, F, kAux, kLanes> stages[Group<P>::kPerBlock];
  const Place<P> p = find_place<T, P>(j, threadIdx.x / kLanes);
  const TileList list = p.list;
  Stage<T, F, kAux, kLanes>& stage = stages[threadIdx.x / kLanes];
  if (!__any_sync(kAllLanes, list.count > 0)) return;
  const int64_t area = int64_t(j.width) * j.height;
  const T px = T(p.x) + T(0.5), py = T(p.y) + T(0.5);
  Incoming<T, F, P> incoming;
  T trans[P], suffix[P] = {};
  T g_depth[P] = {}, g_normal[P][3] = {}, g_median[P] = {}, g_distortion[P] = {};
  T nearest[P] = {}, moment1[P] = {}, moment2[P] = {}, mass[P] = {};
  int last[P] = {}, median[P] = {}, deepest = 0;
#pragma unroll
  for (int i = 0; i < P; i++) {
    trans[i] = T(1);
    if (!p.in_image[i] || list.count == 0) continue;
    const int64_t pixel = int64_t(p.y + kRows * i) * j.width + p.x, at = p.b * area + pixel;
    last[i] = j.last[at];
    deepest = larger(deepest, last[i]);
    if (last[i] == 0) continue;
    trans[i] = j.transmittance[at];
    const T* const back = j.background ? j.background + j.s_background * p.b : nullptr;
    T start = j.g_alpha && first == 0 ? -j.g_alpha[at] : T(0), g[F] = {};
#pragma unroll
    for (int c = 0; c < F; c++) {
      if (!j.g_features || first + c >= j.channels) continue;
      g[c] = j.g_features[(int64_t(p.b) * j.channels + first + c) * area + pixel];
      if (back) start = fma(back[first + c], g[c], start);
    }
    incoming.put(i, g);
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
  for (int o = kLanes / 2; o > 0; o /= 2) deepest = larger(deepest, __shfl_xor_sync(kAllLanes, deepest, o));

  // Where this lane's sums of every surfel go: columns of `sums`, or of the features' gradient.
  using Reduce = ReduceScatter<kSums, kLanes / 2>;
  const Scattered own = scattered<kSums, kLanes>(p.lane);
  T* target[Reduce::kept];
  int row[Reduce::kept];                       // 0: nowhere
#pragma unroll
  for (int r = 0; r < Reduce::kept; r++) {
    const int column = own.first + r, channel = first + column - kGeometry;
    const bool real = r < own.count, to_geometry = column < kGeometry;
    target[r] = to_geometry ? j.sums + int64_t(p.b) * j.surfels * j.geometry_sums + column
                            : j.d_features + j.s_features * p.b + channel;
    row[r] = !real ? 0 : to_geometry ? (int)j.geometry_sums : channel < j.channels ? j.channels : 0;
  }

  for (int top = deepest; __any_sync(kAllLanes, top > 0); top -= kLanes) {
    const int count = smaller(kLanes, top), most = kLanes == kWarp ? count : larger(count, __shfl_xor_sync(kAllLanes, count, 16));
    __syncwarp();
    if (p.lane < count) stage.load(j, p.b, first, p.lane, j.ids[list.start + top - 1 - p.lane]);
    __syncwarp();
    for (int k = 0; k < most; k++) {
      const int index = top - k;               // 1 + index in the list, as `last` counts
      const Record<T> s = stage.record(k);
      const T* const f = stage.row[k] + kRecord;
      T sums[kSums] = {};
      bool blended = false;
#pragma unroll
      for (int i = 0; i < P; i++) {
        const Hit<T, bool> hit = meet<T, bool>(s, px, py + T(kRows * i), j.near);
        if (!hit.valid || index > last[i] || index <= 0) continue;
        blended = true;
        const T alpha = minimum(hit.raw_alpha, T(kMaxAlpha)), inverse = reciprocal(T(1) - alpha);
        const T before = trans[i] * inverse, weight = alpha * before;
        trans[i] = before;
        T q = 0, depth_grad = 0, g[F];
        incoming.get(i, g);
#pragma unroll
        for (int c = 0; c < F; c++) {
          q = fma(g[c], f[c], q);
          sums[kGeometry + c] = fma(weight, g[c], sums[kGeometry + c]);
        }
        if (kAux) {
          const T d = hit.inverse_w * s.z;
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
        const T slope = hit.raw_alpha * (before * q - suffix[i] * inverse);
        suffix[i] = fma(weight, q, suffix[i]);
        add_geometry_sums<kAux>(s, hit, slope, depth_grad, sums);
      }
      if (!__any_sync(kAllLanes, blended)) continue;
      Reduce::run(sums, p.lane);
#pragma unroll
      for (int r = 0; r < Reduce::kept; r++)
        if (row[r] && index > 0) atomicAdd(target[r] + int64_t(row[r]) * stage.id[k], sums[r]);
    }
  }
}

}  // namespace surfel
