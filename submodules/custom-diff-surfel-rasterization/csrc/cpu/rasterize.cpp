// The CPU back end's C interface: images one after the other, each in parallel over surfels and tiles.
// Every sum is taken in an order fixed by the data, so results do not depend on the number of threads.
#include <algorithm>
#include <cstring>
#include <vector>
#include "../common/sh.h"
#include "../common/surfel.h"
#include "call.h"
#include "select.h"

using namespace SURFEL_NAMESPACE;

namespace {

struct Touched { uint32_t tile, blocks, id, depth_bits; };

constexpr int kChunk = 256;          // surfels a task; fixed, so that slot numbers do not depend on threads

template <class T> struct Image {
  Camera<T> camera;
  Buffer<Record<T>> records;
  Buffer<Pair> pairs;                // sorted front to back within each tile
  Buffer<int> tile_start;            // (tiles + 1)
  Buffer<uint32_t> slot_start;       // (N + 1): the surfel's rows in the gradient buffer
  std::vector<std::vector<Touched>> chunks;
  Buffer<int> cursor;
  int columns, rows, pair_count;
};

template <class T> struct ImageInputs {
  const T *means, *quats, *scales, *opacities, *features;
  ImageInputs(const Call& c, int64_t b)
      : means(at<T>(c.means, c.s_means, b)), quats(at<T>(c.quats, c.s_quats, b)), scales(at<T>(c.scales, c.s_scales, b)),
        opacities(at<T>(c.opacities, c.s_opacities, b)), features(at<T>(c.features, c.s_features, b)) {}
  SurfelInput<T> operator[](int64_t n) const { return {means + 3 * n, quats + 4 * n, scales + 2 * n, opacities[n]}; }
};

template <class T> bool all_finite(const T* v, int64_t count) {
  T sum = 0;
  for (int64_t i = 0; i < count; i++) sum += v[i] * T(0);
  return sum == T(0);
}

// Projects every surfel of image b and lists, for each tile, the surfels that touch it from front to back.
template <class T> void prepare(const Call& c, int64_t b, const Kernels<T>& kernels, Image<T>& image, int32_t* radii) {
  const ImageInputs<T> in(c, b);
  const int64_t N = c.surfels;
  image.camera = load_camera(at<T>(c.viewmats, c.s_viewmats, b), at<T>(c.Ks, c.s_Ks, b));
  place_eye(image.camera);
  image.columns = int((c.width + kTile - 1) / kTile);
  image.rows = int((c.height + kTile - 1) / kTile);
  const int tiles = image.columns * image.rows, chunk_count = int((N + kChunk - 1) / kChunk);
  const int threads = worthwhile(c.threads, chunk_count / 4);
  image.records.reserve(N);
  uint32_t* const slot_start = image.slot_start.reserve(N + 1);
  int* const cursor = image.cursor.reserve(tiles);
  std::memset(cursor, 0, sizeof(int) * tiles);
  image.chunks.resize(chunk_count);

#pragma omp parallel num_threads(threads)
  {
    std::vector<uint32_t> tile(tiles + 1), blocks(tiles + 1);    // cover writes one past the last
#pragma omp for schedule(dynamic, 4)
    for (int chunk = 0; chunk < chunk_count; chunk++) {
      auto& list = image.chunks[chunk];
      list.clear();
      for (int64_t n = int64_t(chunk) * kChunk; n < std::min(N, int64_t(chunk + 1) * kChunk); n++) {
        Record<T>& rec = image.records[n];
        int radius = 0, count = 0;
        if (all_finite(in.features + n * c.channels, c.channels))
          count = kernels.place(image.camera, in[n], T(c.near), (int)c.cutoff, (int)c.width, (int)c.height, rec, radius,
                                tile.data(), blocks.data());
        if (radii) radii[n] = radius;
        const float depth = (float)rec.z;
        uint32_t bits;
        std::memcpy(&bits, &depth, 4);
        for (int i = 0; i < count; i++) {
          list.push_back({tile[i], blocks[i], (uint32_t)n, bits});
          __atomic_fetch_add(&cursor[tile[i]], 1, __ATOMIC_RELAXED);
        }
        slot_start[n] = (uint32_t)count;
      }
    }
  }

  int* const start = image.tile_start.reserve(tiles + 1);
  int total = 0;
  for (int t = 0; t < tiles; t++) {
    start[t] = total;
    total += cursor[t];
    cursor[t] = start[t];
  }
  start[tiles] = image.pair_count = total;
  uint32_t slot = 0;
  for (int64_t n = 0; n < N; n++) {
    const uint32_t count = slot_start[n];
    slot_start[n] = slot;
    slot += count;
  }
  slot_start[N] = slot;

  Pair* const pairs = image.pairs.reserve(total);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 4)
    for (int chunk = 0; chunk < chunk_count; chunk++) {
      uint32_t next = slot_start[int64_t(chunk) * kChunk];
      for (const Touched& t : image.chunks[chunk])
        pairs[__atomic_fetch_add(&cursor[t.tile], 1, __ATOMIC_RELAXED)] = {uint64_t(t.depth_bits) << 32 | t.id, next++, t.blocks};
    }
#pragma omp for schedule(dynamic, 8)
    for (int t = 0; t < tiles; t++)
      std::sort(pairs + start[t], pairs + start[t + 1], [](const Pair& x, const Pair& y) { return x.key < y.key; });
  }
}

