// Lists of bits, 32 to a word, bit 0 lowest.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "flexattn/types.h"

namespace flexattn::cuda {

__device__ inline bool bit(const int32_t* words, int64_t i) {
  return (static_cast<uint32_t>(words[i / kBitsPerWord]) >> (i % kBitsPerWord)) & 1u;
}

// Bits first .. first + 63 of a list of `length` bits; bits past its end are 0.
__device__ inline uint64_t bits_from(const int32_t* words, int first, int64_t length) {
  const int64_t count = words_for_bits(length), word = first / kBitsPerWord;
  const int shift = first % kBitsPerWord;
  auto at = [&](int64_t i) -> uint64_t { return i < count ? static_cast<uint32_t>(words[i]) : 0; };
  const uint64_t both = at(word) | at(word + 1) << kBitsPerWord;
  return shift ? both >> shift | at(word + 2) << (2 * kBitsPerWord - shift) : both;
}

// The lowest n bits of a word: all of them if it has no more, none for n <= 0.
template <typename Word = uint64_t>
__device__ Word low_bits(int n) {
  return n >= static_cast<int>(8 * sizeof(Word)) ? ~Word{0} : n <= 0 ? 0 : (Word{1} << n) - 1;
}

}  // namespace flexattn::cuda
