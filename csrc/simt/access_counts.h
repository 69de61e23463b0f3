// What the memory accesses of a launch cost: wavefronts of shared memory and 32-byte sectors of global memory, for each
// access in the code of the kernels.
//
// An instruction of a warp consists of the accesses of its lanes: those at one address in the code that are each lane's
// n-th there since the last __syncthreads or collective of the warp, which all lanes pass alike. So a lane that skips
// an access in one iteration of a loop without collectives, and makes it in the next, counts as if it had made it in
// the first.
//
// Shared memory has 32 banks of 4 bytes. A wavefront serves one word of each bank, to any number of lanes. Accesses of
// up to 4 bytes are served to all lanes at a time, those of 8 bytes in two phases of 16 lanes, those of 16 bytes in
// four phases of 8 lanes; a phase takes as many wavefronts as the bank that most of its distinct words lie in has of
// them. The ideal is the larger of distinct words / 32 and the phases. (Hardware may serve phases together where they
// ask for the same words: not counted.)
//
// Global memory: the distinct 32-byte sectors that the lanes touch. The ideal is distinct bytes / 32.
//
// Widths are those of the accesses that g++ reports. What is 16 bytes in the source (uint4, Vector) arrives as 16; nvcc
// may merge neighbouring narrower ones. Longer copies count as pieces, as wide as their address and length allow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "memory_checks.h"

namespace flexattn::simt {

void start_counting();  // from zero
// Ends counting. A list of {launch, blocks, kernel, at, kind: LDS, STS, LDG or STG, width in bytes, instructions,
// ideal, and wavefronts or sectors}. kernel and at are offsets in this library: of the kernel's function, and of the
// instruction after the access.
std::string access_counts();

// Called by memory_checks. interval changes with every barrier and collective that the thread passes.
extern bool counting;
void count_launch(const char* name, const void* kernel);
void count_access(int thread, uint64_t interval, const void* at, bool shared, Access access, uintptr_t address,
                  size_t size);
void finish_counts();  // the block has ended: no instruction continues after this

}  // namespace flexattn::simt
