// Lists of bits, 32 to a word, bit 0 lowest.
#pragma once

#include <cstdint>

#include "flexattn/types.h"

namespace flexattn::cpu {

inline bool bit(const int32_t* words, int64_t i) {
  return static_cast<uint32_t>(words[i / kBitsPerWord]) >> (i % kBitsPerWord) & 1u;
}
inline void set_bit(int32_t* words, int64_t i) {
  words[i / kBitsPerWord] |= static_cast<int32_t>(uint32_t{1} << (i % kBitsPerWord));
}

}  // namespace flexattn::cpu
