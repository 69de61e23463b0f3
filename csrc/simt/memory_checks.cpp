#include "memory_checks.h"

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

constexpr int kMostThreads = 1024;

// One access: by whom, and how many barriers and collectives its thread had passed.
struct Event {
  int32_t block = -1, thread = -1;
  uint32_t barriers = 0, collectives = 0;
};

// What is known of bytes that were always accessed together. Order is transitive, so of the writers the last one is enough,
// and readers only since then. Of those since the block's last barrier, two stand for all: of two warps if there are two (one of
// them is another warp than any writer's), else of two lanes after the warp's last collective.
struct Cell {
  Event writer, reader, other_reader;
  Event earlier_reader;  // any one of the blocks before: no later block is ordered after it
};

// Cells are as fine as the finest access to their page.
constexpr uintptr_t kPage = 256;
constexpr int kCoarsest = 4;
struct Page {
  int shift = kCoarsest + 1;  // a cell is 2^shift bytes; at first there are none
  std::vector<Cell> cells;

  void refine(int finer_shift) {
    std::vector<Cell> finer(kPage >> finer_shift);
    for (size_t i = 0; !cells.empty() && i < finer.size(); ++i) finer[i] = cells[i << finer_shift >> shift];
    cells = std::move(finer);
    shift = finer_shift;
  }
};

bool watching = false;
std::unordered_map<uintptr_t, Page> global_pages;  // by address / kPage
std::array<std::pair<uintptr_t, Page*>, 256> recent;
std::vector<Page> shared_pages;  // of the running block
uintptr_t shared_begin, shared_end;
std::array<uint32_t, kMostThreads> barriers, collectives;

bool is_shared(uintptr_t address) { return address >= shared_begin && address < shared_end; }

Page& page_of(uintptr_t address) {
  if (is_shared(address)) return shared_pages[address / kPage - shared_begin / kPage];
  const uintptr_t number = address / kPage;
  auto& [known, page] = recent[number % recent.size()];
  if (!page || known != number) known = number, page = &global_pages[number];
  return *page;
}

bool ordered(const Event& before, const Event& now) {
  if (before.thread < 0) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.barriers < now.barriers) return true;
  return before.thread / kLanes == now.thread / kLanes && before.collectives < now.collectives;
}

void conflict(const Event& before, const char* then, const char* now, uintptr_t address) {
  const std::string where =
      is_shared(address) ? "byte " + std::to_string(address - shared_begin) + " of shared memory" : "a byte of global memory";
  fail((std::string("race: ") + now + " " + where + " that thread " + std::to_string(before.thread) + " of block " +
        std::to_string(before.block) + " " + then + ", with nothing between that orders them")
           .c_str());
}

void read(Cell& cell, const Event& now, uintptr_t address) {
  if (!ordered(cell.writer, now)) conflict(cell.writer, "wrote", "reads", address);
  if (cell.reader.block != now.block || cell.reader.barriers != now.barriers) {
    if (cell.reader.block != now.block && cell.reader.thread >= 0) cell.earlier_reader = cell.reader;
    cell.reader = now;
    cell.other_reader = {};
    return;
  }
  const int warp = now.thread / kLanes;
  if (cell.reader.thread / kLanes != warp) {
    cell.other_reader = now;
  } else if (cell.other_reader.thread < 0 || cell.other_reader.thread / kLanes == warp) {
    if (cell.reader.collectives != now.collectives) cell.reader = now, cell.other_reader = {};
    if (cell.reader.thread != now.thread) cell.other_reader = now;
  }
}

void write(Cell& cell, const Event& now, uintptr_t address) {
  if (!ordered(cell.writer, now)) conflict(cell.writer, "wrote", "writes", address);
  for (const Event* reader : {&cell.reader, &cell.other_reader, &cell.earlier_reader})
    if (!ordered(*reader, now)) conflict(*reader, "read", "writes", address);
  cell = {now};
}

}  // namespace

void begin_launch(const char* name, const void* kernel) {
  count_launch(name, kernel);
  global_pages.clear();
  recent.fill({});
#if !defined(__SANITIZE_ADDRESS__)  // there the kernels do not tell what they access
  watching = true;
#endif
}

void begin_block(const void* shared, size_t shared_bytes) {
  finish_counts();
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  shared_end = shared_begin + shared_bytes;
  shared_pages.assign(shared_end / kPage - shared_begin / kPage + 1, {});
  barriers.fill(0);
  collectives.fill(0);
}

void end_launch() {
  finish_counts();
  watching = false;
}
void pass_barrier(int thread) { ++barriers[thread]; }
void pass_warp(int thread) { ++collectives[thread]; }

namespace {

// place: in the kernel's code.
void record(const void* pointer, size_t size, Access access, const void* place) {
  if (!watching || is_own(pointer)) return;
  const int thread = static_cast<int>(thread_index.x);
  const Event now{static_cast<int32_t>(block_index.x), thread, barriers[thread], collectives[thread]};
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer), end = begin + size;
  if (counting)
    count_access(thread, now.barriers + now.collectives, place, is_shared(begin), access, is_shared(begin) ? begin - shared_begin : begin, size);
  const int alignment = __builtin_ctzll(begin | size | (1 << kCoarsest));  // a power of two
  for (uintptr_t at = begin; at < end;) {
    Page& page = page_of(at);
    if (page.shift > alignment) page.refine(alignment);
    Cell& cell = page.cells[at % kPage >> page.shift];
    access == Access::kRead ? read(cell, now, at) : write(cell, now, at);
    at += uintptr_t{1} << page.shift;
  }
}

}  // namespace

void record_access(const void* address, size_t size, Access access) { record(address, size, access, __builtin_return_address(0)); }

}  // namespace flexattn::simt

// What -fsanitize=thread calls.
#define FLEXATTN_RECORD(size, access) flexattn::simt::record(at, size, flexattn::simt::Access::access, __builtin_return_address(0))
extern "C" {
#define FLEXATTN_HOOKS(size)                                                       \
  void __tsan_read##size(void* at) { FLEXATTN_RECORD(size, kRead); }               \
  void __tsan_write##size(void* at) { FLEXATTN_RECORD(size, kWrite); }             \
  void __tsan_unaligned_read##size(void* at) { FLEXATTN_RECORD(size, kRead); }     \
  void __tsan_unaligned_write##size(void* at) { FLEXATTN_RECORD(size, kWrite); }
FLEXATTN_HOOKS(1)
FLEXATTN_HOOKS(2)
FLEXATTN_HOOKS(4)
FLEXATTN_HOOKS(8)
FLEXATTN_HOOKS(16)
void __tsan_read_range(void* at, size_t size) { FLEXATTN_RECORD(size, kRead); }
void __tsan_write_range(void* at, size_t size) { FLEXATTN_RECORD(size, kWrite); }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
