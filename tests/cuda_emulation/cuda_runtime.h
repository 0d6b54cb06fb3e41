// The part of CUDA that our kernels use, on the host: g++ compiles the same kernel sources with this header in place of CUDA's.
// A block's threads are coroutines that run one at a time and change places only at barriers, shuffles and votes, so a kernel that
// forgets a barrier reads what has not been written. Blocks run one after the other. For tests at tiny sizes; nothing about speed.
#pragma once
#include <setjmp.h>
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static                      // blocks run one after the other
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct ushort4 { unsigned short x, y, z, w; };
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z, unsigned short w) { return {x, y, z, w}; }
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0 };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}

namespace emulation {

struct Group {                                 // threads that meet at a barrier: a warp, or the block
  int size = 0, arrived = 0;
  unsigned long meetings = 0;
  const char* what = nullptr;
  uint64_t slot[2][32];                        // what lanes show each other, alternating so that one meeting is enough
};
struct Thread {
  ucontext_t context;                          // to start; _setjmp and _longjmp to change places, without system calls
  jmp_buf place;
  bool started = false;
  std::vector<char> stack = std::vector<char>(256 * 1024);
  dim3 index{0};
  int number = 0;
  bool done = false;
  Group* warp = nullptr;
};

inline dim3 block_index(0), block_size(1), grid_size(1);
inline Thread* current = nullptr;
inline Group* block_group = nullptr;
inline jmp_buf scheduler;
inline const std::function<void()>* body = nullptr;
inline bool reverse = false, progress = false; // the order in which threads are resumed must not matter

[[noreturn]] inline void fail(const char* what, const char* detail) {
  std::fprintf(stderr, "cuda emulation: %s (%s)\n", what, detail ? detail : "");
  std::abort();
}

inline void meet(Group& g, const char* what) {
  if (g.arrived == 0) g.what = what;
  if (std::strcmp(g.what, what)) fail("threads of a group wait at different operations", what);
  const unsigned long meeting = g.meetings;
  if (++g.arrived == g.size) {
    g.arrived = 0;
    g.meetings++;
    progress = true;
  }
  while (g.meetings == meeting)
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void start() {
  (*body)();
  current->done = true;
  progress = true;
  _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread& t) {
  if (_setjmp(scheduler)) return;
  if (t.started) _longjmp(t.place, 1);
  t.started = true;
  setcontext(&t.context);
}

inline void run_block(std::vector<Thread>& threads) {
  const int count = (int)threads.size();
  std::vector<Group> warps((count + 31) / 32);
  Group block;
  block.size = count;
  block_group = &block;
  for (int i = 0; i < count; i++) {
    Thread& t = threads[i];
    t.index = dim3(i);
    t.number = i;
    t.done = t.started = false;
    t.warp = &warps[i / 32];
    t.warp->size++;
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.data();
    t.context.uc_stack.ss_size = t.stack.size();
    t.context.uc_link = nullptr;
    makecontext(&t.context, start, 0);
  }
  for (int left = count; left > 0;) {
    progress = false;
    left = 0;
    for (int i = 0; i < count; i++) {
      current = &threads[reverse ? count - 1 - i : i];
      if (current->done) continue;
      resume(*current);
      left += !current->done;
    }
    if (left && !progress) fail("deadlock: threads that ended or went elsewhere are waited for", block.what);
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& kernel) {
  static std::vector<Thread> threads;
  threads.resize(block.x);
  grid_size = grid;
  block_size = block;
  body = &kernel;
  for (unsigned y = 0; y < grid.y; y++)
    for (unsigned x = 0; x < grid.x; x++) {
      block_index = dim3(x, y);
      run_block(threads);
    }
  body = nullptr;
}

// Every lane shows a value and sees all 32.
template <class V> const uint64_t* exchange(V value, const char* what) {
  static_assert(sizeof(V) <= 8);
  Group& g = *current->warp;
  if (g.size != 32) fail("a warp operation in a warp of fewer than 32 threads", what);
  uint64_t* const slot = g.slot[g.meetings % 2];
  std::memcpy(&slot[current->number % 32], &value, sizeof(V));
  meet(g, what);
  return slot;
}
template <class V> V lane_value(const uint64_t* slots, int lane) {
  V v;
  std::memcpy(&v, slots + lane, sizeof(V));
  return v;
}

}  // namespace emulation

#define threadIdx (emulation::current->index)
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size
#define SURFEL_LAUNCH(kernel, grid, block, stream, ...)              \
  do {                                                               \
    (void)(stream);                                                  \
    auto* const function = kernel;                                   \
    emulation::launch(grid, block, [&] { function(__VA_ARGS__); });  \
  } while (0)

inline void __syncthreads() { emulation::meet(*emulation::block_group, "__syncthreads"); }
inline void __syncwarp(unsigned = 0xffffffffu) { emulation::exchange(0, "__syncwarp"); }
template <class V> V __shfl_sync(unsigned, V v, int lane) {
  return emulation::lane_value<V>(emulation::exchange(v, "__shfl_sync"), lane & 31);
}
template <class V> V __shfl_xor_sync(unsigned, V v, int mask) {
  const int lane = emulation::current->number % 32;
  return emulation::lane_value<V>(emulation::exchange(v, "__shfl_xor_sync"), lane ^ mask);
}
template <class V> V __shfl_up_sync(unsigned, V v, int delta) {
  const int lane = emulation::current->number % 32;
  const uint64_t* const all = emulation::exchange(v, "__shfl_up_sync");
  return emulation::lane_value<V>(all, lane >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  const uint64_t* const all = emulation::exchange(int(predicate != 0), "__ballot_sync");
  unsigned bits = 0;
  for (int i = 0; i < 32; i++) bits |= unsigned(emulation::lane_value<int>(all, i)) << i;
  return bits;
}
inline int __any_sync(unsigned m, int predicate) { return __ballot_sync(m, predicate) != 0; }
inline void __threadfence_system() {}
inline int __all_sync(unsigned m, int predicate) { return __ballot_sync(m, predicate) == 0xffffffffu; }
template <class V, class W> V atomicAdd(V* p, W value) {
  const V old = *p;
  *p += value;
  return old;
}

extern "C" __attribute__((visibility("default"), used)) inline void emulation_reverse(int on) { emulation::reverse = on; }
