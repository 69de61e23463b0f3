// Types shared by all operators' interfaces. No torch, Python or CUDA header, so that g++ and nvcc both read it.
#pragma once

#include <cstdint>

namespace flexattn {

enum class DType : int32_t { kFloat64, kFloat32, kFloat16, kBFloat16 };

// An opaque cudaStream_t; the CPU ignores it.
using Stream = void*;

// Element strides of a [batch, head, row, channel] tensor whose last dimension is dense:
//   x[b, h, n, c] = data[b * batch + h * head + n * row + c]
struct Strides {
  int64_t batch = 0;
  int64_t head = 0;
  int64_t row = 0;
};

// For functions that both host and device call.
#ifdef __CUDACC__
#define FLEXATTN_HOST_DEVICE __host__ __device__
#else
#define FLEXATTN_HOST_DEVICE
#endif

FLEXATTN_HOST_DEVICE constexpr int64_t bytes_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int kBitsPerWord = 32;
FLEXATTN_HOST_DEVICE constexpr int64_t words_for_bits(int64_t bits) { return (bits + kBitsPerWord - 1) / kBitsPerWord; }

}  // namespace flexattn
