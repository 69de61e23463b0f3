// Accesses to memory, which access_counts.h counts, and a race detector. Two accesses of a launch to one byte, at least
// one of them a write, must be ordered: by a __syncthreads, by a __syncwarp, or by coming from one thread. Other
// collectives of the warp (shuffle, vote, mma, ldmatrix) order nothing. A cp.async writes from its start until its
// thread waits for it, and nobody may touch its destination meanwhile. Threads of different blocks are never ordered; a
// launch comes after the one before it. Atomics are unknown here: no kernel has any, and one that had would not link.
//
// An access must be aligned to its size, as the compiler sees it: 16 bytes for a uint4.
//
// The compiler reports the accesses: with -fsanitize=thread it calls __tsan_read4(address) and the like before each of
// them, and memory_checks.cpp defines these functions instead of the sanitizer's library. Only kernels are compiled
// that way.
#pragma once

#include <cstddef>

namespace flexattn::simt {

enum class Access { kRead, kReadByOthers, kWrite };  // kReadByOthers: what ldmatrix reads goes to other lanes too

// Called by the executor as the launch proceeds.
void begin_launch(const char* name, const void* kernel);
void begin_block(const void* shared, size_t shared_bytes);
void end_launch();
void pass_barrier(int thread);
void pass_warp_barrier(int thread);
void pass_collective(int thread);  // __syncwarp included

// By the running thread.
void record_access(const void* address, size_t size, Access access);  // counted at the address of the call
void check_access(const void* address, size_t size, Access access);   // not counted
void begin_copy(const void* to, size_t size);
void end_copy(const void* to, size_t size);  // counted as a write

}  // namespace flexattn::simt