template <class T> struct StatePlanes {
  T *transmittance, *moments;
  int32_t *last, *median;
  StatePlanes(const Call& c, int64_t b) {
    const int64_t area = c.width * c.height, all = c.batch * area;
    T* numbers = static_cast<T*>(c.state);
    int32_t* integers = reinterpret_cast<int32_t*>(numbers + all * (c.aux & kDistortion ? 4 : 1));
    transmittance = numbers + b * area;
    moments = numbers + all + 3 * b * area;
    last = integers + b * area;
    median = integers + all + b * area;
  }
};

template <class T> TileJob<T> tile_job(const Call& c, int64_t b, const ImageInputs<T>& in, Image<T>& image) {
  const int64_t area = c.width * c.height;
  TileJob<T> j{};
  j.records = image.records.get();
  j.features = in.features;
  j.background = at<T>(c.background, c.s_background, b);
  j.channels = (int)c.channels;
  j.width = (int)c.width;
  j.height = (int)c.height;
  j.near = T(c.near);
  j.depth_scale = T(c.far * c.near / (c.far - c.near));
  if (c.state) {
    const StatePlanes<T> s(c, b);
    j.transmittance = s.transmittance;
    j.moments = s.moments;
    j.last = s.last;
    j.median = s.median;
  }
  j.out_bytes = at<uint8_t>(c.as_bytes ? c.out_features : nullptr, c.channels * area, b);
  j.out_features = at<T>(c.as_bytes ? nullptr : c.out_features, c.channels * area, b);
  j.out_alpha = at<T>(c.out_alpha, area, b);
  j.out_depth = at<T>(c.out_depth, area, b);
  j.out_normal = at<T>(c.out_normal, 3 * area, b);
  j.out_median = at<T>(c.out_median, area, b);
  j.out_distortion = at<T>(c.out_distortion, area, b);
  j.g_features = at<T>(c.g_features, c.channels * area, b);
  j.g_alpha = at<T>(c.g_alpha, area, b);
  j.g_depth = at<T>(c.g_depth, area, b);
  j.g_normal = at<T>(c.g_normal, 3 * area, b);
  j.g_median = at<T>(c.g_median, area, b);
  j.g_distortion = at<T>(c.g_distortion, area, b);
  return j;
}

int channel_path(int64_t channels) {
  for (int i = 1; i < 5; i++)
    if (kChannelPaths[i] == channels) return i;
  return 0;
}

template <class T, class Kernel, class Setup>
void for_each_tile(const Call& c, Image<T>& image, const TileJob<T>& common, Kernel kernel, Setup setup) {
  const int tiles = image.columns * image.rows;
#pragma omp parallel num_threads(worthwhile(c.threads, tiles / 4))
  {
    Buffer<T> scratch;
    TileJob<T> j = common;
    j.scratch = scratch.reserve(scratch_size(j.channels));
#pragma omp for schedule(dynamic, 2)
    for (int t = 0; t < tiles; t++) {
      j.pairs = image.pairs.get() + image.tile_start[t];
      j.count = image.tile_start[t + 1] - image.tile_start[t];
      j.tile_x = t % image.columns;
      j.tile_y = t / image.columns;
      setup(j, t);
      kernel(j);
    }
  }
}

template <class T> void forward(const Call& c) {
  const Kernels<T>& kernels = *select_kernels<T>();
  Image<T> image;
  for (int64_t b = 0; b < c.batch; b++) {
    prepare(c, b, kernels, image, c.radii + b * c.surfels);
    const ImageInputs<T> in(c, b);
    for_each_tile(c, image, tile_job(c, b, in, image), kernels.forward[channel_path(c.channels)][c.aux != 0],
                  [](TileJob<T>&, int) {});
  }
}

