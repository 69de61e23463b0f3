// The CUDA execution model on one CPU thread, for tests: the threads of a block are fibers, blocks run one after
// another.
//
// What fails on a GPU by chance fails here for certain: threads run in a shuffled order, shared memory starts as NaN,
// data of cp.async arrives only when it is waited for, and a barrier that part of the block misses is an error.
// launch() throws faults as std::runtime_error.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace flexattn::simt {

constexpr int kLanes = 32;

// Of the running thread.
extern dim3 thread_index, block_index, block_size, grid_size;

// Run body, which calls `kernel` with its arguments, in every thread. Accesses are counted by kernel. Blocks are a
// multiple of 32 threads in a row.
void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body);

unsigned char* shared_memory();  // of the running block, 16-byte aligned
int lane();

void block_barrier();

constexpr size_t kLaneBytes = 64;
using WarpBytes = unsigned char[kLanes][kLaneBytes];

// Wait until every lane of the warp has arrived with its bytes, and return those of all lanes. `operation` is named in
// error messages. Memory is not ordered by it, as by no collective of CUDA but __syncwarp.
const WarpBytes& exchange(const char* operation, const void* bytes, size_t size);

void warp_barrier();

template <typename T>
T from_lane(const char* operation, T mine, int source) {
  T result;
  std::memcpy(&result, exchange(operation, &mine, sizeof(T))[source], sizeof(T));
  return result;
}

// Copy 16 bytes to shared memory. They arrive with wait_copies(groups still in flight).
void start_copy(void* shared, const void* from);
void commit_copies();
void wait_copies(int groups_left);

constexpr size_t kStackBytes = 256 * 1024;
extern uintptr_t stack_begin;  // of the running thread
inline bool on_stack(const void* address) { return reinterpret_cast<uintptr_t>(address) - stack_begin < kStackBytes; }
// Whether the address is of threadIdx and the like, of what lanes exchange, or of the body of the launch.
bool belongs_to_executor(const void* address);

// Fail unless the address is a multiple of `bytes`.
void require_alignment(const char* operation, const void* address, size_t bytes);

[[noreturn]] void fail(const char* what);  // adds kernel, block and thread to the message

}  // namespace flexattn::simt
