// The CPU host code's small tools.
#pragma once
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
