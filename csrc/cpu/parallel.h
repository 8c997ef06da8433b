#pragma once

#include <vector>

#include "../common.h"

namespace kdmos {

// Offsets of equal shares of [0, size) for `parts` workers.
inline int64_t share(int64_t size, int64_t parts, int64_t part) { return size * part / parts; }

inline int64_t num_threads() { return int64_t(torch::stable::get_num_threads()); }

// Scratch memory without the zeroing of std::vector.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : data_(new T[size]) {}
  operator T*() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
};

}  // namespace kdmos
