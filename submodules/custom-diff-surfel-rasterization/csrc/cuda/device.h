// What the CUDA kernels stand on: numbers of one pixel a lane for pixel.h, warp tools, the job that every kernel is given.
#pragma once
#include <cuda_runtime.h>
#include "../common/call.h"
#include "../common/surfel.h"

#ifndef SURFEL_LAUNCH                // tests/cuda_emulation runs the same kernels on the host
#define SURFEL_LAUNCH(kernel, grid, block, stream, ...) (kernel)<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif
#ifndef SURFEL_FEW_TILES             // so many tiles count as few (tests set it to 0)
#define SURFEL_FEW_TILES 8192
#endif

namespace surfel {

SURFEL_FN float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
SURFEL_FN double fma(double a, double b, double c) { return ::fma(a, b, c); }
template <class T> SURFEL_FN T select(bool m, T a, T b) { return m ? a : b; }
template <class T> SURFEL_FN T minimum(T a, T b) { return a < b ? a : b; }
template <class T> SURFEL_FN T negative(T a) { return -a; }
SURFEL_FN double reciprocal(double x) { return 1.0 / x; }
SURFEL_FN double exp2(double x) { return ::exp2(x); }
SURFEL_FN float reciprocal(float x) {          // 1 ulp
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.f / x;
#endif
}
SURFEL_FN float exp2(float x) {                // 2 ulp
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::exp2f(x);
#endif
}

SURFEL_FN double fast_root(double x) { return ::sqrt(x); }
SURFEL_FN float fast_root(float x) {           // 1 ulp
#ifdef __CUDA_ARCH__
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return ::sqrtf(x);
#endif
}

constexpr int kWarp = 32, kEdge = 8;           // tiles of 8x8 pixels
constexpr int kWarpsPerBlock = 4, kRecord = 12;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kClasses = 64, kClassWidth = 16; // tiles are taken longest first, by classes of list length
constexpr int kLongClass = 33, kLongClassOfFew = 17, kLongList = (kLongClass - 1) * kClassWidth;

__host__ __device__ inline int length_class(int n) { return n == 0 ? 0 : n / kClassWidth + 1 < kClasses ? n / kClassWidth + 1 : kClasses - 1; }

// Zeroed before each count, together with tile_count, which follows it in memory.
struct Counters {
  unsigned long long pairs;                    // (surfel, tile) pairs of all images: what the pair buffer must hold
  int classes[kClasses], placed[kClasses];
};

// Mirrored by cuda.py. All device pointers; everything of `call` likewise.
struct CudaCall {
  Call call;
  int64_t capacity;                            // pairs that keys and ids hold; a tile whose list would not fit stays empty
  int64_t geometry_sums;                       // columns of sums: 12, or 16 when an aux map has a gradient
  void *records, *normals;                     // (B, N, 12): the first numbers of Record; (B, N, 3) or null
  int64_t* tile_start;                         // (B tiles): first pair of the tile's list
  int32_t *tile_count, *tile_order;            // (B tiles): length; tiles longest first
  uint32_t* ids;                               // (capacity): surfels of each tile, front to back
  void *transmittance, *moments;               // state of forward a pixel, null in inference
  int32_t *last, *median;
  void* counters;                              // Counters
  void *boxes, *keys, *cursor;                 // scratch of listing: (B, N, 4) uint16, (capacity) uint64, (B tiles) int32
  void *most_pairs, *most_pairs_host;          // uint64: the greatest count so far, on the device, and a copy the host can read; or null
  void* sums;                                  // scratch of backward: (B, N, geometry_sums)
};

template <class T> struct Job {
  int images, surfels, channels, width, height, tiles_x, tiles, cutoff;
  T near, depth_scale;
  int64_t capacity, s_means, s_quats, s_scales, s_opacities, s_features, s_viewmats, s_Ks, s_background;
  const T *means, *quats, *scales, *opacities, *features, *viewmats, *Ks, *background;
  T *records, *normals;
  int64_t* tile_start;
  int32_t *tile_count, *tile_order;
  uint32_t* ids;
  T *transmittance, *moments;
  int32_t *last, *median;
  ushort4* boxes;
  unsigned long long* keys;
  int32_t* cursor;
  Counters* counters;
  unsigned long long *most_pairs, *most_pairs_host;
  uint8_t* out_bytes;                          // in place of out_features, or null
  T *out_features, *out_alpha, *out_depth, *out_normal, *out_median, *out_distortion;
  int32_t* radii;
  const T *g_features, *g_alpha, *g_depth, *g_normal, *g_median, *g_distortion;
  T *d_means, *d_quats, *d_scales, *d_opacities, *d_features, *d_background, *d_screen, *sums;
  int geometry_sums;
};

template <class T> Job<T> make_job(const CudaCall& c) {
  const Call& a = c.call;
  Job<T> j{};
  j.images = (int)a.batch;
  j.surfels = (int)a.surfels;
  j.channels = (int)a.channels;
  j.width = (int)a.width;
  j.height = (int)a.height;
  j.tiles_x = (j.width + kEdge - 1) / kEdge;
  j.tiles = j.tiles_x * ((j.height + kEdge - 1) / kEdge);
  j.cutoff = (int)a.cutoff;
  j.near = T(a.near);
  j.depth_scale = T(a.far * a.near / (a.far - a.near));
  j.capacity = c.capacity;
  j.geometry_sums = (int)c.geometry_sums;
#define INPUT(name) j.name = static_cast<const T*>(a.name), j.s_##name = a.s_##name;
  INPUT(means) INPUT(quats) INPUT(scales) INPUT(opacities) INPUT(features) INPUT(viewmats) INPUT(Ks) INPUT(background)
  j.out_bytes = static_cast<uint8_t*>(a.as_bytes ? a.out_features : nullptr);
  j.out_features = static_cast<T*>(a.as_bytes ? nullptr : a.out_features);
#define PLANE(from, name) j.name = static_cast<decltype(j.name)>(from.name);
  PLANE(c, records) PLANE(c, normals) PLANE(c, tile_start) PLANE(c, tile_count) PLANE(c, tile_order) PLANE(c, ids)
  PLANE(c, transmittance) PLANE(c, moments) PLANE(c, last) PLANE(c, median) PLANE(c, sums)
  PLANE(c, boxes) PLANE(c, keys) PLANE(c, cursor) PLANE(c, counters)
  PLANE(c, most_pairs) PLANE(c, most_pairs_host)
  PLANE(a, out_alpha) PLANE(a, out_depth) PLANE(a, out_normal) PLANE(a, out_median) PLANE(a, out_distortion)
  PLANE(a, radii) PLANE(a, g_features) PLANE(a, g_alpha) PLANE(a, g_depth) PLANE(a, g_normal) PLANE(a, g_median)
  PLANE(a, g_distortion) PLANE(a, d_means) PLANE(a, d_quats) PLANE(a, d_scales) PLANE(a, d_opacities) PLANE(a, d_features)
  PLANE(a, d_background) PLANE(a, d_screen)
#undef INPUT
#undef PLANE
  return j;
}

// Few tiles leave most of a GPU idle: more warps go to each.
template <class T> SURFEL_FN bool few_tiles(const Job<T>& j) { return int64_t(j.images) * j.tiles <= SURFEL_FEW_TILES; }

// One camera a block, by its first thread: the double precision that placing the eye takes is slow on most GPUs.
template <class T> __device__ __forceinline__ void share_camera(const Job<T>& j, int b, Camera<T>& shared) {
  __syncthreads();                             // no thread may still want the one before
  if (threadIdx.x == 0) {
    shared = load_camera(j.viewmats + j.s_viewmats * b, j.Ks + j.s_Ks * b);
    place_eye(shared);
  }
  __syncthreads();
}
// A surfel's inputs, read at once: the reads do not wait for what is decided meanwhile.
template <class T> struct LoadedSurfel {
  T mean[3], quat[4], scale[2], opacity;
  SURFEL_FN LoadedSurfel(const Job<T>& j, int b, int64_t n) : opacity(j.opacities[j.s_opacities * b + n]) {
    for (int k = 0; k < 3; k++) mean[k] = j.means[j.s_means * b + 3 * n + k];
    for (int k = 0; k < 4; k++) quat[k] = j.quats[j.s_quats * b + 4 * n + k];
    for (int k = 0; k < 2; k++) scale[k] = j.scales[j.s_scales * b + 2 * n + k];
  }
  SURFEL_FN SurfelInput<T> input() const { return {mean, quat, scale, opacity}; }
};
template <class T> SURFEL_FN T level_of(T log2_opacity) { return T(1.3862943611198906) * (log2_opacity + T(7.994353436858858)); }

// Records are 16-byte aligned in memory and move four numbers at a time.
template <class T> struct alignas(16) Four { T v[4]; };
template <class T> SURFEL_FN Record<T> load_record(const Job<T>& j, int64_t i) {
  const Four<T>* const from = reinterpret_cast<const Four<T>*>(j.records + i * kRecord);
  const Four<T> a = from[0], b = from[1], c = from[2];
  return {a.v[0], a.v[1], a.v[2], a.v[3], b.v[0], b.v[1], b.v[2], b.v[3], c.v[0], c.v[1], c.v[2], c.v[3]};
}
template <class T> SURFEL_FN void store_record(const Job<T>& j, int64_t i, const Record<T>& s) {
  Four<T>* const to = reinterpret_cast<Four<T>*>(j.records + i * kRecord);
  to[0] = {{s.centre_x, s.centre_y, s.m00, s.m01}};
  to[1] = {{s.m10, s.m11, s.g0, s.g1}};
  to[2] = {{s.z, s.lowpass_x, s.lowpass_y, s.log2_opacity}};
}

// The list of one tile; empty when it did not fit the pair buffer.
struct TileList { int64_t start; int count; };
template <class T> SURFEL_FN TileList tile_list(const Job<T>& j, int64_t tile) {
  const int64_t start = j.tile_start[tile];
  const int count = j.tile_count[tile];
  return {start, start + count <= j.capacity ? count : 0};
}

}  // namespace surfel
