// C interface of the image loss: planes in bands of rows, in parallel; the bands are added up in order, so results do not depend on
// the number of threads.
#include <omp.h>
#include <vector>
#include "call.h"
#include "select.h"

namespace {

constexpr int kBandRows = 128;

template <class T> void loss_forward(const LossCall& c) {
  const Kernels<T>& kernels = *select_kernels<T>();
  const int64_t area = c.width * c.height, bands = (c.height + kBandRows - 1) / kBandRows, tasks = c.batch * c.channels * bands;
  const int sums = 1 + (int)c.weights;
  const double windows = double(c.channels) * (c.height - 10) * (c.width - 10), pixels = double(c.channels) * area;
  std::vector<double> parts(tasks * sums);
  const int threads = worthwhile(c.threads, tasks);
  const int64_t scratch_size = kLossRows * loss_pitch((int)c.width);
  Buffer<T> scratch;
  scratch.reserve(threads * scratch_size);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t task = 0; task < tasks; task++) {
    const int64_t plane = task / bands, first = task % bands * kBandRows;
    LossBand<T> j{};
    j.image = at<T>(c.image, area, plane);
    j.target = at<T>(c.target, area, plane);
    j.weight = at<T>(c.weight, c.s_weight, plane / c.channels);
    j.width = (int)c.width;
    j.height = (int)c.height;
    j.first = (int)first;
    j.last = (int)std::min(first + kBandRows, c.height);
    j.weights = (int)c.weights;
    j.gradient = at<T>(c.d_similarity, area, plane);
    j.scale = T(1 / windows);
    j.sums = parts.data() + task * sums;
    j.scratch = scratch.get() + omp_get_thread_num() * scratch_size;
    kernels.loss_band(j);
  }
  for (int64_t b = 0; b < c.batch; b++)
    for (int q = 0; q < sums; q++) {
      double total = 0;
      for (int64_t task = b * c.channels * bands; task < (b + 1) * c.channels * bands; task++) total += parts[task * sums + q];
      T* const out = q == 0 ? at<T>(c.ssim, 1, b) : at<T>(c.l1, c.weights, b) + q - 1;
      *out = T(total / (q == 0 ? windows : pixels));
    }
}

template <class T> void loss_backward(const LossCall& c) {
  const int64_t area = c.width * c.height, planes = c.batch * c.channels;
  const T scale = T(1.0 / (double(c.channels) * area));
#pragma omp parallel for schedule(static) num_threads(worthwhile(c.threads, planes))
  for (int64_t plane = 0; plane < planes; plane++) {
    const int64_t b = plane / c.channels;
    const T *x = at<T>(c.image, area, plane), *y = at<T>(c.target, area, plane), *ds = at<T>(c.d_similarity, area, plane);
    const T* const g_l1 = at<T>(c.g_l1, c.weights, b);
    const T g_ssim = c.g_ssim ? *at<T>(c.g_ssim, 1, b) : T(0);
    T* const out = at<T>(c.d_image, area, plane);
    for (int64_t p = 0; p < area; p++) out[p] = g_ssim * ds[p];
    for (int64_t q = 0; g_l1 && q < c.weights; q++) {
      const T g = g_l1[q] * scale;
      if (c.weight) {
        const T* const w = at<T>(c.weight, c.s_weight, b) + q * area;
        for (int64_t p = 0; p < area; p++) out[p] += g * w[p] * (T(x[p] > y[p]) - T(x[p] < y[p]));
      } else {
        for (int64_t p = 0; p < area; p++) out[p] += g * (T(x[p] > y[p]) - T(x[p] < y[p]));
      }
    }
  }
}

}  // namespace

EXPORT int surfel_loss_forward(const LossCall* c, int is_double) {
  return guarded([&] { is_double ? loss_forward<double>(*c) : loss_forward<float>(*c); });
}
EXPORT void surfel_loss_backward(const LossCall* c, int is_double) {
  is_double ? loss_backward<double>(*c) : loss_backward<float>(*c);
}
