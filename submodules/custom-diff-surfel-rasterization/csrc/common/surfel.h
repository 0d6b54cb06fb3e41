// Per-surfel mathematics, forward and backward, for both back ends: (mean, quaternion, scales, opacity, camera) <-> Record.
//
// A surfel is the plane patch p + u s_u t_u + v s_v t_v. With camera-space tangents S_u = s_u R t_u, S_v = s_v R t_v, centre
// (X, Y, Z) and pixels counted from the projected mean, its homography has the rows (a,b,0), (c,d,0), (e,f,Z):
//   a = fx (S_u.x - S_u.z X/Z), b = fx (S_v.x - S_v.z X/Z), c, d likewise in y, e = S_u.z, f = S_v.z.
// Inverting it gives the ray-plane intersection as eight numbers (Record). Nothing large is ever subtracted, which keeps float32
// exact enough far from the image centre. One cancellation is in the nature of things: the inverse divides by the cosine between
// line of sight and normal, small for a surfel seen edge-on. For such a surfel it is computed in twice the precision (sight), and
// so is the place on the screen (exact_pixel).
#pragma once
#include <cmath>
#include <cstdint>
#include "types.h"

#ifdef __CUDACC__
#define SURFEL_FN __host__ __device__ __forceinline__
#else
#define SURFEL_FN inline
#endif
#ifndef SURFEL_NAMESPACE             // objects for different CPUs must not share inline functions: each names its own namespace
#define SURFEL_NAMESPACE surfel
#endif

namespace SURFEL_NAMESPACE {

// From a (4, 4) world-to-camera matrix and a (3, 3) pinhole matrix, row-major; K may be null where only the place matters.
template <class T> SURFEL_FN Camera<T> load_camera(const T* view, const T* K) {
  Camera<T> cam;
  for (int i = 0; i < 3; i++) {
    for (int k = 0; k < 3; k++) cam.rotation[3 * i + k] = view[4 * i + k];
    cam.translation[i] = view[4 * i + 3];
  }
  if (K) {
    cam.fx = K[0];
    cam.cx = K[2];
    cam.fy = K[4];
    cam.cy = K[5];
  }
  return cam;
}

// Where the camera is, for make_frame: -R^-1 t. R is taken as given, a rotation up to rounding only, so its cofactors are not R.
template <class T> SURFEL_FN void place_eye(Camera<T>& cam) {
  const T* const t = cam.translation;
  double m[9], volume = 0;
  for (int i = 0; i < 9; i++) m[i] = cam.rotation[i];
  const double cofactors[9] = {m[4] * m[8] - m[5] * m[7], m[5] * m[6] - m[3] * m[8], m[3] * m[7] - m[4] * m[6],
                               m[7] * m[2] - m[8] * m[1], m[8] * m[0] - m[6] * m[2], m[6] * m[1] - m[7] * m[0],
                               m[1] * m[5] - m[2] * m[4], m[2] * m[3] - m[0] * m[5], m[0] * m[4] - m[1] * m[3]};
  for (int i = 0; i < 3; i++) volume += m[i] * cofactors[i];
  for (int i = 0; i < 3; i++) {
    const double eye = -(cofactors[i] * t[0] + cofactors[3 + i] * t[1] + cofactors[6 + i] * t[2]) / volume;
    cam.eye[i] = T(eye);
    cam.eye_low[i] = T(eye - cam.eye[i]);
  }
  cam.volume = T(volume);
}

template <class T> SURFEL_FN T smaller(T a, T b) { return b < a ? b : a; }
template <class T> SURFEL_FN T larger(T a, T b) { return a < b ? b : a; }
template <class T> SURFEL_FN T absolute(T a) { return a < T(0) ? -a : a; }
// 255 for 1, rounded and clamped
template <class T> SURFEL_FN uint8_t to_byte(T a) { return (uint8_t)smaller(larger(a * T(255) + T(0.5), T(0)), T(255)); }
template <class T> SURFEL_FN T dot3(const T* a, const T* b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]; }
// out = M v and out += M^T v for a row-major 3x3 M
template <class T> SURFEL_FN void multiply(const T* m, const T* v, T* out) {
  for (int i = 0; i < 3; i++) out[i] = dot3(m + 3 * i, v);
}
template <class T> SURFEL_FN void add_transposed(const T* m, const T* v, T* out) {
  for (int i = 0; i < 3; i++) out[i] += m[i] * v[0] + m[3 + i] * v[1] + m[6 + i] * v[2];
}

