// The CUDA back end's C interface. Everything is put on the caller's stream; nothing is allocated and nothing waits.
#include "adam.h"
#include "binning.h"
#include "ssim.h"
#include "surfels.h"
#include "tiles.h"

namespace surfel {
namespace {

int blocks_for(int64_t count, int block) { return (int)((count + block - 1) / block); }

// Projects the surfels of all images and counts their pairs: counters->pairs then says what the pair buffer must hold.
template <class T> void count_pairs(const CudaCall& c, cudaStream_t stream) {
  const Job<T> j = make_job<T>(c);
  const int64_t tiles = int64_t(j.images) * j.tiles;
  const char* const end = reinterpret_cast<const char*>(j.tile_count + tiles);
  cudaMemsetAsync(j.counters, 0, end - reinterpret_cast<const char*>(j.counters), stream);
  if (j.surfels) SURFEL_LAUNCH(project_surfels<T>, dim3(blocks_for(j.surfels, 256), j.images), 256, stream, j);
  SURFEL_LAUNCH(allocate_tiles, blocks_for(tiles, 256), 256, stream, tiles, j.tile_count, j.tile_start, j.cursor, j.counters);
}

template <class T> void list_pairs(const CudaCall& c, cudaStream_t stream) {
  const Job<T> j = make_job<T>(c);
  const int64_t tiles = int64_t(j.images) * j.tiles;
  const int ordering = blocks_for(tiles, 256), blocks = blocks_for(j.surfels, 256), sorters = (int)smaller(tiles, int64_t(kLongSorters));
  SURFEL_LAUNCH(scatter_pairs<T>, ordering + j.images * blocks, 256, stream, j, ordering, blocks);
  SURFEL_LAUNCH(sort_lists<T>, sorters + blocks_for(tiles, kWarpsPerBlock), kWarpsPerBlock * kWarp, stream, j, sorters);
}

template <int P, class T, class Kernel> void launch_tiles(Kernel* kernel, const Job<T>& j, int first, cudaStream_t stream) {
  const int64_t groups = int64_t(j.images) * j.tiles * Group<P>::kPerTile;
  SURFEL_LAUNCH(kernel, blocks_for(groups, Group<P>::kPerBlock), kWarpsPerBlock * kWarp, stream, j, first);
}
template <class T, int F, bool kAux> void launch_tiles(const Job<T>& j, int first, bool backward, cudaStream_t stream) {
  constexpr int kMany = sizeof(T) == sizeof(float) && !kAux ? 4 : 2;     // more would not fit in the registers
  const bool few = few_tiles(j), bytes = j.out_bytes != nullptr;
  if (backward && few)
    launch_tiles<1>(&backward_tiles<T, F, kAux, 1>, j, first, stream);
  else if (backward)
    launch_tiles<kMany>(&backward_tiles<T, F, kAux, kMany>, j, first, stream);
  else if (few)
    launch_tiles<1>(bytes ? &forward_tiles<T, F, kAux, 1, true> : &forward_tiles<T, F, kAux, 1, false>, j, first, stream);
  else
    launch_tiles<2>(bytes ? &forward_tiles<T, F, kAux, 2, true> : &forward_tiles<T, F, kAux, 2, false>, j, first, stream);
}

// All channels: by a template of their number, or eight at a time. The aux maps go with the first.
template <class T> void draw(const Job<T>& j, bool aux, bool backward, cudaStream_t stream) {
  for (int first = 0; first < j.channels; first += 8) {
    const int left = j.channels - first;
    const bool with_aux = aux && first == 0;
#define DRAW(F) with_aux ? launch_tiles<T, F, true>(j, first, backward, stream) : launch_tiles<T, F, false>(j, first, backward, stream)
    if constexpr (sizeof(T) == sizeof(float)) {
      if (left <= 3) {
        DRAW(3);
      } else if (left == 4) {
        DRAW(4);
      } else if (left == 7) {
        DRAW(7);
      } else {
        DRAW(8);
      }
    } else {                         // double serves gradient checks
      DRAW(8);
    }
#undef DRAW
  }
}

template <class T> void forward(const CudaCall& c, cudaStream_t stream) {
  const Job<T> j = make_job<T>(c);
  draw(j, j.out_depth || j.out_normal || j.out_median || j.out_distortion, false, stream);
}

// count_pairs, list_pairs and forward in one call, where the host need not know the count.
template <class T> void draw_at_once(const CudaCall& c, cudaStream_t stream) {
  count_pairs<T>(c, stream);
  list_pairs<T>(c, stream);
  forward<T>(c, stream);
}

template <class T> void backward(const CudaCall& c, cudaStream_t stream) {
  const Job<T> j = make_job<T>(c);
  const auto zero = [&](T* p, int64_t count) {
    if (p) cudaMemsetAsync(p, 0, count * sizeof(T), stream);
  };
  zero(j.sums, int64_t(j.images) * j.surfels * j.geometry_sums);
  zero(j.d_features, (j.s_features ? j.images : 1) * int64_t(j.surfels) * j.channels);
  zero(j.d_background, int64_t(j.s_background ? j.images : 1) * j.channels);
  if (j.d_background && j.g_features)
    SURFEL_LAUNCH(background_gradient<T>, dim3(32, j.images * j.channels), 256, stream, j);
  if (!j.surfels) return;
  draw(j, j.geometry_sums > 12, true, stream);
  const int together = j.s_means && j.s_quats && j.s_scales && j.s_opacities ? 1 : j.images;
  SURFEL_LAUNCH(surfel_gradients<T>, dim3(blocks_for(j.surfels, 128), j.images / together), 128, stream, j, together);
}

template <class T> void sh_forward(const ShCall& c, cudaStream_t stream) {
  if (c.surfels) SURFEL_LAUNCH(sh_colours<T>, dim3(blocks_for(c.surfels, 128), (int)c.batch), 128, stream, c);
}
template <class T> void sh_backward(const ShCall& c, cudaStream_t stream) {
  const int together = c.s_means && c.s_sh ? 1 : (int)c.batch;
  if (c.surfels) SURFEL_LAUNCH(sh_gradients<T>, dim3(blocks_for(c.surfels, 128), (int)c.batch / together), 128, stream, c, together);
}

template <class T, bool kGradient> void launch_loss(const LossCall& c, LossJob& j, cudaStream_t stream) {
  constexpr int edge = LossTile<T, kGradient>::kOut;
  j.tiles_x = blocks_for(j.width, edge);
  j.tiles = j.tiles_x * blocks_for(j.height, edge);
  const auto in = [](const void* p) { return static_cast<const T*>(p); };
  SURFEL_LAUNCH((loss_tiles<T, kGradient>), dim3(j.tiles, (int)(c.batch * c.channels)), kLossThreads, stream, j, in(c.image), in(c.target),
                in(c.weight), static_cast<T*>(c.d_similarity), static_cast<T*>(c.partial));
}

LossJob loss_job(const LossCall& c) { return {(int)c.channels, (int)c.width, (int)c.height, (int)c.weights, 0, 0, c.s_weight}; }

template <class T> void loss_forward(const LossCall& c, cudaStream_t stream) {
  LossJob j = loss_job(c);
  c.d_similarity ? launch_loss<T, true>(c, j, stream) : launch_loss<T, false>(c, j, stream);
  SURFEL_LAUNCH(loss_sums<T>, dim3(1 + j.weights, (int)c.batch), kLossThreads, stream, j, static_cast<const T*>(c.partial),
                static_cast<T*>(c.ssim), static_cast<T*>(c.l1));
}

template <class T> void loss_backward(const LossCall& c, cudaStream_t stream) {
  const auto in = [](const void* p) { return static_cast<const T*>(p); };
  const dim3 grid(blocks_for(c.width * c.height, kLossThreads * kLossPixels), (int)(c.batch * c.channels));
  SURFEL_LAUNCH(loss_gradient<T>, grid, kLossThreads, stream, loss_job(c), in(c.weight), in(c.d_similarity), in(c.g_ssim), in(c.g_l1),
                static_cast<T*>(c.d_image));
}

template <class T> void adam(AdamCall c, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int k = 0; k < c.used; k++) {
    c.arrays[k].first_block = blocks;
    blocks += blocks_for(c.arrays[k].count, kAdamBlock);
  }
  if (blocks) SURFEL_LAUNCH(adam_step<T>, (int)blocks, kAdamThreads, stream, c);
}

}  // namespace
}  // namespace surfel

