#include "memory_checks.h"

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "access_counts.h"
#include "executor.h"

namespace flexattn::simt {
namespace {

constexpr int kMostThreads = 1024;
constexpr int kReaders = 4;  // remembered per byte: those that came last

// One access: by whom, and how many barriers and collectives its thread had passed.
struct Event {
  int32_t block = -1, thread = -1;
  uint32_t barriers = 0, collectives = 0;
};

struct Byte {
  Event writer;
  std::array<Event, kReaders> readers;
  uint8_t next_reader = 0;
};

constexpr uintptr_t kPage = 256;
using Page = std::array<Byte, kPage>;

bool watching = false;
std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
uintptr_t last_page = 0;
Page* last = nullptr;
uintptr_t shared_begin, shared_end;
std::array<uint32_t, kMostThreads> barriers, collectives;

Page& page_of(uintptr_t address) {
  const uintptr_t number = address / kPage;
  if (last && last_page == number) return *last;
  std::unique_ptr<Page>& page = pages[number];
  if (!page) page = std::make_unique<Page>();
  last_page = number;
  return *(last = page.get());
}

bool ordered(const Event& before, const Event& now) {
  if (before.thread < 0) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.barriers < now.barriers) return true;
  return before.thread / kLanes == now.thread / kLanes && before.collectives < now.collectives;
}

void conflict(const Event& before, const char* then, const char* now, uintptr_t address) {
  const bool is_shared = address >= shared_begin && address < shared_end;
  const std::string where = is_shared ? "byte " + std::to_string(address - shared_begin) + " of shared memory" : "a byte of global memory";
  fail((std::string("race: ") + now + " " + where + " that thread " + std::to_string(before.thread) + " of block " +
        std::to_string(before.block) + " " + then + ", with nothing between that orders them")
           .c_str());
}

}  // namespace

void begin_launch(const char* name, const void* kernel) {
  count_launch(name, kernel);
  pages.clear();
  last = nullptr;
  watching = true;
}

void begin_block(const void* shared, size_t shared_bytes) {
  finish_counts();
  shared_begin = reinterpret_cast<uintptr_t>(shared);
  shared_end = shared_begin + shared_bytes;
  // Another block's shared memory may have stood here.
  for (uintptr_t number = shared_begin / kPage; number <= shared_end / kPage; ++number) pages.erase(number);
  last = nullptr;
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

void record(const void* pointer, size_t size, Access access, const void* at) {
  if (!watching || is_own(pointer)) return;
  const int thread = static_cast<int>(thread_index.x);
  const Event now{static_cast<int32_t>(block_index.x), thread, barriers[thread], collectives[thread]};
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  if (counting) {
    const bool shared = address >= shared_begin && address < shared_end;
    count_access(thread, now.barriers + now.collectives, at, shared, access, shared ? address - shared_begin : address, size);
  }
  for (uintptr_t at = address; at < address + size; ++at) {
    Byte& byte = page_of(at)[at % kPage];
    if (!ordered(byte.writer, now)) conflict(byte.writer, "wrote", access == Access::kRead ? "reads" : "writes", at);
    if (access == Access::kRead) {
      bool known = false;
      for (Event& reader : byte.readers)
        if (reader.thread == now.thread && reader.block == now.block) reader = now, known = true;
      if (!known) byte.readers[byte.next_reader++ % kReaders] = now;
      continue;
    }
    for (const Event& reader : byte.readers)
      if (!ordered(reader, now)) conflict(reader, "read", "writes", at);
    byte.writer = now;
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