// A number in twice the precision of T: the sum of its parts. Products and sums of rounded numbers are exact but for T's last bits
// squared. nvcc must not fuse a product with a sum that follows: `rounded` forbids it.
#ifdef __CUDA_ARCH__
SURFEL_FN float rounded(float a, float b) { return __fmul_rn(a, b); }
SURFEL_FN double rounded(double a, double b) { return __dmul_rn(a, b); }
#else
template <class T> SURFEL_FN T rounded(T a, T b) { return a * b; }
#endif
template <class T> struct Twice {
  T high, low;
  friend SURFEL_FN Twice operator+(const Twice& a, const Twice& b) {
    const T s = a.high + b.high, part = s - a.high;
    return {s, (a.high - (s - part)) + (b.high - part) + (a.low + b.low)};
  }
};
template <class T> SURFEL_FN Twice<T> product(T a, T b) {
  const T p = rounded(a, b);
  return {p, std::fma(a, b, -p)};
}
template <class T> SURFEL_FN Twice<T> product(const Twice<T>& a, const Twice<T>& b) {
  Twice<T> p = product(a.high, b.high);
  p.low += a.high * b.low + a.low * b.high;
  return p;
}

// (mean - eye) . normal |q|^2, that is depth times the cosine at which the surfel is seen, for a quaternion of any length.
template <class T> SURFEL_FN T sight(const Camera<T>& cam, const T* mean, const T* q) {
  const T w = q[0], x = q[1], y = q[2], z = q[3];
  const Twice<T> half_x = product(x, z) + product(w, y), half_y = product(y, z) + product(-w, x);
  const Twice<T> normal[3] = {half_x + half_x, half_y + half_y,
                              (product(w, w) + product(-x, x)) + (product(z, z) + product(-y, y))};
  Twice<T> sum = {T(0), T(0)};
  for (int i = 0; i < 3; i++)
    sum = sum + product(Twice<T>{mean[i], T(0)} + Twice<T>{-cam.eye[i], -cam.eye_low[i]}, normal[i]);
  return sum.high + sum.low;
}

// The mean on the screen, f p_i/Z + c, along x (i = 0) or y (1).
template <class T> SURFEL_FN T exact_pixel(const Camera<T>& cam, const T* mean, int i, T f, T c) {
  Twice<T> p[2];
  for (int k = 0; k < 2; k++) {
    const int row = k ? 2 : i;
    p[k] = Twice<T>{cam.translation[row], T(0)};
    for (int m = 0; m < 3; m++) p[k] = p[k] + product(cam.rotation[3 * row + m], mean[m]);
  }
  const T ratio = p[0].high / p[1].high;
  const Twice<T> rest = p[0] + product(Twice<T>{-ratio, T(0)}, p[1]);    // of the division
  const Twice<T> pixel = product(f, ratio) + Twice<T>{c, f * ((rest.high + rest.low) / p[1].high)};
  return pixel.high + pixel.low;
}

// The surfel in camera space: what projection computes and its gradient needs again.
template <class T> struct Frame {
  T q[4], inverse_norm;              // unit quaternion
  T tu[3], tv[3], normal[3];         // unit axes, camera space
  T p[3], ix, iy;                    // centre; X/Z, Y/Z
  T a, b, c, d, e, f, det;           // homography; det = ad - bc
  T sight;                           // p . normal
  T centre_x, centre_y;              // p on the screen, pixels
  T box;                             // 9 (e^2 + f^2) - Z^2, the denominator of the 3-sigma box
};

