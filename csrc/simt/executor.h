// The CUDA execution model on one CPU thread, for tests: the threads of a block are fibers, blocks run one after
// another.
//
// What goes wrong on a GPU by chance goes wrong here for sure: threads run in a shuffled order, shared memory begins as
// NaN, data of cp.async arrives only when it is waited for, and a barrier that part of the block misses is an error.
// Faults are thrown as std::runtime_error out of launch().
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

// kernel: the function, by which its accesses are counted; body: calls it with its arguments.
void launch(const char* name, const void* kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
            const std::function<void()>& body);

unsigned char* shared_memory();  // of the running block, 16-byte aligned
int lane();

void block_barrier();

constexpr size_t kLaneBytes = 64;
using WarpBytes = unsigned char[kLanes][kLaneBytes];

// Waits until every lane of the warp has come here with its bytes; then all lanes' bytes. `operation`: in error
// messages.
const WarpBytes& exchange(const char* operation, const void* bytes, size_t size);

template <typename T>
T from_lane(const char* operation, T mine, int source) {
  T result;
  std::memcpy(&result, exchange(operation, &mine, sizeof(T))[source], sizeof(T));
  return result;
}

// 16 bytes on their way to shared memory, zeros where `from` is null: there after wait_copies(groups still under way).
void start_copy(void* shared, const void* from);
void commit_copies();
void wait_copies(int groups_left);

constexpr size_t kStackBytes = 256 * 1024;
extern uintptr_t stack_begin;  // of the running thread
inline bool on_stack(const void* address) { return reinterpret_cast<uintptr_t>(address) - stack_begin < kStackBytes; }
// threadIdx and the like, what lanes exchange, or the launch's body.
bool belongs_to_executor(const void* address);
// Not memory of the GPU.
inline bool is_own(const void* address) { return on_stack(address) || belongs_to_executor(address); }

[[noreturn]] void fail(const char* what);  // names kernel, block and thread

}  // namespace flexattn::simt
