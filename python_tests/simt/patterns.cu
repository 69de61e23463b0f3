// Accesses of one warp whose wavefronts and sectors are known.

#include <string>

#include "mma_volta.cuh"

namespace flexattn::cuda {
namespace {

constexpr int kRowBytes = 256;  // 128 channels
constexpr size_t kSharedBytesUsed = 32 * 1024;

// A chunk of 16 bytes of the rows of K that each lane has in mma_volta.cuh, from shared memory.
template <typename Place>
__device__ void read_key_chunks(unsigned char* data, const Place& place) {
  using Mma = VoltaMma<128>;
  const int row = 8 * Mma::pc() + 4 * Mma::h() + Mma::l();
  uint4 sum{};
  for (int chunk = 0; chunk < Mma::kRowChunks; ++chunk) {
    const uint4 x = *reinterpret_cast<const uint4*>(shared_memory<unsigned char>() + place(row, chunk));
    sum = {sum.x ^ x.x, sum.y ^ x.y, sum.z ^ x.z, sum.w ^ x.w};
  }
  reinterpret_cast<uint4*>(data)[lane()] = sum;
}

__global__ void swizzled(unsigned char* data) {
  read_key_chunks(data, [](int row, int chunk) { return row * kRowBytes + 16 * VoltaMma<128>::key_chunk(row, chunk); });
}
__global__ void padded(unsigned char* data) {
  read_key_chunks(data, [](int row, int chunk) { return row * (kRowBytes + 16) + 16 * chunk; });
}
__global__ void plain(unsigned char* data) {
  read_key_chunks(data, [](int row, int chunk) { return row * kRowBytes + 16 * chunk; });
}

// Lane l accesses a T at byte l * stride.
template <typename T>
__global__ void read_shared(unsigned char* data, int64_t stride) {
  reinterpret_cast<T*>(data)[lane()] = *reinterpret_cast<const T*>(shared_memory<unsigned char>() + lane() * stride);
}
template <typename T>
__global__ void write_shared(int64_t stride) {
  *reinterpret_cast<T*>(shared_memory<unsigned char>() + lane() * stride) = T{};
}
template <typename T>
__global__ void write_global(unsigned char* data, int64_t stride) {
  *reinterpret_cast<T*>(data + lane() * stride) = T{};
}

// Lane l reads l numbers, one bank after the other: 31 instructions with fewer and fewer lanes.
__global__ void read_triangle(unsigned char* data) {
  int32_t sum = 0;
  for (int i = 0; i < lane(); ++i) sum += shared_memory<int32_t>()[i * kWarp + lane()];
  reinterpret_cast<int32_t*>(data)[lane()] = sum;
}

// The same place in the code, with a collective between: all lanes but one, then that one.
__global__ void read_in_turn(unsigned char* data) {
  int32_t sum = 0;
  for (int turn = 0; turn < 2; ++turn) {
    if ((lane() == 5) == (turn == 1)) sum += shared_memory<int32_t>()[0];
    __syncwarp();
  }
  reinterpret_cast<int32_t*>(data)[lane()] = sum;
}

}  // namespace

void run_pattern(const std::string& pattern, int64_t stride, unsigned char* data) {
  const auto run = [&](const char* name, auto kernel, auto... arguments) {
    if (pattern == name) launch(name, kernel, 1, kWarp, kSharedBytesUsed, nullptr, arguments...);
  };
  run("swizzled", swizzled, data);
  run("padded", padded, data);
  run("plain", plain, data);
  run("LDS.U16", read_shared<uint16_t>, data, stride);
  run("LDS.32", read_shared<uint32_t>, data, stride);
  run("LDS.64", read_shared<uint2>, data, stride);
  run("LDS.128", read_shared<uint4>, data, stride);
  run("STS.32", write_shared<uint32_t>, stride);
  run("STS.64", write_shared<uint2>, stride);
  run("STS.128", write_shared<uint4>, stride);
  run("STG.32", write_global<uint32_t>, data, stride);
  run("STG.128", write_global<uint4>, data, stride);
  run("triangle", read_triangle, data);
  run("turns", read_in_turn, data);
}

}  // namespace flexattn::cuda