// False when the surfel is culled: centre not beyond `near`, seen edge-on, or anything not a number.
template <class T> SURFEL_FN bool make_frame(const Camera<T>& cam, const SurfelInput<T>& in, T near, Frame<T>& o) {
  const T* R = cam.rotation;
  multiply(R, in.mean, o.p);
  for (int i = 0; i < 3; i++) o.p[i] += cam.translation[i];
  if (!(o.p[2] > near)) return false;
  const T* q = in.quat;
  o.inverse_norm = T(1) / std::sqrt(q[0] * q[0] + q[1] * q[1] + q[2] * q[2] + q[3] * q[3]);
  for (int i = 0; i < 4; i++) o.q[i] = q[i] * o.inverse_norm;
  const T w = o.q[0], x = o.q[1], y = o.q[2], z = o.q[3];
  const T tu[3] = {1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)};
  const T tv[3] = {2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)};
  const T n[3] = {2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)};
  multiply(R, tu, o.tu);
  multiply(R, tv, o.tv);
  multiply(R, n, o.normal);
  const T su = in.scale[0], sv = in.scale[1];
  o.ix = o.p[0] / o.p[2];
  o.iy = o.p[1] / o.p[2];
  o.a = cam.fx * su * (o.tu[0] - o.tu[2] * o.ix);
  o.b = cam.fx * sv * (o.tv[0] - o.tv[2] * o.ix);
  o.c = cam.fy * su * (o.tu[1] - o.tu[2] * o.iy);
  o.d = cam.fy * sv * (o.tv[1] - o.tv[2] * o.iy);
  o.e = su * o.tu[2];
  o.f = sv * o.tv[2];
  o.sight = dot3(o.p, o.normal);
  const T distance2 = dot3(o.p, o.p);
  o.centre_x = cam.fx * o.ix + cam.cx;
  o.centre_y = cam.fy * o.iy + cam.cy;
  if (o.sight * o.sight < T(0.01) * distance2) {    // nearly edge-on: a line on the screen, thinner than a pixel
    o.sight = sight(cam, in.mean, q) * (o.inverse_norm * o.inverse_norm);
    o.centre_x = exact_pixel(cam, in.mean, 0, cam.fx, cam.cx);
    o.centre_y = exact_pixel(cam, in.mean, 1, cam.fy, cam.cy);
  }
  o.det = cam.fx * cam.fy * cam.volume * su * sv * o.sight / o.p[2];
  o.box = 9 * (o.e * o.e + o.f * o.f) - o.p[2] * o.p[2];
  // Seen edge-on, a surfel covers no pixel (its depth is 0 wherever it is defined); det is proportional to the cosine tested here.
  return o.sight * o.sight > T(1e-12) * distance2 && absolute(o.det) > T(0) && o.box != T(0);
}

template <class T> SURFEL_FN T facing(const Frame<T>& o) { return o.sight > T(0) ? T(-1) : T(1); }

// Pixel range of the box {u^2 + v^2 <= r2} of the surfel: centre offset and half extents squared, from the projected mean.
template <class T> SURFEL_FN void level_box(const Frame<T>& o, T r2, T denominator, T* offset, T* half2) {
  const T k = r2 / denominator;
  offset[0] = k * (o.a * o.e + o.b * o.f);
  offset[1] = k * (o.c * o.e + o.d * o.f);
  half2[0] = offset[0] * offset[0] - k * (o.a * o.a + o.b * o.b);
  half2[1] = offset[1] * offset[1] - k * (o.c * o.c + o.d * o.d);
}

template <class T> SURFEL_FN void clamp_range(T low, T high, int size, int& first, int& last) {
  low = smaller(larger(low, T(-1)), T(size + 1));
  high = smaller(larger(high, T(-1)), T(size + 1));
  first = larger((int)std::ceil(low), 0);
  last = smaller((int)std::floor(high), size - 1);
}

