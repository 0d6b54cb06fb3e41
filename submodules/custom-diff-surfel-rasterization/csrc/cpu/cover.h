// Which blocks of which tiles a surfel touches.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace SURFEL_NAMESPACE {

// Where |u, v|^2 <= level or the low-pass disc can reach, row by row of pixels, joined into 4x4 blocks.
template <class T> int cover(const Record<T>& s, const Box& box, int columns, uint32_t* tiles, uint32_t* blocks) {
  using V = Vec<T>;
  using M = typename V::Mask;
  const T level = s.level, A = s.m00 * s.m00 + s.m10 * s.m10 - level * s.g0 * s.g0;
  // Row y': A x^2 + 2B x + C <= 0. B is affine in y'; the discriminant is written as a sum of squares of cross products, free of
  // the cancellation that B^2 - AC has for needles. A <= 0: the ellipse is unbounded along the row, which is taken whole.
  const bool bounded = A > 0;
  const T inverse_a = bounded ? T(1) / A : T(0);
  const V b1((s.m00 * s.m01 + s.m10 * s.m11 - level * s.g0 * s.g1) * inverse_a), b0(s.centre_x + level * s.g0 * inverse_a);
  const V m00(s.m00), m10(s.m10), k0(s.m00 * s.g1 - s.m01 * s.g0), k1(s.m10 * s.g1 - s.m11 * s.g0);
  const V det(s.m00 * s.m11 - s.m01 * s.m10), nowhere(T(1e6)), disc(T(0.5) * level), zero(T(0));
  const V x_low(T(box.x0)), x_high(T(box.x1)), lowpass(s.centre_x + s.lowpass_x);
  // Lane i stands for row 4 (i % 4) + i / 4 of the tile, so that a row of blocks is joined lane by lane.
  alignas(64) T rows[kTile], low[kTile], high[kTile];
  for (int i = 0; i < kTile; i++) rows[i] = T(4 * (i % 4) + i / 4);
  int count = 0;
  for (int ty = box.y0 / kTile; ty <= box.y1 / kTile; ty++) {
    for (int i = 0; i < kTile; i += V::L) {
      const V row = V::load(rows + i) + V(T(ty * kTile)), y = row + V(T(0.5) - s.centre_y);
      const V c0 = fma(k0, y, m00), c1 = fma(k1, y, m10), dy = det * y, ly = y - V(s.lowpass_y);
      const V discriminant = V(level) * fma(c0, c0, c1 * c1) - dy * dy, disc_x2 = disc - ly * ly;
      const V root = square_root(maximum(discriminant, zero)) * V(inverse_a), middle = b0 - b1 * y;
      const V reach = square_root(maximum(disc_x2, zero));
      const M crossed = discriminant >= zero, in_disc = disc_x2 >= zero;
      V lo = minimum(select(in_disc, lowpass - reach, nowhere), select(crossed, middle - root, nowhere));
      V hi = maximum(select(in_disc, lowpass + reach, negative(nowhere)), select(crossed, middle + root, negative(nowhere)));
      if (!bounded) {
        lo = x_low;
        hi = x_high + V(T(1));
      }
      const M inside = (row >= V(T(box.y0))) & (row <= V(T(box.y1)));
      select(inside, maximum(lo - V(T(0.52)), x_low), nowhere).store(low + i);    // pixel j is touched when low <= j <= high
      select(inside, minimum(hi - V(T(0.48)), x_high), negative(nowhere)).store(high + i);
    }
    int first[4], end[4];              // columns of blocks
    for (int k = 0; k < 4; k++) {
      const T lo = smaller(smaller(low[k], low[4 + k]), smaller(low[8 + k], low[12 + k]));
      const T hi = larger(larger(high[k], high[4 + k]), larger(high[8 + k], high[12 + k]));
      first[k] = ((int)lo + (lo > T((int)lo))) / kBlock;         // ceil: lo >= 0
      end[k] = (int)hi / kBlock + (hi >= T(0));
    }
    for (int tx = box.x0 / kTile; tx <= box.x1 / kTile; tx++) {  // no branches inside: they would be mispredicted
      uint32_t mask = 0;
      for (int k = 0; k < 4; k++) {
        const int c0 = smaller(larger(first[k] - 4 * tx, 0), 4), c1 = smaller(larger(end[k] - 4 * tx, 0), 4);
        mask |= (uint32_t)larger((1 << c1) - (1 << c0), 0) << (4 * k);
      }
      tiles[count] = ty * columns + tx;
      blocks[count] = mask;
      count += mask != 0;
    }
  }
  return count;
}

template <class T>
int place(const Camera<T>& camera, const SurfelInput<T>& in, T near, int cutoff, int width, int height, Record<T>& rec,
          int& radius, uint32_t* tiles, uint32_t* blocks) {
  Box box;
  if (!project(camera, in, near, cutoff, width, height, rec, box, radius)) {
    radius = 0;
    return 0;
  }
  if (box.x0 > box.x1 || box.y0 > box.y1) return 0;
  const int count = cover(rec, box, (width + kTile - 1) / kTile, tiles, blocks);
  if (count == 0 && cutoff == kExact) radius = 0;
  return count;
}

}  // namespace SURFEL_NAMESPACE
