// Working memory of a thread, kept for its next call. Fresh memory of this size comes from the
// operating system page by page, each of them cleared.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace nmfx {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free(data_); }

  // At least `count` floats, with whatever they held last; null if memory ran out. They are the
  // caller's until it asks again or calls done().
  float* floats(int64_t count) {
    if (count > count_) {
      free(data_);
      data_ = nullptr, count_ = 0;
      const size_t bytes = size_t(count) * sizeof(float);
      void* data = nullptr;
      if (posix_memalign(&data, 64, bytes)) return nullptr;
      data_ = static_cast<float*>(memset(data, 0, bytes));
      count_ = count;
    }
    return data_;
  }

  // Gives back what is too much to keep.
  void done() {
    if (count_ <= kKept) return;
    free(data_);
    data_ = nullptr, count_ = 0;
  }

 private:
  // 16 MB: the activations of 512 rows of 4096 fit. A guess; the page faults of fresh memory were
  // not timed.
  static constexpr int64_t kKept = 4 << 20;  // floats
  float* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace nmfx
