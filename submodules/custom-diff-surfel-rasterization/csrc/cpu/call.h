// The CPU host code's small tools.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <new>
#include "../common/call.h"

// 64-byte aligned, uninitialised, grows only.
template <class T> class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  T* reserve(size_t count) {
    if (count > capacity_) {
      std::free(data_);
      const size_t bytes = (count * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      capacity_ = data_ ? count : 0;
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }
  T& operator[](size_t i) { return data_[i]; }
  T* get() { return data_; }

 private:
  T* data_ = nullptr;
  size_t capacity_ = 0;
};

template <class T> const T* at(const void* base, int64_t stride, int64_t b) {
  return base ? static_cast<const T*>(base) + stride * b : nullptr;
}
template <class T> T* at(void* base, int64_t stride, int64_t b) { return base ? static_cast<T*>(base) + stride * b : nullptr; }

// Threads for so many tasks: starting one costs more than a small image.
inline int worthwhile(int64_t threads, int64_t tasks) { return (int)std::max<int64_t>(1, std::min(threads, tasks)); }

template <class F> int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}

#define EXPORT extern "C" __attribute__((visibility("default")))
