#include "executor.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <limits>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch_limits.h"
#include "memory_checks.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace flexattn::simt {

dim3 thread_index, block_index, block_size, grid_size;
uintptr_t stack_begin;

namespace {

constexpr int kCopyBytes = 16;

// Where a fiber or the scheduler left off. Unlike swapcontext, switching makes no system call.
using Resumption = void* [5];

struct Copy {
  unsigned char* to;
  const unsigned char* from;
};

// Runs one thread of a block after the other, on the same stack.
struct Fiber {
  Resumption resumption;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  bool started = false;
  bool finished = false;            // with this block's thread
  const void* waits_for = nullptr;  // the meeting of a barrier or a warp; null = can run
  int64_t round = 0;                // of that meeting
  std::vector<Copy> open;           // cp.async not yet committed
  std::deque<std::vector<Copy>> groups;
};

// Where threads meet: a round is over when all of them have arrived.
struct Meeting {
  int64_t round = 0;
  int arrived = 0;
  const char* operation = nullptr;
};

struct Warp : Meeting {
  int live = 0;
  WarpBytes bytes[2];  // of the current round and of the last one, which slow lanes still read
};

const char* kernel_name = "";
const std::function<void()>* kernel_body;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Meeting barrier;
int live, current;
Resumption scheduler;
std::vector<unsigned char> shared;
std::exception_ptr error;
std::mt19937 order(1);

#if defined(__SANITIZE_ADDRESS__)
const void* scheduler_stack;
size_t scheduler_size;
#endif

// AddressSanitizer would take a jump for the end of all frames that it leaves.
#define FLEXATTN_SWITCH __attribute__((noinline, no_sanitize("address")))

FLEXATTN_SWITCH void jump(Resumption& to) { __builtin_longjmp(to, 1); }
FLEXATTN_SWITCH void switch_to(Resumption& from, Resumption& to) {
  if (!__builtin_setjmp(from)) jump(to);
}

void run_fiber();
FLEXATTN_SWITCH void start(Resumption& from, unsigned char* stack) {
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, run_fiber, 0);
  if (!__builtin_setjmp(from)) setcontext(&context);
}

void switch_to_scheduler() {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, scheduler_stack, scheduler_size);
#endif
  switch_to(fibers[current].resumption, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_size);
#endif
}

void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
  for (;;) {
    (*kernel_body)();
    if (!fibers[current].open.empty() || !fibers[current].groups.empty())
      fail("ends with cp.async that it did not wait for");
    fibers[current].finished = true;
    --live;
    --warps[current / kLanes].live;
    switch_to_scheduler();
  }
}

