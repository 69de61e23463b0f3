#include "memory_checks.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "access_counts.h"
#include "executor.h"

namespace flexattn::simt {
namespace {

constexpr int kMaxThreads = 1024;

// One access. A phase is what lies between two barriers of a block; the phases of all blocks are numbered
// consecutively. Syncs are the __syncwarp that the thread has passed in this phase.
struct Event {
  uint32_t phase = 0;  // 0: never
  uint32_t thread : 10, syncs : 22;

  Event() : thread(0), syncs(0) {}
  int warp() const { return static_cast<int>(thread) / kLanes; }
};

// What is known of bytes that were always accessed together. Order is transitive, so of the writers the last one is
// enough, and readers only since then. Of those since the block's last barrier, two stand for all: of two warps if
// there are two (one of them is another warp than any writer's), else of two lanes after the warp's last __syncwarp.
struct Cell {
  Event writer, reader, other_reader;
  Event earlier_reader;    // any one of the blocks before: no later block is ordered after it
  bool in_flight = false;  // the writer has started a cp.async and not waited for it
};

// Cells are as fine as the finest access to their page.
constexpr uintptr_t kPage = 256;
constexpr int kCoarsest = 4;
struct Page {
  int shift = kCoarsest + 1;  // a cell is 2^shift bytes; at first there are none
  std::vector<Cell> cells;

  [[gnu::noinline]] void refine(int finer_shift) {
    std::vector<Cell> finer(kPage >> finer_shift);
    for (size_t i = 0; !cells.empty() && i < finer.size(); ++i) finer[i] = cells[i << finer_shift >> shift];
    cells = std::move(finer);
    shift = finer_shift;
  }
};

bool watching = false;
std::unordered_map<uintptr_t, Page> global_pages;  // by address / kPage
std::array<std::pair<uintptr_t, Page*>, 4096> recent;
std::vector<Page> shared_pages;  // of the running block
uintptr_t shared_begin, shared_end;
std::array<Event, kMaxThreads> clocks;          // of the running block's threads: what they do now
std::array<uint32_t, kMaxThreads> collectives;  // that they have passed in this phase
std::vector<uint32_t> first_phases;             // of the blocks up to the running one
uint32_t last_phase;

bool is_shared(uintptr_t address) { return address >= shared_begin && address < shared_end; }

Page& page_of(uintptr_t address) {
  if (is_shared(address)) return shared_pages[address / kPage - shared_begin / kPage];
  const uintptr_t number = address / kPage;
  auto& [known, page] = recent[number % recent.size()];
  if (!page || known != number) known = number, page = &global_pages[number];
  return *page;
}

bool ordered(const Event& before, const Event& now) {
  if (before.phase == 0) return true;
  if (before.phase != now.phase) return before.phase >= first_phases.back();
  return before.thread == now.thread || (before.warp() == now.warp() && before.syncs < now.syncs);
}

[[gnu::cold, gnu::noinline]] void conflict(const Event& before, const char* then, const char* now, uintptr_t address) {
  const std::string where = is_shared(address) ? "byte " + std::to_string(address - shared_begin) + " of shared memory"
                                               : "a byte of global memory";
  const auto block =
      std::upper_bound(first_phases.begin(), first_phases.end(), before.phase) - first_phases.begin() - 1;
  fail((std::string("race: ") + now + " " + where + " that thread " + std::to_string(before.thread) + " of block " +
        std::to_string(block) + " " + then + ", with nothing between that orders them")
           .c_str());
}

void check_in_flight(const Cell& cell, const char* now, uintptr_t address) {
  if (cell.in_flight) conflict(cell.writer, "copies to by a cp.async that it has not waited for", now, address);
}

void read(Cell& cell, const Event& now, uintptr_t address) {
  check_in_flight(cell, "reads", address);
  if (!ordered(cell.writer, now)) conflict(cell.writer, "wrote", "reads", address);
  if (cell.reader.phase != now.phase) {
    if (cell.reader.phase < first_phases.back() && cell.reader.phase > 0) cell.earlier_reader = cell.reader;
    cell.reader = now;
    cell.other_reader = {};
  } else if (cell.reader.warp() != now.warp()) {
    cell.other_reader = now;
  } else if (cell.other_reader.phase == 0 || cell.other_reader.warp() == now.warp()) {
    if (cell.reader.syncs != now.syncs) cell.reader = now, cell.other_reader = {};
    if (cell.reader.thread != now.thread) cell.other_reader = now;
  }
}

// The row of an ldmatrix, which several lanes read: two of them stand for all.
void read_by_others(Cell& cell, const Event& now, uintptr_t address) {
  Event neighbour = now;
  neighbour.thread ^= 1;
  read(cell, now, address);
  read(cell, neighbour, address);
}

void write(Cell& cell, const Event& now, uintptr_t address) {
  check_in_flight(cell, "writes", address);
  if (!ordered(cell.writer, now)) conflict(cell.writer, "wrote", "writes", address);
  for (const Event* reader : {&cell.reader, &cell.other_reader, &cell.earlier_reader})
    if (!ordered(*reader, now)) conflict(*reader, "read", "writes", address);
  cell = {};
  cell.writer = now;
}

}  // namespace

void begin_launch(const char* name, const void* kernel) {
  count_launch(name, kernel);
  global_pages.clear();
  recent.fill({});
  first_phases.clear();
  last_phase = 0;
#if !defined(__SANITIZE_ADDRESS__)  // whose kernels do not report their accesses
  watching = true;
#endif
}

void begin_block(const void* shared, size_t shared_bytes) {
  finish_counts();
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  shared_end = shared_begin + shared_bytes;
  shared_pages.assign(shared_end / kPage - shared_begin / kPage + 1, {});
  first_phases.push_back(++last_phase);
  for (int i = 0; i < kMaxThreads; ++i) {
    clocks[i].phase = last_phase;
    clocks[i].thread = i;
    clocks[i].syncs = 0;
    collectives[i] = 0;
  }
}

void end_launch() {
  finish_counts();
  watching = false;
}
void pass_barrier(int thread) {
  last_phase = ++clocks[thread].phase;
  clocks[thread].syncs = 0;
  collectives[thread] = 0;
}
void pass_warp_barrier(int thread) { ++clocks[thread].syncs; }
void pass_collective(int thread) { ++collectives[thread]; }

namespace {

// visit(cell, address) for the cells of size bytes.
template <typename Visit>
void for_each_cell(const void* pointer, size_t size, const Visit& visit) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer), end = begin + size;
  const int alignment = __builtin_ctzll(begin | size | (1 << kCoarsest));  // a power of two
  for (uintptr_t at = begin; at < end;) {
    Page& page = page_of(at);
    if (page.shift > alignment) page.refine(alignment);
    visit(page.cells[at % kPage >> page.shift], at);
    at += uintptr_t{1} << page.shift;
  }
}