// Each returns a cudaError_t. Kernels are queued on the current device.
#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTRY(name, function, Argument)                                              \
  EXPORT int name(const Argument* c, int is_double, cudaStream_t stream) {           \
    is_double ? surfel::function<double>(*c, stream) : surfel::function<float>(*c, stream); \
    return (int)cudaGetLastError();                                                  \
  }
using surfel::CudaCall;
ENTRY(surfel_cuda_count, count_pairs, CudaCall)
ENTRY(surfel_cuda_list, list_pairs, CudaCall)
ENTRY(surfel_cuda_forward, forward, CudaCall)
ENTRY(surfel_cuda_draw, draw_at_once, CudaCall)
ENTRY(surfel_cuda_backward, backward, CudaCall)
ENTRY(surfel_cuda_sh_forward, sh_forward, ShCall)
ENTRY(surfel_cuda_sh_backward, sh_backward, ShCall)
ENTRY(surfel_cuda_loss_forward, loss_forward, LossCall)
ENTRY(surfel_cuda_loss_backward, loss_backward, LossCall)
ENTRY(surfel_cuda_adam, adam, AdamCall)
EXPORT const char* surfel_cuda_error(int code) { return cudaGetErrorString((cudaError_t)code); }
EXPORT int64_t surfel_cuda_call_size(int what) {
  const int64_t sizes[] = {sizeof(surfel::CudaCall), sizeof(ShCall), sizeof(surfel::Counters), sizeof(LossCall), sizeof(AdamCall)};
  return sizes[what];
}
