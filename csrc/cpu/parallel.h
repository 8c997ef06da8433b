#pragma once

#include <memory>

#include "../common.h"

namespace kdmos {

// Offsets of equal shares of [0, size) for `parts` workers.
inline int64_t share(int64_t size, int64_t parts, int64_t part) { return size * part / parts; }

// Throws unless 0 <= index[0] <= index[1] <= ... < size: what follows would read elsewhere, or lose rows.
inline void check_ascending(const char* what, const int64_t* index, int64_t count, int64_t size) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= (index[i] >= (i ? index[i - 1] : 0)) & (index[i] < size);
  STD_TORCH_CHECK(good, what, " must ascend within 0 and ", size);
}

// Throws unless 0 <= index[i] < size for all i, in any order.
inline void check_within(const char* what, const int64_t* index, int64_t count, int64_t size) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= (index[i] >= 0) & (index[i] < size);
  STD_TORCH_CHECK(good, what, " must lie within 0 and ", size);
}

// How many come before the padding, all of which is `size`; throws unless those ascend below it.
inline int64_t check_padded(const char* what, const int64_t* index, int64_t count, int64_t size) {
  while (count > 0 && index[count - 1] == size) --count;
  check_ascending(what, index, count, size);
  return count;
}

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
