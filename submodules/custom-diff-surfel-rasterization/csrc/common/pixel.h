// Per-pixel mathematics for both back ends. V is a number (CUDA: one pixel a lane) or a vector of pixels (CPU, vec.h); the few
// functions it needs (fma, select, reciprocal, exp2, ...) are overloaded for it.
#pragma once
#include "surfel.h"

namespace SURFEL_NAMESPACE {

constexpr double kMinAlpha = 1.0 / 255, kMaxAlpha = 0.99, kMinTransmittance = 1e-4, kMinW = 1e-6;
constexpr double kHalfLog2e = 0.72134752044448170;

// One surfel met by the rays of V pixels.
template <class V, class M> struct Hit {
  V x, y;          // pixel - projected mean
  V inverse_w;     // depth = z inverse_w
  V u, v;          // point of the plane, in standard deviations
  V dx, dy;        // pixel - low-pass centre
  V raw_alpha;     // opacity exp(-rho/2), before the clamp at 0.99
  M on_plane;      // the plane's Gaussian wins over the low-pass disc
  M valid;         // alpha >= 1/255, and the plane is met between `near` and 1e6 times the centre's depth
};

template <class V, class M, class T>
SURFEL_FN Hit<V, M> meet(const Record<T>& s, const V& px, const V& py, T near) {
  Hit<V, M> h;
  h.x = px - V(s.centre_x);
  h.y = py - V(s.centre_y);
  const V w = fma(V(s.g0), h.x, fma(V(s.g1), h.y, V(1)));
  const M ahead = (w > V(T(kMinW))) & (V(near) * w <= V(s.z));
  h.inverse_w = reciprocal(select(ahead, w, V(1)));
  h.u = fma(V(s.m00), h.x, V(s.m01) * h.y) * h.inverse_w;
  h.v = fma(V(s.m10), h.x, V(s.m11) * h.y) * h.inverse_w;
  h.dx = h.x - V(s.lowpass_x);
  h.dy = h.y - V(s.lowpass_y);
  const V plane = fma(h.u, h.u, h.v * h.v);
  const V disc = fma(h.dx, h.dx, h.dy * h.dy) * V(2);    // a screen-space Gaussian of sigma sqrt(1/2) px
  h.on_plane = plane <= disc;
  h.raw_alpha = exp2(fma(minimum(plane, disc), V(T(-kHalfLog2e)), V(s.log2_opacity)));
  h.valid = ahead & (h.raw_alpha >= V(T(kMinAlpha)));
  return h;
}

// The sums over pixels from which project_backward makes all geometry gradients (kGeometrySums of them, in this order):
//   0..8  {h0, h1, h2} x {1, x', y'}     9, 10  low-pass centre     11  opacity (times opacity)
//   12    dL/dz through the depth        13..15 normal
// `slope` is raw_alpha dL/dalpha (the clamp at 0.99 lets gradients through), `depth_grad` dL/d(depth at the pixel).
template <bool kWithDepth, class V, class M, class T>
SURFEL_FN void add_geometry_sums(const Record<T>& s, const Hit<V, M>& h, const V& slope, const V& depth_grad, V* sums) {
  const V on_plane = select(h.on_plane, slope, V(0)), on_disc = (slope - on_plane) * V(2);
  const V scaled = on_plane * h.inverse_w;
  const V h0 = negative(scaled * h.u), h1 = negative(scaled * h.v);
  V h2 = negative(fma(h0, h.u, h1 * h.v));
  if (kWithDepth) {
    const V g = h.inverse_w * depth_grad;
    sums[12] = sums[12] + g;
    h2 = h2 - g * h.inverse_w * V(s.z);
  }
  sums[0] = sums[0] + h0;
  sums[1] = fma(h0, h.x, sums[1]);
  sums[2] = fma(h0, h.y, sums[2]);
  sums[3] = sums[3] + h1;
  sums[4] = fma(h1, h.x, sums[4]);
  sums[5] = fma(h1, h.y, sums[5]);
  sums[6] = sums[6] + h2;
  sums[7] = fma(h2, h.x, sums[7]);
  sums[8] = fma(h2, h.y, sums[8]);
  sums[9] = fma(on_disc, h.dx, sums[9]);
  sums[10] = fma(on_disc, h.dy, sums[10]);
  sums[11] = sums[11] + slope;
}

}  // namespace SURFEL_NAMESPACE
