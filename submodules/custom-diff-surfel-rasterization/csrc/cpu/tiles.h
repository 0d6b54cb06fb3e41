// The tile kernels, forward and backward. Pixel state is kept block by block (16 pixels contiguous), so that a block is 16/L
// vectors and a surfel touches only the blocks its coverage mask names.
#pragma once
#include <cstring>
#include "cover.h"
#include "../common/pixel.h"

namespace SURFEL_NAMESPACE {

// Pixel centres of the lanes of one vector: part `h` of the block `b` of a tile whose first pixel is (x0, y0).
template <class T> struct BlockGrid {
  using V = Vec<T>;
  static constexpr int L = V::L, parts = kBlockPixels / L;
  V lane_x[parts], lane_y[parts];
  BlockGrid(int x0, int y0) {
    alignas(64) T x[kBlockPixels], y[kBlockPixels];
    for (int i = 0; i < kBlockPixels; i++) {
      x[i] = T(x0 + i % kBlock) + T(0.5);
      y[i] = T(y0 + i / kBlock) + T(0.5);
    }
    for (int h = 0; h < parts; h++) {
      lane_x[h] = V::load(x + h * L);
      lane_y[h] = V::load(y + h * L);
    }
  }
  V x(int b, int h) const { return lane_x[h] + V(T(b % 4 * kBlock)); }
  V y(int b, int h) const { return lane_y[h] + V(T(b / 4 * kBlock)); }
};

// Copies between block order and image rows; pixels outside the image are skipped (gather: set to `outside`).
template <class T, class S> inline void scatter_plane(const TileJob<T>& j, const S* block_order, S* plane) {
  const int rows = smaller(kTile, j.height - j.tile_y * kTile), width = smaller(kTile, j.width - j.tile_x * kTile);
  S* line = plane + int64_t(j.tile_y) * kTile * j.width + j.tile_x * kTile;
  for (int r = 0; r < rows; r++, line += j.width) {
    const S* from = block_order + r / 4 * 64 + r % 4 * 4;
    if (width == kTile) {
      for (int b = 0; b < 4; b++) std::memcpy(line + 4 * b, from + 16 * b, 4 * sizeof(S));
    } else {
      for (int c = 0; c < width; c++) line[c] = from[c / 4 * 16 + c % 4];
    }
  }
}
template <class T, class S> inline void gather_plane(const TileJob<T>& j, const S* plane, S* block_order, S outside) {
  const int rows = smaller(kTile, j.height - j.tile_y * kTile), width = smaller(kTile, j.width - j.tile_x * kTile);
  if (rows < kTile || width < kTile)
    for (int i = 0; i < kTilePixels; i++) block_order[i] = outside;
  const S* line = plane + int64_t(j.tile_y) * kTile * j.width + j.tile_x * kTile;
  for (int r = 0; r < rows; r++, line += j.width) {
    S* to = block_order + r / 4 * 64 + r % 4 * 4;
    if (width == kTile) {
      for (int b = 0; b < 4; b++) std::memcpy(to + 16 * b, line + 4 * b, 4 * sizeof(S));
    } else {
      for (int c = 0; c < width; c++) to[c / 4 * 16 + c % 4] = line[c];
    }
  }
}

// Surfels of a tile lie far apart in memory: ask for the ones to come.
template <class T> [[gnu::always_inline]] inline void prefetch_surfel(const TileJob<T>& j, int k, int channels) {
  if (k < 0 || k >= j.count) return;
  const uint32_t id = (uint32_t)j.pairs[k].key;
  const char* feature = reinterpret_cast<const char*>(j.features + int64_t(id) * channels);
  __builtin_prefetch(j.records + id);
  __builtin_prefetch(feature);
  __builtin_prefetch(feature + sizeof(T) * channels - 1);
}
constexpr int kAhead = 6;

// Front to back. T < 0 marks a finished pixel (|T| is its transmittance). Aux maps add five planes and the distortion moments.
template <class T, int F, bool kAux> void forward_tile(const TileJob<T>& j) {
  using V = Vec<T>;
  using M = typename V::Mask;
  constexpr int L = V::L, parts = kBlockPixels / L;
  const int channels = F ? F : j.channels;
  T* const trans = j.scratch;
  T* const last = trans + kTilePixels;                    // indices as numbers: exact below 2^24
  T* const depth = last + kTilePixels;
  T* const normal = depth + kTilePixels;                  // three planes
  T* const median = normal + 3 * kTilePixels;
  T* const median_index = median + kTilePixels;
  T* const first = median_index + kTilePixels;            // 1/d of the first surfel
  T* const moment1 = first + kTilePixels;
  T* const moment2 = moment1 + kTilePixels;
  T* const distortion = moment2 + kTilePixels;
  T* const colour = distortion + kTilePixels;             // [block][channel][16]
  for (int i = 0; i < kTilePixels; i++) trans[i] = T(1);
  std::memset(last, 0, sizeof(T) * kTilePixels * (kAux ? 11 : 1));
  std::memset(colour, 0, sizeof(T) * kTilePixels * channels);
  const BlockGrid<T> grid(j.tile_x * kTile, j.tile_y * kTile);
  uint32_t live = 0;
  for (int b = 0; b < 16; b++)
    if (j.tile_x * kTile + b % 4 * kBlock < j.width && j.tile_y * kTile + b / 4 * kBlock < j.height) live |= 1u << b;

  for (int k = 0; k < j.count && live; k++) {
    prefetch_surfel(j, k + kAhead, channels);
    uint32_t blocks = j.pairs[k].blocks & live;
    if (!blocks) continue;
    const uint32_t id = (uint32_t)j.pairs[k].key;
    const Record<T> s = j.records[id];
    const T* f = j.features + int64_t(id) * channels;
    const V index(T(k + 1));
    for (; blocks; blocks &= blocks - 1) {
      const int b = __builtin_ctz(blocks);
      V most(T(-1));
      for (int h = 0; h < parts; h++) {
        const int at = b * kBlockPixels + h * L;
        const V before = V::load(trans + at);
        const Hit<V, M> hit = meet<V, M>(s, grid.x(b, h), grid.y(b, h), j.near);
        const M valid = hit.valid & (before > V(T(0)));
        if (!V::any(valid)) {
          most = maximum(most, before);
          continue;
        }
        const V alpha = minimum(hit.raw_alpha, V(T(kMaxAlpha)));
        const V after = fma(negative(alpha), before, before);
        const M stop = valid & (after < V(T(kMinTransmittance)));
        const M blend = valid & (after >= V(T(kMinTransmittance)));
        const V weight = select(blend, alpha * before, V(T(0)));
        T* const c = colour + (b * channels * kBlockPixels + h * L);
        for (int ch = 0; ch < channels; ch++) {
          T* const p = c + ch * kBlockPixels;
          fma(weight, V(f[ch]), V::load(p)).store(p);
        }
        const V now = select(blend, after, select(stop, negative(before), before));
        now.store(trans + at);
        most = maximum(most, now);
        if (j.last) select(blend, index, V::load(last + at)).store(last + at);
        if constexpr (kAux) {
          const V d = hit.inverse_w * V(s.z);
          fma(weight, d, V::load(depth + at)).store(depth + at);
          if (j.out_normal)
            for (int i = 0; i < 3; i++) {
              T* const p = normal + i * kTilePixels + at;
              fma(weight, V(s.normal[i]), V::load(p)).store(p);
            }
          if (j.out_median) {
            const M half = blend & (before > V(T(0.5)));
            select(half, d, V::load(median + at)).store(median + at);
            select(half, index, V::load(median_index + at)).store(median_index + at);
          }
          if (j.out_distortion) {
            // D is unchanged by a shift of m, so m counts from the first surfel's: no cancellation between values near 1.
            const V inverse_d = select(blend, reciprocal(d), V(T(0)));
            const V reference = select(blend & (before >= V(T(1))), inverse_d, V::load(first + at));
            const V m = (reference - inverse_d) * V(j.depth_scale), wm = weight * m;
            const V m1 = V::load(moment1 + at), m2 = V::load(moment2 + at);
            const V gap = fma(m, m * (V(T(1)) - before), m2) - V(T(2)) * m * m1;
            fma(weight, gap, V::load(distortion + at)).store(distortion + at);
            (m1 + wm).store(moment1 + at);
            fma(wm, m, m2).store(moment2 + at);
            reference.store(first + at);
          }
        }
      }
      if (highest(most) <= T(0)) live &= ~(1u << b);
    }
  }

  for (int i = 0; i < kTilePixels; i++) trans[i] = absolute(trans[i]);
  const int64_t area = int64_t(j.width) * j.height;
  alignas(64) T plane[kTilePixels];
  for (int ch = 0; ch < channels; ch++) {
    const T back = j.background ? j.background[ch] : T(0);
    for (int b = 0; b < 16; b++)
      for (int i = 0; i < kBlockPixels; i++)
        plane[b * 16 + i] = colour[(b * channels + ch) * kBlockPixels + i] + back * trans[b * 16 + i];
    if (j.out_bytes) {
      uint8_t bytes[kTilePixels];
      for (int i = 0; i < kTilePixels; i++) bytes[i] = to_byte(plane[i]);
      scatter_plane(j, bytes, j.out_bytes + ch * area);
    } else {
      scatter_plane(j, plane, j.out_features + ch * area);
    }
  }
  for (int i = 0; i < kTilePixels; i++) plane[i] = T(1) - trans[i];
  scatter_plane(j, plane, j.out_alpha);
  alignas(64) int32_t whole[kTilePixels];
  if (j.last) {
    scatter_plane(j, trans, j.transmittance);
    for (int i = 0; i < kTilePixels; i++) whole[i] = (int32_t)last[i];
    scatter_plane(j, whole, j.last);
  }
  if constexpr (kAux) {
    if (j.out_depth) scatter_plane(j, depth, j.out_depth);
    if (j.out_normal)
      for (int i = 0; i < 3; i++) scatter_plane(j, normal + i * kTilePixels, j.out_normal + i * area);
    if (j.out_median) scatter_plane(j, median, j.out_median);
    if (j.out_median && j.last) {
      for (int i = 0; i < kTilePixels; i++) whole[i] = (int32_t)median_index[i];
      scatter_plane(j, whole, j.median);
    }
    if (j.out_distortion) scatter_plane(j, distortion, j.out_distortion);
    if (j.out_distortion && j.last) {
      scatter_plane(j, first, j.moments);
      scatter_plane(j, moment1, j.moments + area);
      scatter_plane(j, moment2, j.moments + 2 * area);
    }
  }
}

// Back to front. With q the incoming gradient dotted with what the surfel shows and S the suffix sum of w q (started with the
// background and alpha terms), dL/dalpha = T q - S/(1 - alpha): two numbers of state whatever the channel count.
template <class T, int F, bool kAux> void backward_tile(const TileJob<T>& j) {
  using V = Vec<T>;
  using M = typename V::Mask;
  constexpr int L = V::L, parts = kBlockPixels / L;
  const int channels = F ? F : j.channels;
  T* const trans = j.scratch;
  T* const suffix = trans + kTilePixels;
  T* const last = suffix + kTilePixels;
  T* const g_depth = last + kTilePixels;
  T* const g_normal = g_depth + kTilePixels;
  T* const g_median = g_normal + 3 * kTilePixels;
  T* const median_index = g_median + kTilePixels;
  T* const g_distortion = median_index + kTilePixels;
  T* const first = g_distortion + kTilePixels;
  T* const moment1 = first + kTilePixels;
  T* const moment2 = moment1 + kTilePixels;
  T* const mass = moment2 + kTilePixels;                  // 1 - final transmittance
  T* const g = mass + kTilePixels;                        // [block][channel][16]
  T* const wide = g + int64_t(kTilePixels) * channels;    // [channel][L] sums, for channel counts without a template
  const int64_t area = int64_t(j.width) * j.height;
  alignas(64) T plane[kTilePixels];
  alignas(64) int32_t whole[kTilePixels];

  gather_plane<T, T>(j, j.transmittance, trans, T(1));
  gather_plane<T, int32_t>(j, j.last, whole, 0);
  int block_last[16], tile_last = 0;
  for (int b = 0; b < 16; b++) {
    block_last[b] = 0;
    for (int i = b * 16; i < b * 16 + 16; i++) {
      last[i] = T(whole[i]);
      block_last[b] = larger(block_last[b], (int)whole[i]);
    }
    tile_last = larger(tile_last, block_last[b]);
  }
  if (j.g_alpha) {
    gather_plane<T, T>(j, j.g_alpha, plane, T(0));
    for (int i = 0; i < kTilePixels; i++) suffix[i] = -plane[i] * trans[i];
  } else {
    std::memset(suffix, 0, sizeof(T) * kTilePixels);
  }
  for (int ch = 0; ch < channels; ch++) {
    if (j.g_features) {
      gather_plane<T, T>(j, j.g_features + ch * area, plane, T(0));
    } else {
      std::memset(plane, 0, sizeof plane);
    }
    const T back = j.background ? j.background[ch] : T(0);
    T total = 0;
    for (int i = 0; i < kTilePixels; i++) {
      g[(i / 16 * channels + ch) * kBlockPixels + i % 16] = plane[i];
      suffix[i] += back * plane[i] * trans[i];
      total += plane[i] * trans[i];
    }
    if (j.g_background) j.g_background[ch] = total;
  }
  if constexpr (kAux) {
    for (int i = 0; i < kTilePixels; i++) mass[i] = T(1) - trans[i];
    if (j.g_depth) gather_plane<T, T>(j, j.g_depth, g_depth, T(0));
    if (j.g_normal)
      for (int i = 0; i < 3; i++) gather_plane<T, T>(j, j.g_normal + i * area, g_normal + i * kTilePixels, T(0));
    if (j.g_median) {
      gather_plane<T, T>(j, j.g_median, g_median, T(0));
      gather_plane<T, int32_t>(j, j.median, whole, 0);
      for (int i = 0; i < kTilePixels; i++) median_index[i] = T(whole[i]);
    }
    if (j.g_distortion) {
      gather_plane<T, T>(j, j.g_distortion, g_distortion, T(0));
      gather_plane<T, T>(j, j.moments, first, T(0));
      gather_plane<T, T>(j, j.moments + area, moment1, T(0));
      gather_plane<T, T>(j, j.moments + 2 * area, moment2, T(0));
    }
  }

  const BlockGrid<T> grid(j.tile_x * kTile, j.tile_y * kTile);
  for (int k = j.count - 1; k >= 0; k--) {
    prefetch_surfel(j, smaller(k, tile_last) - kAhead, channels);
    T* const slot = j.slots + int64_t(j.pairs[k].slot) * j.slot_stride;
    uint32_t blocks = k < tile_last ? j.pairs[k].blocks : 0;
    const uint32_t id = (uint32_t)j.pairs[k].key;
    const Record<T> s = j.records[id];
    const T* f = j.features + int64_t(id) * channels;
    const V index(T(k + 1));
    V sums[kGeometrySums], feature_sums[F ? F : 1];
    for (int i = 0; i < kGeometrySums; i++) sums[i] = V(T(0));
    if constexpr (F != 0) {
      for (int ch = 0; ch < F; ch++) feature_sums[ch] = V(T(0));
    } else {
      std::memset(wide, 0, sizeof(T) * channels * L);
    }
    bool touched = false;
    for (; blocks; blocks &= blocks - 1) {
      const int b = __builtin_ctz(blocks);
      if (block_last[b] <= k) continue;
      for (int h = 0; h < parts; h++) {
        const int at = b * kBlockPixels + h * L;
        const Hit<V, M> hit = meet<V, M>(s, grid.x(b, h), grid.y(b, h), j.near);
        const M blended = hit.valid & (index <= V::load(last + at));
        if (!V::any(blended)) continue;
        touched = true;
        const V alpha = select(blended, minimum(hit.raw_alpha, V(T(kMaxAlpha))), V(T(0)));
        const V inverse = reciprocal(V(T(1)) - alpha), before = V::load(trans + at) * inverse, weight = alpha * before;
        before.store(trans + at);
        const T* const gp = g + (b * channels * kBlockPixels + h * L);
        V q(T(0));
        for (int ch = 0; ch < channels; ch++) q = fma(V::load(gp + ch * kBlockPixels), V(f[ch]), q);
        V depth_grad(T(0));
        if constexpr (kAux) {
          const V d = hit.inverse_w * V(s.z);
          if (j.g_depth) {
            const V gd = V::load(g_depth + at);
            q = fma(gd, d, q);
            depth_grad = weight * gd;
          }
          if (j.g_normal)
            for (int i = 0; i < 3; i++) {
              const V gn = V::load(g_normal + i * kTilePixels + at);
              q = fma(gn, V(s.normal[i]), q);
              sums[13 + i] = fma(weight, gn, sums[13 + i]);
            }
          if (j.g_median) {
            const V at_median = V::load(median_index + at);
            const M here = blended & (index <= at_median) & (at_median <= index);
            depth_grad = depth_grad + select(here, V::load(g_median + at), V(T(0)));
          }
          if (j.g_distortion) {
            const V inverse_d = select(blended, reciprocal(d), V(T(0)));
            const V m = (V::load(first + at) - inverse_d) * V(j.depth_scale);
            const V gd = V::load(g_distortion + at), a = V::load(mass + at), m1 = V::load(moment1 + at);
            q = fma(gd, fma(m, m * a, V::load(moment2 + at)) - V(T(2)) * m * m1, q);
            depth_grad = fma(weight * gd * V(T(2) * j.depth_scale), (m * a - m1) * inverse_d * inverse_d, depth_grad);
          }
        }
        const V behind = V::load(suffix + at);
        fma(weight, q, behind).store(suffix + at);
        const V slope = select(blended, hit.raw_alpha * (before * q - behind * inverse), V(T(0)));
        add_geometry_sums<kAux>(s, hit, slope, depth_grad, sums);
        for (int ch = 0; ch < channels; ch++) {
          const V gc = V::load(gp + ch * kBlockPixels);
          if constexpr (F != 0) {
            feature_sums[ch] = fma(weight, gc, feature_sums[ch]);
          } else {
            fma(weight, gc, V::load(wide + ch * L)).store(wide + ch * L);
          }
        }
      }
    }
    if (!touched) {
      std::memset(slot, 0, sizeof(T) * (kGeometrySums + channels));
      continue;
    }
    for (int i = 0; i < (kAux ? 16 : 12); i++) slot[i] = sum(sums[i]);
    if (!kAux)
      for (int i = 12; i < 16; i++) slot[i] = T(0);
    for (int ch = 0; ch < channels; ch++) {
      if constexpr (F != 0) {
        slot[kGeometrySums + ch] = sum(feature_sums[ch]);
      } else {
        slot[kGeometrySums + ch] = sum(V::load(wide + ch * L));
      }
    }
  }
}

}  // namespace SURFEL_NAMESPACE
