// From surfels to the list of surfels of every 8x8 tile, front to back, without the host knowing any count:
//   project_surfels   records; pairs counted per tile         (a thread per image and surfel)
//   allocate_tiles    a stretch of the pair buffer per tile   (in any order: the lists are sorted one by one)
//   scatter_pairs     keys (depth, surfel) into the stretches; its first blocks put the tiles in order, longest first
//   sort_lists        each list by its keys, all different: the order does not depend on the order of atomics
// Few launches, because at one image each costs as much as it does.
#pragma once
#include "device.h"

namespace surfel {

// Visits the tiles whose pixels can lie in {u^2 + v^2 <= level} or in the low-pass disc; returns how many. The conic in row y (from
// the projected mean) spans b0 - b1 y +- sqrt(D(y))/A, with D(y) = p (h^2 - (y - yc)^2); its rightmost point lies at yc + t, its
// leftmost at yc - t. So the reach within a row of tiles, whose pixel rows are [ya, yb], is had in closed form. D is written as a sum
// of squares of cross products: no cancellation for needles. Conics that are not ellipses take their whole box.
template <class T, class Visit>
__device__ __forceinline__ int for_each_tile(const Record<T>& s, const Box& box, int tiles_x, Visit visit) {
  const T A = s.m00 * s.m00 + s.m10 * s.m10 - s.level * s.g0 * s.g0, det = s.m00 * s.m11 - s.m01 * s.m10;
  const T k0 = s.m00 * s.g1 - s.m01 * s.g0, k1 = s.m10 * s.g1 - s.m11 * s.g0;
  const T p = det * det - s.level * (k0 * k0 + k1 * k1);
  const bool bounded = A > T(0) && p > T(0);
  const T inverse_a = bounded ? T(1) / A : T(0), inverse_p = bounded ? T(1) / p : T(0);
  const T b1 = (s.m00 * s.m01 + s.m10 * s.m11 - s.level * s.g0 * s.g1) * inverse_a;
  const T b0 = s.centre_x + s.level * s.g0 * inverse_a;
  const T q = s.level * (s.m00 * k0 + s.m10 * k1), yc = q * inverse_p;
  const T h = fast_root(q * q + p * s.level * (s.m00 * s.m00 + s.m10 * s.m10)) * inverse_p, width = fast_root(p) * inverse_a;
  const T slant = fast_root(b1 * b1 + width * width), t = slant > T(0) ? -b1 * h / slant : T(0);
  const T disc = T(0.5) * s.level, lowpass = s.centre_x + s.lowpass_x;
  int count = 0;
  for (int ty = box.y0 / kEdge; ty <= box.y1 / kEdge; ty++) {
    const T ya = T(larger(ty * kEdge, box.y0)) + T(0.5) - s.centre_y;
    const T yb = T(smaller(ty * kEdge + kEdge - 1, box.y1)) + T(0.5) - s.centre_y;
    T low = T(box.x0), high = T(box.x1) + T(1);
    if (bounded) {
      low = T(1e6);
      high = T(-1e6);
      const T from = larger(ya - yc, -h), to = smaller(yb - yc, h);
      if (from <= to + T(0.02)) {
        const T right = larger(smaller(t, to), from), left = larger(smaller(-t, to), from);
        high = b0 - b1 * (yc + right) + width * fast_root(larger(h * h - right * right, T(0)));
        low = b0 - b1 * (yc + left) - width * fast_root(larger(h * h - left * left, T(0)));
      }
      const T dy = larger(smaller(s.lowpass_y, yb), ya) - s.lowpass_y, disc_x2 = disc - dy * dy;
      if (disc_x2 >= T(0)) {
        const T reach = fast_root(disc_x2);
        low = smaller(low, lowpass - reach);
        high = larger(high, lowpass + reach);
      }
    }
    low = larger(low - T(0.52), T(box.x0));    // pixel j is touched when low <= j <= high
    high = smaller(high - T(0.48), T(box.x1));
    if (!(low <= high)) continue;
    const int last = (int)high / kEdge;
    for (int tx = (int)std::ceil(low) / kEdge; tx <= last; tx++, count++) visit(ty * tiles_x + tx);
  }
  return count;
}

template <class T> __global__ void __launch_bounds__(256, 4) project_surfels(const Job<T> j) {
  __shared__ Camera<T> camera;
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, n = smaller(thread, j.surfels - 1), b = blockIdx.y;
  const LoadedSurfel<T> surfel(j, b, n);
  const T* f = j.features + j.s_features * b + int64_t(n) * j.channels;
  T sum = 0;
  for (int c = 0; c < j.channels; c++) sum += f[c] * T(0);
  share_camera(j, b, camera);
  if (n < thread) return;
  const int64_t i = int64_t(b) * j.surfels + n;
  Record<T> rec;
  Box box = {1, 0, 1, 0};
  int radius = 0, count = 0;
  if (sum == T(0) && project(camera, surfel.input(), j.near, j.cutoff, j.width, j.height, rec, box, radius)) {
    if (box.x0 <= box.x1 && box.y0 <= box.y1) {
      int32_t* const tiles = j.tile_count + int64_t(b) * j.tiles;
      count = for_each_tile(rec, box, j.tiles_x, [&](int t) { atomicAdd(tiles + t, 1); });
      store_record(j, i, rec);
      if (j.normals)
        for (int k = 0; k < 3; k++) j.normals[3 * i + k] = rec.normal[k];
    }
    if (count == 0 && j.cutoff == kExact) radius = 0;
  } else {
    radius = 0;
  }
  if (count == 0) box = {1, 0, 1, 0};
  if (j.radii) j.radii[i] = radius;
  j.boxes[i] = make_ushort4((unsigned short)box.x0, (unsigned short)box.x1, (unsigned short)box.y0, (unsigned short)box.y1);
}

__global__ void __launch_bounds__(256)
allocate_tiles(int64_t tiles, const int32_t* count, int64_t* start, int32_t* cursor, Counters* counters) {
  __shared__ int histogram[kClasses];
  const int64_t t = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  const int lane = threadIdx.x % kWarp, n = t < tiles ? count[t] : 0;
  if (threadIdx.x < kClasses) histogram[threadIdx.x] = 0;
  __syncthreads();
  int sum = n;                                 // of the lanes up to this one
  for (int o = 1; o < kWarp; o *= 2) {
    const int below = __shfl_up_sync(kAllLanes, sum, o);
    if (lane >= o) sum += below;
  }
  unsigned long long base = 0;
  if (lane == kWarp - 1) base = atomicAdd(&counters->pairs, (unsigned long long)sum);
  base = __shfl_sync(kAllLanes, base, kWarp - 1);
  if (t < tiles) {
    start[t] = int64_t(base) + sum - n;
    cursor[t] = 0;
    atomicAdd(&histogram[length_class(n)], 1);
  }
  __syncthreads();
  if (threadIdx.x < kClasses && histogram[threadIdx.x]) atomicAdd(&counters->classes[threadIdx.x], histogram[threadIdx.x]);
}

// The tiles 256 block ... of the order; counters->pairs is told to whoever asked.
template <class T> __device__ void order_tiles(const Job<T>& j, int block) {
  __shared__ int local[kClasses], base[kClasses];
  Counters* const counters = j.counters;
  const int32_t* const count = j.tile_count;
  const int64_t t = int64_t(block) * blockDim.x + threadIdx.x, tiles = int64_t(j.images) * j.tiles;
  if (t == 0 && j.most_pairs && *j.most_pairs < counters->pairs) {
    *j.most_pairs = *j.most_pairs_host = counters->pairs;
    __threadfence_system();
  }
  if (threadIdx.x < kClasses) local[threadIdx.x] = 0;
  __syncthreads();
  const int own = t < tiles ? length_class(count[t]) : -1, rank = own >= 0 ? atomicAdd(&local[own], 1) : 0;
  __syncthreads();
  if (threadIdx.x < kClasses) {
    int before = local[threadIdx.x] ? atomicAdd(&counters->placed[threadIdx.x], local[threadIdx.x]) : 0;
    for (int c = threadIdx.x + 1; c < kClasses; c++) before += counters->classes[c];
    base[threadIdx.x] = before;
  }
  __syncthreads();
  if (own >= 0) j.tile_order[base[own] + rank] = (int32_t)t;
}

// `ordering` blocks for the order of the tiles, then those of the surfels, `blocks` an image.
template <class T> __global__ void __launch_bounds__(256) scatter_pairs(const Job<T> j, int ordering, int blocks) {
  if ((int)blockIdx.x < ordering) {
    order_tiles(j, blockIdx.x);
    return;
  }
  const int block = blockIdx.x - ordering, b = block / blocks, n = (block - b * blocks) * blockDim.x + threadIdx.x;
  if (n >= j.surfels) return;
  const int64_t i = int64_t(b) * j.surfels + n, tile0 = int64_t(b) * j.tiles;
  const ushort4 packed = j.boxes[i];
  const Box box = {packed.x, packed.y, packed.z, packed.w};
  if (box.x0 > box.x1) return;
  Record<T> rec = load_record(j, i);
  rec.level = level_of(rec.log2_opacity);
  const float depth = (float)rec.z;
  unsigned bits;
  memcpy(&bits, &depth, 4);
  const unsigned long long key = (unsigned long long)bits << 32 | (unsigned)n;
  for_each_tile(rec, box, j.tiles_x, [&](int t) {
    const TileList list = tile_list(j, tile0 + t);
    const int at = atomicAdd(j.cursor + tile0 + t, 1);
    if (at < list.count) j.keys[list.start + at] = key;    // rounding may differ from the count's, by pixels without weight
  });
}

// Keys scattered into the tile: as counted, but for that rounding.
template <class T> SURFEL_FN TileList scattered_list(const Job<T>& j, int64_t tile) {
  TileList list = tile_list(j, tile);
  list.count = smaller(list.count, j.cursor[tile]);
  return list;
}

// Bitonic sorting network of any size: all comparators point the same way, so absent keys past the end count as infinite.
template <class Sync>
__device__ __forceinline__ void sort_keys(unsigned long long* keys, int n, int thread, int threads, Sync sync) {
  int comparators = 1;
  while (2 * comparators < n) comparators *= 2;
  for (int half = 1; half < n; half *= 2) {
    for (int stride = half; stride > 0; stride /= 2) {
      sync();
      for (int i = thread; i < comparators; i += threads) {
        const int k = i & (stride - 1), low = 2 * (i - k) + k;
        const int high = stride == half ? 2 * (i - k) + 2 * stride - 1 - k : low + stride;
        if (high < n) {
          const unsigned long long x = keys[low], y = keys[high];
          if (y < x) {
            keys[low] = y;
            keys[high] = x;
          }
        }
      }
    }
  }
  sync();
}

constexpr int kSharedKeys = kWarpsPerBlock * kLongList, kLongSorters = 512;

// The first `sorters` blocks take the long lists, a block each (they are the first in tile_order; past kSharedKeys they are sorted in
// place); the others take a list for each warp. Long is kLongList and more, half of it where tiles are few and warps idle.
template <class T> __global__ void __launch_bounds__(kWarpsPerBlock * kWarp) sort_lists(const Job<T> j, int sorters) {
  __shared__ unsigned long long shared[kSharedKeys];
  int lists = 0;
  for (int c = few_tiles(j) ? kLongClassOfFew : kLongClass; c < kClasses; c++) lists += j.counters->classes[c];
  if ((int)blockIdx.x < sorters) {
    for (int position = blockIdx.x; position < lists; position += sorters) {
      const int tile = j.tile_order[position];
      const TileList list = scattered_list(j, tile);
      unsigned long long* const global = j.keys + list.start;
      unsigned long long* const keys = list.count <= kSharedKeys ? shared : global;
      if (keys == shared)
        for (int i = threadIdx.x; i < list.count; i += blockDim.x) keys[i] = global[i];
      sort_keys(keys, list.count, threadIdx.x, blockDim.x, [] { __syncthreads(); });
      for (int i = threadIdx.x; i < list.count; i += blockDim.x) j.ids[list.start + i] = (uint32_t)keys[i];
      if (threadIdx.x == 0) j.tile_count[tile] = list.count;
      __syncthreads();
    }
    return;
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t position = int64_t(blockIdx.x - sorters) * kWarpsPerBlock + warp;
  if (position < lists || position >= int64_t(j.images) * j.tiles) return;
  const int tile = j.tile_order[position];
  const TileList list = scattered_list(j, tile);
  unsigned long long* const keys = shared + warp * kLongList;
  for (int i = lane; i < list.count; i += kWarp) keys[i] = j.keys[list.start + i];
  sort_keys(keys, list.count, lane, kWarp, [] { __syncwarp(); });
  for (int i = lane; i < list.count; i += kWarp) j.ids[list.start + i] = (uint32_t)keys[i];
  if (lane == 0) j.tile_count[tile] = list.count;
}

}  // namespace surfel
