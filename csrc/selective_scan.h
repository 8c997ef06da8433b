// What the CPU and the GPU share of the selective scan.
#pragma once

#include "common.h"

namespace kdmos {

// Points between two states that the forward keeps for the backward: a state is S rows of D channels, so that they
// take S / 64 of the memory of u. Chunks are cut at multiples of this, whatever the sequences. 64 of them are the bits
// of a word, which tells the GPU where sequences start. kdmos/ops/selective_scan.py has the number too.
constexpr int64_t kChunk = 64;

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

inline int64_t num_chunks(int64_t N) { return (N + kChunk - 1) / kChunk; }

}  // namespace kdmos
