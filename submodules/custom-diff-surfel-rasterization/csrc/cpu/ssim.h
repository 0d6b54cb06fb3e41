// SSIM and weighted L1 of a band of rows of one plane, and the gradient of its SSIM. Rows stream through two rings of 11: input rows
// blurred along x -> (blurred along y) one row of similarities -> its derivatives blurred along x -> (along y) the gradient's row.
#pragma once
#include <cstring>
#include "vec.h"
#include "../common/ssim.h"
#include "kernels.h"

namespace SURFEL_NAMESPACE {

// out[x] = sum over the window of in[x + k], for whole vectors up to `count`
template <class T> inline void blur_along_x(const T* in, T* out, int count) {
  using V = Vec<T>;
  for (int x = 0; x < count; x += V::L) {
    V total = V::load_unaligned(in + x) * V(window_weight<T>(0));
    for (int k = 1; k < kWindow; k++) total = fma(V::load_unaligned(in + x + k), V(window_weight<T>(k)), total);
    total.store(out + x);
  }
}

template <class T> struct Ring {                 // the last 11 rows
  T* rows;
  int64_t pitch;
  T* row(int64_t i) const { return rows + (i + kWindow) % kWindow * pitch; }
  // The window whose last row is i, at x
  Vec<T> blurred(int64_t i, int x) const {
    using V = Vec<T>;
    V total = V::load(row(i - kReach) + x) * V(window_weight<T>(0));
    for (int k = 1; k < kWindow; k++) total = fma(V::load(row(i - kReach + k) + x), V(window_weight<T>(k)), total);
    return total;
  }
};

// Row i of the gradient: the mean of the window is linear in x, its squares and product are not. x, y, line: scratch rows.
template <class T> void gradient_row(const LossBand<T>& j, const Ring<T>* spread, int i, T* x, T* y, T* line) {
  using V = Vec<T>;
  const int64_t at = int64_t(i) * j.width;
  std::memcpy(x, j.image + at, sizeof(T) * j.width);
  std::memcpy(y, j.target + at, sizeof(T) * j.width);
  for (int c = 0; c < j.width; c += V::L) {
    const V through_squares = V(T(2)) * V::load(x + c) * spread[1].blurred(i, c);
    const V rest = fma(V::load(y + c), spread[2].blurred(i, c), spread[0].blurred(i, c));
    ((through_squares + rest) * V(j.scale)).store(line + c);
  }
  std::memcpy(j.gradient + at, line, sizeof(T) * j.width);
}

template <class T> void loss_band(const LossBand<T>& j) {
  using V = Vec<T>;
  constexpr int L = V::L;
  const int width = j.width, map_width = width - kReach, map_height = j.height - kReach;
  const int64_t pitch = loss_pitch(width);
  T* memory = j.scratch;                         // kLossRows rows
  const auto take = [&](int rows) {
    T* const at = memory;
    memory += rows * pitch;
    return at;
  };
  T *const x = take(1), *const y = take(1), *const squares = take(1), *const product = take(1), *const line = take(1);
  Ring<T> blurred[4], spread[3];
  T* derivative[3];                              // kReach zeros, a row of the map, zeros
  for (auto& ring : blurred) ring = {take(kWindow), pitch};
  for (auto& ring : spread) ring = {take(kWindow), pitch};
  for (auto& row : derivative) row = take(1);
  std::memset(j.scratch, 0, sizeof(T) * (memory - j.scratch));
  for (int q = 0; q <= j.weights; q++) j.sums[q] = 0;

  const int from = j.gradient ? larger(j.first - kReach, 0) : j.first, end = smaller(j.last + kReach, j.height);
  for (int r = from; r < end; r++) {
    std::memcpy(x, j.image + int64_t(r) * width, sizeof(T) * width);
    std::memcpy(y, j.target + int64_t(r) * width, sizeof(T) * width);
    const bool own = r >= j.first && r < j.last;
    for (int c = 0; c < width; c += L) {
      const V a = V::load(x + c), b = V::load(y + c);
      fma(a, a, b * b).store(squares + c);
      (a * b).store(product + c);
      if (own) {
        const V d = a - b;
        maximum(d, negative(d)).store(line + c);
      }
    }
    for (int q = 0; own && q < j.weights; q++) {
      const T* const weight = j.weight ? j.weight + (int64_t(q) * j.height + r) * width : nullptr;
      V part(T(0));
      int c = 0;
      for (; c + L <= width; c += L) part = fma(V::load(line + c), weight ? V::load_unaligned(weight + c) : V(T(1)), part);
      T added = sum(part);
      for (; c < width; c++) added += line[c] * (weight ? weight[c] : T(1));
      j.sums[1 + q] += added;
    }
    const T* const rows[4] = {x, y, squares, product};
    for (int q = 0; q < 4; q++) blur_along_x(rows[q], blurred[q].row(r), map_width);

    const int i = r - kReach;                    // the row of the map that is now complete
    if (i < from) continue;
    V part(T(0));
    for (int c = 0; c < map_width; c += L) {
      const Similarity<V> s = similarity<T>(blurred[0].blurred(r, c), blurred[1].blurred(r, c), blurred[2].blurred(r, c),
                                            blurred[3].blurred(r, c));
      s.value.store(line + c);
      s.d_mean.store_unaligned(derivative[0] + kReach + c);
      s.d_squares.store_unaligned(derivative[1] + kReach + c);
      s.d_product.store_unaligned(derivative[2] + kReach + c);
    }
    if (i >= j.first) {
      for (int c = map_width; c < map_width + L; c++) line[c] = 0;
      for (int c = 0; c < map_width; c += L) part = part + V::load(line + c);
      j.sums[0] += sum(part);
    }
    if (!j.gradient) continue;
    for (int q = 0; q < 3; q++) {
      for (int c = map_width; c < map_width + kReach + L; c++) derivative[q][kReach + c] = 0;
      blur_along_x(derivative[q], spread[q].row(i), width);
    }
    if (i >= j.first) gradient_row(j, spread, i, x, y, line);
  }
  if (!j.gradient) return;
  for (int i = larger(map_height, j.first); i < j.last; i++) {       // below the map's last row
    for (auto& ring : spread) std::memset(ring.row(i), 0, sizeof(T) * pitch);
    gradient_row(j, spread, i, x, y, line);
  }
}

}  // namespace SURFEL_NAMESPACE