void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  thread_index = {static_cast<unsigned>(thread), 0, 0};
  stack_begin = reinterpret_cast<uintptr_t>(fiber.stack.get());
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack.get(), kStackBytes);
#endif
  if (fiber.started) {
    switch_to(scheduler, fiber.resumption);
  } else {
    fiber.started = true;
    start(scheduler, fiber.stack.get());
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void note_fault(const std::string& what) {
  error =
      std::make_exception_ptr(std::runtime_error(std::string(kernel_name) + ", block " + std::to_string(block_index.x) +
                                                 ", thread " + std::to_string(thread_index.x) + ": " + what));
}

// Wait until `size` threads have arrived. A thread that has ended, or waits elsewhere, never will.
void meet(Meeting& meeting, int size, const char* operation) {
  if (meeting.arrived > 0 && meeting.operation != operation && std::strcmp(meeting.operation, operation) != 0)
    fail((std::string("comes to ") + operation + " while others of its warp are at " + meeting.operation).c_str());
  meeting.operation = operation;
  Fiber& fiber = fibers[current];
  if (++meeting.arrived == size) {
    meeting.arrived = 0;
    ++meeting.round;
    return;
  }
  fiber.waits_for = &meeting;
  fiber.round = meeting.round;
  switch_to_scheduler();
}

bool can_run(const Fiber& fiber) {
  return !fiber.finished && (!fiber.waits_for || static_cast<const Meeting*>(fiber.waits_for)->round > fiber.round);
}

void run_block(unsigned threads) {
  live = static_cast<int>(threads);
  barrier = {};
  const unsigned nan = 0x7fc07fc0;  // a NaN in float32, float16 pairs and bfloat16 pairs
  for (size_t i = 0; i + sizeof nan <= shared.size(); i += sizeof nan) std::memcpy(&shared[i], &nan, sizeof nan);
  for (Warp& warp : warps) static_cast<Meeting&>(warp) = {}, warp.live = 0;
  std::vector<int> turn(threads);
  for (unsigned i = 0; i < threads; ++i) {
    turn[i] = static_cast<int>(i);
    ++warps[i / kLanes].live;
    Fiber& fiber = fibers[i];
    fiber.finished = false;
    fiber.waits_for = nullptr;
    fiber.open.clear();
    fiber.groups.clear();
  }
  begin_block(shared.data(), shared.size());
  while (live > 0 && !error) {
    std::shuffle(turn.begin(), turn.end(), order);
    bool progress = false;
    for (const int thread : turn) {
      if (!can_run(fibers[thread])) continue;
      fibers[thread].waits_for = nullptr;
      progress = true;
      resume(thread);
      if (error) break;
    }
    if (progress || error) continue;
    // Every thread that is left waits for one that will never arrive.
    for (const int thread : turn) {
      if (fibers[thread].finished) continue;
      current = thread;
      thread_index = {static_cast<unsigned>(thread), 0, 0};
      note_fault(std::string("waits forever at ") + static_cast<const Meeting*>(fibers[thread].waits_for)->operation +
                 ": not all threads reach it");
      break;
    }
  }
}

void arrive(std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    record_access(copy.from, kCopyBytes, Access::kRead);
    end_copy(copy.to, kCopyBytes);
    std::memcpy(copy.to, copy.from, kCopyBytes);
  }
}

}  // namespace

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
            const std::function<void()>& body) {
  const std::string why = refused_launch(kernel, grid, block, shared_bytes);
  if (!why.empty()) throw std::runtime_error(std::string(name) + " cannot be launched: " + why);
  const unsigned threads = block.x;
  if (block.y != 1 || block.z != 1 || threads % kLanes)
    throw std::runtime_error(std::string(name) + ": the executor runs whole warps in a row, not a block of " +
                             std::to_string(threads) + " threads");
  kernel_name = name;
  kernel_body = &body;
  grid_size = grid;
  block_size = block;
  error = nullptr;
  while (fibers.size() < threads) fibers.emplace_back();
  warps = std::vector<Warp>(threads / kLanes);
  begin_launch(name, kernel);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && !error; ++i) {
    block_index = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                   static_cast<unsigned>(i / grid.x / grid.y)};
    // New for each block, so that AddressSanitizer sees accesses past its end.
    shared = std::vector<unsigned char>(shared_bytes);
    run_block(threads);
  }
  end_launch();
  if (error) {
    fibers.clear();  // some are in the middle of a kernel
    std::rethrow_exception(error);
  }
}

unsigned char* shared_memory() { return shared.data(); }
int lane() { return current % kLanes; }

void block_barrier() {
  meet(barrier, static_cast<int>(block_size.x), "__syncthreads");
  pass_barrier(current);
}

const WarpBytes& exchange(const char* operation, const void* bytes, size_t size) {
  Warp& warp = warps[current / kLanes];
  if (warp.live != kLanes) fail((std::string("calls ") + operation + " after a lane of its warp has ended").c_str());
  const int64_t round = warp.round;
  std::memcpy(warp.bytes[round % 2][current % kLanes], bytes, size);
  meet(warp, kLanes, operation);
  pass_collective(current);
  return warp.bytes[round % 2];
}

void warp_barrier() {
  exchange("__syncwarp", "", 0);
  pass_warp_barrier(current);
}

void start_copy(void* to, const void* from) {
  require_alignment("cp.async to", to, kCopyBytes);
  require_alignment("cp.async from", from, kCopyBytes);
  check_access(from, kCopyBytes, Access::kRead);
  begin_copy(to, kCopyBytes);
  std::memset(to, 0xff, kCopyBytes);  // NaN until it has arrived
  fibers[current].open.push_back({static_cast<unsigned char*>(to), static_cast<const unsigned char*>(from)});
}
void commit_copies() {
  fibers[current].groups.push_back(std::move(fibers[current].open));
  fibers[current].open.clear();
}
void wait_copies(int groups_left) {
  auto& groups = fibers[current].groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    arrive(groups.front());
    groups.pop_front();
  }
}

bool belongs_to_executor(const void* address) {
  const auto within = [&](const void* begin, size_t size) {
    return address >= begin && address < static_cast<const unsigned char*>(begin) + size;
  };
  if (within(kernel_body, sizeof *kernel_body)) return true;
  if (within(warps.data(), warps.size() * sizeof(Warp))) return true;
  for (const dim3* variable : {&thread_index, &block_index, &block_size, &grid_size})
    if (within(variable, sizeof *variable)) return true;
  return false;
}

void require_alignment(const char* operation, const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  fail((std::string("misaligned: ") + operation + " an address that is not a multiple of " + std::to_string(bytes) +
        " bytes")
           .c_str());
}

// Nothing is thrown through a kernel, which the compiler may assume not to throw: its fiber is abandoned where it is.
void fail(const char* what) {
  note_fault(what);
  switch_to_scheduler();
  std::abort();  // not reached
}

}  // namespace flexattn::simt
