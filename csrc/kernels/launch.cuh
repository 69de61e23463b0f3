// The only code that launches kernels or names shared memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "flexattn/types.h"

namespace flexattn::cuda {

constexpr int kWarp = 32;
constexpr size_t kSharedBytes = 48 * 1024;  // available to a block on every GPU without opting in
constexpr int64_t kMaxBlocks = 0x7fffffff;  // of a launch

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("flexattn_cuda: ") + what + ": " + cudaGetErrorString(error));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes,
            Stream stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > kMaxBlocks)
    throw std::runtime_error(std::string("flexattn_cuda: ") + name + " needs " + std::to_string(blocks) +
                             " blocks, a launch has at most " + std::to_string(kMaxBlocks) + ": use smaller tensors");
  if (shared_bytes > kSharedBytes)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
#ifdef FLEXATTN_SIMT
  simt::launch(name, reinterpret_cast<const void*>(kernel), dim3{static_cast<unsigned>(blocks)},
               dim3{static_cast<unsigned>(threads)}, shared_bytes, [&]() __attribute__((no_sanitize_thread)) {
                 kernel(arguments...);
               });  // arguments are constant memory on a GPU: no race to watch
#else
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check(cudaGetLastError(), name);
#endif
}

FLEXATTN_HOST_DEVICE constexpr int64_t blocks_for(int64_t items, int64_t per_block) {
  return (items + per_block - 1) / per_block;
}

// Warps per block, at most 4, if each needs this much shared memory. Throws std::runtime_error if not even one fits.
inline int warps_that_fit(const char* name, size_t bytes_per_warp) {
  const size_t warps = std::min<size_t>(4, kSharedBytes / bytes_per_warp);
  if (warps == 0)
    throw std::runtime_error(std::string("flexattn_cuda: ") + name + " needs " + std::to_string(bytes_per_warp) +
                             " bytes of shared memory per query row, there are " + std::to_string(kSharedBytes) +
                             ": head_dim is too large");
  return static_cast<int>(warps);
}

// The block's dynamic shared memory as an array of T.
template <typename T>
__device__ T* shared_memory() {
#ifdef FLEXATTN_SIMT
  return reinterpret_cast<T*>(simt::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

}  // namespace flexattn::cuda