// Fills the record, the pixels the surfel can reach, and its 3-sigma screen radius. False when it is culled.
template <class T>
SURFEL_FN bool project(const Camera<T>& cam, const SurfelInput<T>& in, T near, int cutoff, int width, int height,
                       Record<T>& rec, Box& box, int& radius) {
  Frame<T> o;
  if (!(in.opacity > T(1) / T(255)) || !make_frame(cam, in, near, o)) return false;
  const T inv = T(1) / o.det, z = o.p[2];
  rec.centre_x = o.centre_x;
  rec.centre_y = o.centre_y;
  rec.m00 = z * o.d * inv;
  rec.m01 = -z * o.b * inv;
  rec.m10 = -z * o.c * inv;
  rec.m11 = z * o.a * inv;
  rec.g0 = (o.c * o.f - o.d * o.e) * inv;
  rec.g1 = (o.e * o.b - o.f * o.a) * inv;
  rec.z = z;
  T offset[2], half2[2];
  level_box(o, T(9), o.box, offset, half2);
  rec.lowpass_x = offset[0];
  rec.lowpass_y = offset[1];
  rec.log2_opacity = std::log2(in.opacity);
  const T sign = facing(o);
  for (int i = 0; i < 3; i++) rec.normal[i] = sign * o.normal[i];
  rec.level = T(1.3862943611198906) * (rec.log2_opacity + T(7.994353436858858));   // 2 ln 2 (log2 o + log2 255)
  T sum = half2[0] + half2[1];
  for (int i = 0; i < 16; i++) sum += (&rec.centre_x)[i];
  if (!(sum - sum == T(0))) return false;

  const T extent = std::sqrt(larger(larger(half2[0], half2[1]), T(1e-4)));
  const T reach = std::ceil(smaller(larger(extent, T(2.121318)), T(1 << 20)));
  radius = (int)reach;
  // Exact reach: the level box of the opacity, joined with the low-pass disc.
  const T lx = rec.centre_x + rec.lowpass_x, ly = rec.centre_y + rec.lowpass_y;
  const T denominator = rec.level * (o.e * o.e + o.f * o.f) - z * z, margin = T(0.02) - T(0.5), disc = std::sqrt(T(0.5) * rec.level);
  if (denominator < T(-1e-4) * z * z) {
    level_box(o, rec.level, denominator, offset, half2);
    const T hx = std::sqrt(larger(half2[0], T(0))), hy = std::sqrt(larger(half2[1], T(0)));
    const T ex = rec.centre_x + offset[0], ey = rec.centre_y + offset[1];
    clamp_range(smaller(ex - hx, lx - disc) - T(0.52), larger(ex + hx, lx + disc) + margin, width, box.x0, box.x1);
    clamp_range(smaller(ey - hy, ly - disc) - T(0.52), larger(ey + hy, ly + disc) + margin, height, box.y0, box.y1);
  } else {                           // the ellipse reaches the camera's plane: it may be unbounded on the screen
    box = {0, width - 1, 0, height - 1};
  }
  if (cutoff == kSquare3Sigma) {     // the tiles touched by the 3-sigma square, in integer pixel coordinates
    int tx0, tx1, ty0, ty1;
    const T px = lx - T(0.5), py = ly - T(0.5);
    const int columns = (width + kTile - 1) / kTile, rows = (height + kTile - 1) / kTile;
    clamp_range(std::floor((px - reach) / kTile), std::floor((px + reach + (kTile - 1)) / kTile) - 1, columns, tx0, tx1);
    clamp_range(std::floor((py - reach) / kTile), std::floor((py + reach + (kTile - 1)) / kTile) - 1, rows, ty0, ty1);
    if (tx0 > tx1 || ty0 > ty1) return false;
    box = {larger(box.x0, tx0 * kTile), smaller(box.x1, tx1 * kTile + kTile - 1),
           larger(box.y0, ty0 * kTile), smaller(box.y1, ty1 * kTile + kTile - 1)};
    return true;
  }
  return box.x0 <= box.x1 && box.y0 <= box.y1;
}