template <class T> void backward(const Call& c) {
  const Kernels<T>& kernels = *select_kernels<T>();
  const bool aux = c.g_depth || c.g_normal || c.g_median || c.g_distortion;
  const int stride = int((kGeometrySums + c.channels + 3) / 4 * 4);
  Image<T> image;
  Buffer<T> slots, background;
  for (int64_t b = 0; b < c.batch; b++) {
    prepare(c, b, kernels, image, nullptr);
    const ImageInputs<T> in(c, b);
    const int tiles = image.columns * image.rows;
    slots.reserve(size_t(image.pair_count) * stride);
    background.reserve(size_t(tiles) * c.channels);
    TileJob<T> job = tile_job(c, b, in, image);
    job.slots = slots.get();
    job.slot_stride = stride;
    for_each_tile(c, image, job, kernels.backward[channel_path(c.channels)][aux], [&](TileJob<T>& j, int t) {
      j.g_background = c.d_background ? background.get() + int64_t(t) * c.channels : nullptr;
    });
    if (T* out = at<T>(c.d_background, c.s_background, b))
      for (int t = 0; t < tiles; t++)
        for (int64_t ch = 0; ch < c.channels; ch++) out[ch] += background[t * c.channels + ch];

    T* const d_means = at<T>(c.d_means, c.s_means, b);
    T* const d_quats = at<T>(c.d_quats, c.s_quats, b);
    T* const d_scales = at<T>(c.d_scales, c.s_scales, b);
    T* const d_opacities = at<T>(c.d_opacities, c.s_opacities, b);
    T* const d_features = at<T>(c.d_features, c.s_features, b);
    T* const d_screen = at<T>(c.d_screen, 2 * c.surfels, b);
#pragma omp parallel for schedule(static) num_threads(worthwhile(c.threads, c.surfels / 1024))
    for (int64_t n = 0; n < c.surfels; n++) {
      const uint32_t first = image.slot_start[n], end = image.slot_start[n + 1];
      if (first == end) continue;
      T sums[kGeometrySums] = {};
      for (uint32_t s = first; s < end; s++) {
        const T* slot = slots.get() + size_t(s) * stride;
        for (int i = 0; i < kGeometrySums; i++) sums[i] += slot[i];
        if (d_features)
          for (int64_t ch = 0; ch < c.channels; ch++) d_features[n * c.channels + ch] += slot[kGeometrySums + ch];
      }
      SurfelGradient<T> g{};
      kernels.project_backward(image.camera, in[n], T(c.near), (int)c.width, (int)c.height, sums, g);
      for (int i = 0; i < 3; i++) d_means[3 * n + i] += g.mean[i];
      for (int i = 0; i < 4; i++) d_quats[4 * n + i] += g.quat[i];
      for (int i = 0; i < 2; i++) d_scales[2 * n + i] += g.scale[i];
      d_opacities[n] += g.opacity;
      if (d_screen)
        for (int i = 0; i < 2; i++) d_screen[2 * n + i] = g.screen[i];
    }
  }
}

template <class T> void sh_forward(const ShCall& c) {
  for (int64_t b = 0; b < c.batch; b++) {
    T eye[3];
    camera_position(load_camera<T>(at<T>(c.viewmats, c.s_viewmats, b), nullptr), eye);
    const T *means = at<T>(c.means, c.s_means, b), *sh = at<T>(c.sh, c.s_sh, b);
    T* const out = at<T>(c.colours, 3 * c.surfels, b);
#pragma omp parallel for schedule(static) num_threads(worthwhile(c.threads, c.surfels / 1024))
    for (int64_t n = 0; n < c.surfels; n++)
      sh_colour((int)c.degree, means + 3 * n, eye, sh + 3 * c.coefficients * n, out + 3 * n);
  }
}

template <class T> void sh_backward(const ShCall& c) {
  for (int64_t b = 0; b < c.batch; b++) {
    T eye[3];
    camera_position(load_camera<T>(at<T>(c.viewmats, c.s_viewmats, b), nullptr), eye);
    const T *means = at<T>(c.means, c.s_means, b), *sh = at<T>(c.sh, c.s_sh, b), *g = at<T>(c.g_colours, 3 * c.surfels, b);
    T *const d_means = at<T>(c.d_means, c.s_means, b), *const d_sh = at<T>(c.d_sh, c.s_sh, b);
#pragma omp parallel for schedule(static) num_threads(worthwhile(c.threads, c.surfels / 1024))
    for (int64_t n = 0; n < c.surfels; n++)
      sh_colour_backward((int)c.degree, means + 3 * n, eye, sh + 3 * c.coefficients * n, g + 3 * n,
                         d_means ? d_means + 3 * n : nullptr, d_sh ? d_sh + 3 * c.coefficients * n : nullptr);
  }
}

}  // namespace

EXPORT int surfel_forward(const Call* c, int is_double) {
  return guarded([&] { is_double ? forward<double>(*c) : forward<float>(*c); });
}
EXPORT int surfel_backward(const Call* c, int is_double) {
  return guarded([&] { is_double ? backward<double>(*c) : backward<float>(*c); });
}
EXPORT void surfel_sh_forward(const ShCall* c, int is_double) { is_double ? sh_forward<double>(*c) : sh_forward<float>(*c); }
EXPORT void surfel_sh_backward(const ShCall* c, int is_double) { is_double ? sh_backward<double>(*c) : sh_backward<float>(*c); }
EXPORT const char* surfel_cpu_level() {
  static const char* const names[] = {"base", "avx2", "avx512"};
  return names[level()];
}
EXPORT int64_t surfel_call_size(int what) { return what == 2 ? sizeof(LossCall) : what == 1 ? sizeof(ShCall) : sizeof(Call); }
