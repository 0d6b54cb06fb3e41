// Spherical harmonics, degree 0 to 3: colour = max(0, 1/2 + sum_k Y_k(direction) c_k), with the real basis, order and signs that
// Gaussian-splatting files use.
#pragma once
#include "surfel.h"

namespace SURFEL_NAMESPACE {

// Values of the basis at the unit vector (x, y, z).
template <class T> SURFEL_FN void sh_basis(int degree, T x, T y, T z, T* v) {
  v[0] = T(0.28209479177387814);
  if (degree < 1) return;
  const T c1 = T(0.4886025119029199);
  v[1] = -c1 * y;
  v[2] = c1 * z;
  v[3] = -c1 * x;
  if (degree < 2) return;
  const T c2 = T(1.0925484305920792), xx = x * x, yy = y * y, zz = z * z;
  v[4] = c2 * x * y;
  v[5] = -c2 * y * z;
  v[6] = T(0.31539156525252005) * (2 * zz - xx - yy);
  v[7] = -c2 * x * z;
  v[8] = c2 / 2 * (xx - yy);
  if (degree < 3) return;
  const T a = T(0.5900435899266435), b = T(2.890611442640554), c = T(0.4570457994644658);
  v[9] = -a * y * (3 * xx - yy);
  v[10] = b * x * y * z;
  v[11] = -c * y * (4 * zz - xx - yy);
  v[12] = T(0.3731763325901154) * z * (2 * zz - 3 * xx - 3 * yy);
  v[13] = -c * x * (4 * zz - xx - yy);
  v[14] = b / 2 * z * (xx - yy);
  v[15] = -a * x * (xx - 3 * yy);
}

// out = sum_k weight_k grad Y_k(x, y, z), the polynomials taken as functions on R^3.
template <class T> SURFEL_FN void sh_basis_backward(int degree, T x, T y, T z, const T* weight, T* out) {
  T gx = 0, gy = 0, gz = 0;
  if (degree >= 1) {
    const T c1 = T(0.4886025119029199);
    gx -= c1 * weight[3];
    gy -= c1 * weight[1];
    gz += c1 * weight[2];
  }
  if (degree >= 2) {
    const T c2 = T(1.0925484305920792), c20 = T(0.31539156525252005);
    gx += c2 * (y * weight[4] - z * weight[7] + x * weight[8]) - 2 * c20 * x * weight[6];
    gy += c2 * (x * weight[4] - z * weight[5] - y * weight[8]) - 2 * c20 * y * weight[6];
    gz += 4 * c20 * z * weight[6] - c2 * (y * weight[5] + x * weight[7]);
  }
  if (degree >= 3) {
    const T a = T(0.5900435899266435), b = T(2.890611442640554), c = T(0.4570457994644658), d = T(0.3731763325901154);
    const T xx = x * x, yy = y * y, zz = z * z;
    gx += -6 * a * x * y * weight[9] + b * y * z * weight[10] + 2 * c * x * y * weight[11] - 6 * d * x * z * weight[12] -
          c * (4 * zz - 3 * xx - yy) * weight[13] + b * x * z * weight[14] - 3 * a * (xx - yy) * weight[15];
    gy += -3 * a * (xx - yy) * weight[9] + b * x * z * weight[10] - c * (4 * zz - xx - 3 * yy) * weight[11] -
          6 * d * y * z * weight[12] + 2 * c * x * y * weight[13] - b * y * z * weight[14] + 6 * a * x * y * weight[15];
    gz += b * x * y * weight[10] - 8 * c * y * z * weight[11] + d * (6 * zz - 3 * xx - 3 * yy) * weight[12] -
          8 * c * x * z * weight[13] + b / 2 * (xx - yy) * weight[14];
  }
  out[0] = gx;
  out[1] = gy;
  out[2] = gz;
}

template <class T> SURFEL_FN void camera_position(const Camera<T>& cam, T* out) {
  out[0] = out[1] = out[2] = T(0);
  add_transposed(cam.rotation, cam.translation, out);
  for (int i = 0; i < 3; i++) out[i] = -out[i];
}

// Unit vector from the camera to the mean; returns 1/distance.
template <class T> SURFEL_FN T view_direction(const T* mean, const T* eye, T* dir) {
  for (int i = 0; i < 3; i++) dir[i] = mean[i] - eye[i];
  const T inverse = T(1) / std::sqrt(dot3(dir, dir));
  for (int i = 0; i < 3; i++) dir[i] *= inverse;
  return inverse;
}

// sh: (K, 3), K >= (degree + 1)^2
template <class T> SURFEL_FN void sh_colour(int degree, const T* mean, const T* eye, const T* sh, T* colour) {
  T dir[3], basis[16];
  view_direction(mean, eye, dir);
  sh_basis(degree, dir[0], dir[1], dir[2], basis);
  T sum[3] = {T(0.5), T(0.5), T(0.5)};
  for (int k = 0; k < (degree + 1) * (degree + 1); k++)
    for (int c = 0; c < 3; c++) sum[c] += basis[k] * sh[3 * k + c];
  for (int c = 0; c < 3; c++) colour[c] = sum[c] < T(0) ? T(0) : sum[c];     // NaN passes: rasterization culls it
}

// Adds to g_mean (3) and g_sh (K, 3); either may be null.
template <class T>
SURFEL_FN void sh_colour_backward(int degree, const T* mean, const T* eye, const T* sh, const T* g_colour, T* g_mean, T* g_sh) {
  const int count = (degree + 1) * (degree + 1);
  if (g_colour[0] == 0 && g_colour[1] == 0 && g_colour[2] == 0) return;      // culled surfels may hold NaN
  T dir[3], basis[16], weight[16], g[3];
  const T inverse = view_direction(mean, eye, dir);
  sh_basis(degree, dir[0], dir[1], dir[2], basis);
  for (int c = 0; c < 3; c++) {
    T sum = T(0.5);
    for (int k = 0; k < count; k++) sum += basis[k] * sh[3 * k + c];
    g[c] = sum < T(0) ? T(0) : g_colour[c];
  }
  for (int k = 0; k < count; k++) {
    weight[k] = g[0] * sh[3 * k] + g[1] * sh[3 * k + 1] + g[2] * sh[3 * k + 2];
    if (g_sh)
      for (int c = 0; c < 3; c++) g_sh[3 * k + c] += basis[k] * g[c];
  }
  if (!g_mean || degree == 0) return;
  T gd[3];
  sh_basis_backward(degree, dir[0], dir[1], dir[2], weight, gd);
  const T along = dot3(gd, dir);
  for (int i = 0; i < 3; i++) g_mean[i] += (gd[i] - along * dir[i]) * inverse;
}

}  // namespace SURFEL_NAMESPACE
