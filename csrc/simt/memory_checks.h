// Accesses to memory, which access_counts.h counts, and a race detector. Two threads of a launch may not touch one
// byte, at least one of them writing, unless something orders them: a __syncthreads between them, a collective of their
// warp (shuffle, vote,
// __syncwarp, mma), or that they are one thread. Threads of different blocks are never ordered; a launch comes after
// the one before it. Atomics are not known here: no kernel has any, and one that had would not link.
//
// The compiler reports the accesses: with -fsanitize=thread it calls __tsan_read4(address) and the like before each of
// them, and memory_checks.cpp defines these functions instead of the sanitizer's library. Only kernels are compiled
// that way.
#pragma once

#include <cstddef>

namespace flexattn::simt {

enum class Access { kRead, kWrite };

// The executor tells where the launch stands.
void begin_launch(const char* name, const void* kernel);
void begin_block(const void* shared, size_t shared_bytes);
void end_launch();
void pass_barrier(int thread);
void pass_warp(int thread);

void record_access(const void* address, size_t size, Access access);  // by the running thread, at the place of the call

}  // namespace flexattn::simt