// Gradient of the loss with respect to one surfel's inputs, added to `out`, from the per-pixel sums of pixel.h.
// out.screen is (dL/dT_u2, dL/dT_v2) depth (W, H)/2: the densification signal of 2DGS, T being its world-to-pixel homography.
template <class T>
SURFEL_FN void project_backward(const Camera<T>& cam, const SurfelInput<T>& in, T near, int width, int height,
                                const T* sums, SurfelGradient<T>& out) {
  Frame<T> o;
  if (!make_frame(cam, in, near, o)) return;
  const T inv = T(1) / o.det, z = o.p[2], a = o.a, b = o.b, c = o.c, d = o.d, e = o.e, f = o.f;
  const T m00 = z * d * inv, m01 = -z * b * inv, m10 = -z * c * inv, m11 = z * a * inv;
  const T g0 = (c * f - d * e) * inv, g1 = (e * b - f * a) * inv;
  const T h0 = sums[0], h1 = sums[3], h2 = sums[6], ox = sums[9], oy = sums[10];
  // The plane. For a pixel's ray p/Z + r, r = (x'/fx, y'/fy, 0), and sight s = p . n, the record says
  //   w = 1 + Z (n . r)/s,  u w = Z/s_u (t_u . r - (n . r) (t_u . p)/s),  v w likewise.
  // Differentiated in this form the large terms of a surfel seen edge-on, those of 1/s, stand together: through a..f they cancel.
  const T *tu = o.tu, *tv = o.tv, *n = o.normal, *p = o.p;
  const T kx = z / cam.fx, ky = z / cam.fy, per_z = T(1) / z, per_s = T(1) / o.sight;
  const T per_u = T(1) / in.scale[0], per_v = T(1) / in.scale[1];
  const T r0[2] = {kx * sums[1], ky * sums[2]}, r1[2] = {kx * sums[4], ky * sums[5]}, r2[2] = {kx * sums[7], ky * sums[8]};
  const T n0 = per_u * per_s * (r0[0] * n[0] + r0[1] * n[1]), n1 = per_v * per_s * (r1[0] * n[0] + r1[1] * n[1]);
  const T n2 = per_s * (r2[0] * n[0] + r2[1] * n[1]), pu = dot3(p, tu) * per_s, pv = dot3(p, tv) * per_s;
  const T ds = n0 * pu + n1 * pv - n2 * per_s;
  const T along_u = m00 * sums[1] + m01 * sums[2], along_v = m10 * sums[4] + m11 * sums[5];    // -dL/d(log scale)
  // The low-pass centre: through the homography, in which nothing is small.
  const T k = 9 / o.box, lx = k * (a * e + b * f), ly = k * (c * e + d * f), dbox = -(lx * ox + ly * oy) * k * T(1.0 / 9);
  const T fa = cam.fx * k * e * ox, fb = cam.fx * k * f * ox, fc = cam.fy * k * e * oy, fd = cam.fy * k * f * oy;
  const T de = k * (a * ox + c * oy) + 18 * e * dbox, df = k * (b * ox + d * oy) + 18 * f * dbox;
  const T dsu[3] = {fa, fc, de - o.ix * fa - o.iy * fc}, dsv[3] = {fb, fd, df - o.ix * fb - o.iy * fd};
  // The projected mean, of both.
  const T sx = ox - (m00 * h0 + m10 * h1 + g0 * h2) - k * (e * e + f * f) * ox;
  const T sy = oy - (m01 * h0 + m11 * h1 + g1 * h2) - k * (e * e + f * f) * oy;
  T dp[3] = {cam.fx * sx * per_z, cam.fy * sy * per_z, T(0)}, gu[3] = {}, gv[3] = {}, gn[3] = {}, tmp[3];
  dp[2] = (along_u + along_v + g0 * sums[7] + g1 * sums[8]) * per_z + sums[12] - 2 * z * dbox - o.ix * dp[0] - o.iy * dp[1];
  for (int i = 0; i < 3; i++) dp[i] += ds * n[i] - n0 * tu[i] - n1 * tv[i];
  out.screen[0] = dp[0] * kx * T(0.5) * width;
  out.screen[1] = dp[1] * ky * T(0.5) * height;
  add_transposed(cam.rotation, dp, out.mean);
  out.scale[0] += dot3(dsu, tu) - along_u * per_u;
  out.scale[1] += dot3(dsv, tv) - along_v * per_v;
  // rotation: gradient of the world-space columns, then of the quaternion, then through its normalisation
  const T sign = facing(o);
  for (int i = 0; i < 3; i++) tmp[i] = dsu[i] * in.scale[0] - n0 * p[i] + (i < 2 ? per_u * r0[i] : T(0));
  add_transposed(cam.rotation, tmp, gu);
  for (int i = 0; i < 3; i++) tmp[i] = dsv[i] * in.scale[1] - n1 * p[i] + (i < 2 ? per_v * r1[i] : T(0));
  add_transposed(cam.rotation, tmp, gv);
  for (int i = 0; i < 3; i++)
    tmp[i] = sums[13 + i] * sign + ds * p[i] + (i < 2 ? per_s * r2[i] - per_u * pu * r0[i] - per_v * pv * r1[i] : T(0));
  add_transposed(cam.rotation, tmp, gn);
  const T w = o.q[0], x = o.q[1], y = o.q[2], zq = o.q[3];
  const T gq[4] = {
      2 * (zq * (gu[1] - gv[0]) + y * (gn[0] - gu[2]) + x * (gv[2] - gn[1])),
      2 * (y * (gu[1] + gv[0]) + zq * (gu[2] + gn[0]) + w * (gv[2] - gn[1])) - 4 * x * (gv[1] + gn[2]),
      2 * (x * (gu[1] + gv[0]) + zq * (gv[2] + gn[1]) + w * (gn[0] - gu[2])) - 4 * y * (gu[0] + gn[2]),
      2 * (x * (gu[2] + gn[0]) + y * (gv[2] + gn[1]) + w * (gu[1] - gv[0])) - 4 * zq * (gu[0] + gv[1])};
  const T along = gq[0] * w + gq[1] * x + gq[2] * y + gq[3] * zq;
  for (int i = 0; i < 4; i++) out.quat[i] += (gq[i] - along * o.q[i]) * o.inverse_norm;
  out.opacity += sums[11] / in.opacity;
}

}  // namespace SURFEL_NAMESPACE
