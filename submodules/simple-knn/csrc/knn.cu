// Mean squared distance of each point to its 3 nearest others, exactly: points come sorted along a Morton curve; boxes bound runs
// of kRun points and of kRun boxes, and only boxes nearer than the third best so far are looked into. C interface, no torch headers.
#include <cuda_runtime.h>
#include <cstdint>

#ifndef SURFEL_LAUNCH                // tests/cuda_emulation runs the same kernels on the host
#define SURFEL_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace knn {

constexpr int kRun = 32;

template <class T> struct Best {
  T first, second, third;            // squared distances, ascending
  __device__ void add(T d) {
    if (d >= third) return;
    third = d < second ? second : d;
    const T low = d < second ? d : second;
    second = low < first ? first : low;
    first = low < first ? low : first;
  }
};

template <class T> __device__ T squared(const T* a, const T* b) {
  const T x = a[0] - b[0], y = a[1] - b[1], z = a[2] - b[2];
  return x * x + y * y + z * z;
}

// Squared distance to a box (low xyz, high xyz), rounded down a little: never above that of a point inside.
template <class T> __device__ T to_box(const T* p, const T* box) {
  T sum = 0;
  for (int k = 0; k < 3; k++) {
    const T below = box[k] - p[k], above = p[k] - box[3 + k], d = below > above ? below : above;
    if (d > T(0)) sum += d * d;
  }
  return sum * T(0.999999);
}

// A lane per point; a warp's points are neighbours, so they look into nearly the same boxes.
template <class T>
__global__ void nearest(int64_t count, const T* points, int64_t boxes, const T* box, int64_t groups, const T* group, T* out) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const T* const p = points + 3 * i;
  const int64_t own = i / kRun;
  const T far = T(3e38);
  Best<T> best = {far, far, far};
  auto look_into = [&](int64_t b) {
    const int64_t end = (b + 1) * kRun < count ? (b + 1) * kRun : count;
    for (int64_t k = b * kRun; k < end; k++)
      if (k != i) best.add(squared(p, points + 3 * k));
  };
  look_into(own);                    // a good bound to begin with
  for (int64_t g = 0; g < groups; g++) {
    if (to_box(p, group + 6 * g) >= best.third) continue;
    const int64_t end = (g + 1) * kRun < boxes ? (g + 1) * kRun : boxes;
    for (int64_t b = g * kRun; b < end; b++)
      if (b != own && to_box(p, box + 6 * b) < best.third) look_into(b);
  }
  out[i] = (best.first + best.second + best.third) / T(3);
}

template <class T>
void launch(int64_t count, const void* points, int64_t boxes, const void* box, int64_t groups, const void* group, void* out,
            cudaStream_t stream) {
  auto* const kernel = &nearest<T>;
  SURFEL_LAUNCH(kernel, (int)((count + 127) / 128), 128, stream, count, static_cast<const T*>(points), boxes,
                static_cast<const T*>(box), groups, static_cast<const T*>(group), static_cast<T*>(out));
}

}  // namespace knn

extern "C" __attribute__((visibility("default"))) int knn_nearest(int64_t count, const void* points, int64_t boxes, const void* box,
                                                                  int64_t groups, const void* group, void* out, int is_double,
                                                                  cudaStream_t stream) {
  (is_double ? knn::launch<double> : knn::launch<float>)(count, points, boxes, box, groups, group, out, stream);
  return (int)cudaGetLastError();
}