// code: address of the access in the kernel.
void count(const void* pointer, size_t size, Access access, const void* code) {
  const Event now = clocks[thread_index.x];
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  const uint64_t interval = static_cast<uint64_t>(now.phase) << 32 | collectives[now.thread];
  count_access(now.thread, interval, code, is_shared(begin), access == Access::kWrite ? Access::kWrite : Access::kRead,
               is_shared(begin) ? begin - shared_begin : begin, size);
}

// Whether the address would be memory on a GPU.
bool is_watched(const void* address) {
  return watching && !on_stack(address) &&
         (is_shared(reinterpret_cast<uintptr_t>(address)) || !belongs_to_executor(address));
}

void record(const void* address, size_t size, Access access, const void* code) {
  if (!is_watched(address)) return;
  if (counting) count(address, size, access, code);
  check_access(address, size, access);
}

void record_aligned(const void* address, size_t size, Access access, const void* code) {
  if (!is_watched(address)) return;
  require_alignment(access == Access::kWrite ? "writes" : "reads", address, size);
  record(address, size, access, code);
}

}  // namespace

void check_access(const void* address, size_t size, Access access) {
  if (!watching) return;
  const Event now = clocks[thread_index.x];
  for_each_cell(address, size, [&](Cell& cell, uintptr_t at) {
    (access == Access::kWrite ? write : access == Access::kRead ? read : read_by_others)(cell, now, at);
  });
}

void record_access(const void* address, size_t size, Access access) {
  record(address, size, access, __builtin_return_address(0));
}

void begin_copy(const void* to, size_t size) {
  if (!watching) return;
  check_access(to, size, Access::kWrite);
  for_each_cell(to, size, [](Cell& cell, uintptr_t) { cell.in_flight = true; });
}

void end_copy(const void* to, size_t size) {
  if (!watching) return;
  for_each_cell(to, size, [](Cell& cell, uintptr_t) { cell.in_flight = false; });
  record(to, size, Access::kWrite, __builtin_return_address(0));
}

}  // namespace flexattn::simt

// Called by code that is compiled with -fsanitize=thread.
#define FLEXATTN_RECORD(record, size, access) \
  flexattn::simt::record(at, size, flexattn::simt::Access::access, __builtin_return_address(0))
extern "C" {
#define FLEXATTN_HOOKS(size)                                                           \
  void __tsan_read##size(void* at) { FLEXATTN_RECORD(record_aligned, size, kRead); }   \
  void __tsan_write##size(void* at) { FLEXATTN_RECORD(record_aligned, size, kWrite); } \
  void __tsan_unaligned_read##size(void* at) { FLEXATTN_RECORD(record, size, kRead); } \
  void __tsan_unaligned_write##size(void* at) { FLEXATTN_RECORD(record, size, kWrite); }
FLEXATTN_HOOKS(1)
FLEXATTN_HOOKS(2)
FLEXATTN_HOOKS(4)
FLEXATTN_HOOKS(8)
FLEXATTN_HOOKS(16)
void __tsan_read_range(void* at, size_t size) { FLEXATTN_RECORD(record, size, kRead); }
void __tsan_write_range(void* at, size_t size) { FLEXATTN_RECORD(record, size, kWrite); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
