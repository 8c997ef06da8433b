// Where DySample samples, and with which weights: the arithmetic both backends share.
#pragma once

#include "common.h"

namespace kdmos {

// The two pixels of one axis around a place, the share of the second, and whether the place may move.
template <class F>
struct Between {
  int first, second;
  F share;
  int free;  // 0 where the border holds the place: no gradient; no bool, which keeps gcc from making vectors
};

template <class F>
KDMOS_BOTH Between<F> clamped(F place, int size) {
  const F last = F(size - 1);
  const bool free = (place > F(0)) & (place < last);  // NaN is not free and reads pixel 0
  place = place > F(0) ? place : F(0);
  place = place < last ? place : last;
  const int first = int(place);
  return {first, first + 1 < size ? first + 1 : first, place - F(first), free};
}

template <class F>
KDMOS_BOTH Between<F> wrapped(F place, int size) {
  place -= std::floor(place / F(size)) * F(size);
  place = (place >= F(0)) & (place < F(size)) ? place : F(0);  // rounding can reach `size`; NaN reads pixel 0
  const int first = int(place);
  const F share = place - F(first);
  return {first, first + 1 < size ? first + 1 : 0, share, true};
}

}  // namespace kdmos
