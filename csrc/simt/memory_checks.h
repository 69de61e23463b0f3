// Accesses to memory, which access_counts.h counts, and a race detector. Two accesses of a launch to one byte, at least
// one of them a write, must be ordered: by a __syncthreads, by a collective of the warp (shuffle, vote, __syncwarp,
// mma), or by coming from one thread. Threads of different blocks are never ordered; a launch comes after the one
// before it. Atomics are unknown here: no kernel has any, and one that had would not link.
//
// The compiler reports the accesses: with -fsanitize=thread it calls __tsan_read4(address) and the like before each of
// them, and memory_checks.cpp defines these functions instead of the sanitizer's library. Only kernels are compiled
// that way.
#pragma once

#include <cstddef>

namespace flexattn::simt {

enum class Access { kRead, kWrite };

// Called by the executor as the launch proceeds.
void begin_launch(const char* name, const void* kernel);
void begin_block(const void* shared, size_t shared_bytes);
void end_launch();
void pass_barrier(int thread);
void pass_warp(int thread);

void record_access(const void* address, size_t size,
                   Access access);  // by the running thread, at the address of the call

}  // namespace flexattn::simt
