// Memory in pieces of 16 bytes, the max that a thread can load or store at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>

namespace flexattn::cuda {

constexpr int kVectorBytes = 16;

// N neighbouring elements, loaded and stored in as few pieces as their size allows.
template <typename T, int N>
struct alignas(N * sizeof(T) < kVectorBytes ? N * sizeof(T) : kVectorBytes) Vector {
  T element[N];
};

template <int N, typename T>
__device__ Vector<T, N> load(const T* data) {
  return *reinterpret_cast<const Vector<T, N>*>(data);
}
template <typename T, int N>
__device__ void store(T* data, const Vector<T, N>& vector) {
  *reinterpret_cast<Vector<T, N>*>(data) = vector;
}

// Whether a pointer is aligned for them.
inline bool in_vectors(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kVectorBytes == 0; }

// Whether each size or stride, in elements, is a whole number of vectors.
inline bool in_vectors(std::initializer_list<int64_t> elements, int64_t element_size) {
  for (const int64_t count : elements)
    if (count * element_size % kVectorBytes != 0) return false;
  return true;
}

}  // namespace flexattn::cuda
