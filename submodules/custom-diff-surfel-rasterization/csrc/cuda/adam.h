// One step of Adam (Kingma and Ba 2015, algorithm 1, in the order of its section 2's last paragraph) over many arrays in one launch.
#pragma once
#include "device.h"

namespace surfel {

constexpr int kAdamThreads = 256, kAdamEach = 8, kAdamBlock = kAdamThreads * kAdamEach;  // numbers of a thread, of a block

// Moved as one, so that a thread waits for memory once.
template <class T> __global__ void __launch_bounds__(kAdamThreads) adam_step(const AdamCall c) {
  __shared__ T shared[2];
  int k = 0;
  while (k + 1 < c.used && (int)blockIdx.x >= c.arrays[k + 1].first_block) k++;
  const AdamArray& a = c.arrays[k];
  if (c.skip && *c.skip != 0.f) return;
  if (threadIdx.x == 0) {                      // double precision, since 1 - beta is small; slow, so once a block
    const double step = *a.step;
    shared[0] = T(*a.rate / (1.0 - ::pow(c.beta1, step)));
    shared[1] = T(1.0 / ::sqrt(1.0 - ::pow(c.beta2, step)));
  }
  __syncthreads();
  const T rate = shared[0], root = shared[1], keep1 = T(c.beta1), new1 = T(1.0 - c.beta1), keep2 = T(c.beta2), new2 = T(1.0 - c.beta2);
  const int64_t first = (blockIdx.x - a.first_block) * int64_t(kAdamBlock) + threadIdx.x;
  T *const values = static_cast<T*>(a.value), *const means = static_cast<T*>(a.mean), *const squares = static_cast<T*>(a.square);
  const T* const gradients = static_cast<const T*>(a.gradient);
  T value[kAdamEach], gradient[kAdamEach], mean[kAdamEach], square[kAdamEach];
#pragma unroll
  for (int e = 0; e < kAdamEach; e++) {
    const int64_t i = first + e * kAdamThreads;
    if (i < a.count) value[e] = values[i], gradient[e] = gradients[i], mean[e] = means[i], square[e] = squares[i];
  }
#pragma unroll
  for (int e = 0; e < kAdamEach; e++) {
    const int64_t i = first + e * kAdamThreads;
    if (i >= a.count) break;
    mean[e] = keep1 * mean[e] + new1 * gradient[e];
    square[e] = keep2 * square[e] + new2 * gradient[e] * gradient[e];
    means[i] = mean[e];
    squares[i] = square[e];
    values[i] = value[e] - rate * mean[e] / (::sqrt(square[e]) * root + T(c.epsilon));
  }
}

}  // namespace surfel
