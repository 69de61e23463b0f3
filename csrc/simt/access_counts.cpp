#include "access_counts.h"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "executor.h"

namespace flexattn::simt {

bool counting = false;

namespace {

constexpr int kMaxWarps = 32;
constexpr uintptr_t kWord = 4, kBanks = 32, kSector = 32, kWidest = 16;

// An access in the code.
struct Site {
  const void* at;
  bool shared;
  Access access;
  size_t width;

  bool operator==(const Site& other) const { return key() == other.key(); }
  std::tuple<const void*, bool, Access, size_t> key() const { return {at, shared, access, width}; }
};

struct SiteHash {
  size_t operator()(const Site& site) const {
    return reinterpret_cast<size_t>(site.at) * 4 + 2 * site.shared + site.width;
  }
};

struct WarpInstruction {
  uint32_t lanes = 0;
  std::array<uintptr_t, kLanes> address;
};

// What the lanes of a warp did at a site since their last barrier or collective.
struct Executions {
  std::array<size_t, kLanes> times{};
  std::vector<WarpInstruction> instructions;
};

struct Warp {
  uint64_t interval = 0;
  std::unordered_map<Site, Executions, SiteHash> sites;
};

struct Count {
  uint64_t instructions = 0, units = 0, ideal = 0;  // units: wavefronts or sectors
};

// Counts of a site in a kernel.
struct Entry {
  const char* launch = "";
  unsigned blocks = 0;  // of the launch with most blocks
  Count count;
};

const char* launch_name;
const void* running_kernel;
std::array<Warp, kMaxWarps> warps;
std::map<std::pair<const void*, decltype(Site().key())>, Entry> counts;

uint64_t distinct(std::vector<uintptr_t> values) {
  std::sort(values.begin(), values.end());
  return std::unique(values.begin(), values.end()) - values.begin();
}

uint64_t divided_up(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

void count_wavefronts(const WarpInstruction& instruction, size_t width, Count& count) {
  const int lanes_at_a_time = static_cast<int>(kLanes * kWord / std::max(width, kWord));
  std::vector<uintptr_t> all;
  uint64_t phases = 0;
  for (int first = 0; first < kLanes; first += lanes_at_a_time) {
    std::array<std::vector<uintptr_t>, kBanks> words;
    for (int lane = first; lane < first + lanes_at_a_time; ++lane)
      for (uintptr_t at = 0; instruction.lanes >> lane & 1 && at < width; at += kWord) {
        const uintptr_t word = (instruction.address[lane] + at) / kWord;
        words[word % kBanks].push_back(word);
        all.push_back(word);
      }
    uint64_t max_words = 0;
    for (const auto& of_bank : words) max_words = std::max(max_words, distinct(of_bank));
    count.units += max_words;
    phases += max_words > 0;
  }
  count.ideal += std::max(divided_up(distinct(all), kBanks), phases);
}

void count_sectors(const WarpInstruction& instruction, size_t width, Count& count) {
  std::vector<uintptr_t> addresses, sectors;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(instruction.lanes >> lane & 1)) continue;
    addresses.push_back(instruction.address[lane]);
    sectors.push_back(instruction.address[lane] / kSector);
  }
  count.units += distinct(sectors);
  count.ideal += divided_up(distinct(addresses) * width, kSector);
}

void finish(Warp& warp) {
  for (const auto& [site, executions] : warp.sites) {
    auto& [launch, blocks, count] = counts[{running_kernel, site.key()}];
    launch = launch_name;
    blocks = std::max(blocks, grid_size.x);
    for (const WarpInstruction& instruction : executions.instructions) {
      ++count.instructions;
      site.shared ? count_wavefronts(instruction, site.width, count) : count_sectors(instruction, site.width, count);
    }
  }
  warp.sites.clear();
}

uintptr_t offset_in_library(const void* code) {
  Dl_info library;
  return dladdr(code, &library) ? reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(library.dli_fbase)
                                : 0;
}

}  // namespace

void start_counting() {
  counts.clear();
  counting = true;
}

std::string access_counts() {
  counting = false;
  std::string json;
  for (const auto& [key, entry] : counts) {
    const auto& [kernel, site] = key;
    const auto& [at, shared, access, width] = site;
    const auto& [launch, blocks, count] = entry;
    const char* kind = shared ? (access == Access::kRead ? "LDS" : "STS") : (access == Access::kRead ? "LDG" : "STG");
    const auto field = [](const char* label, uint64_t value) {
      return std::string(", \"") + label + "\": " + std::to_string(value);
    };
    json += std::string(json.empty() ? "[" : ",\n ") + "{\"launch\": \"" + launch + "\", \"kind\": \"" + kind + "\"" +
            field("kernel", offset_in_library(kernel)) + field("blocks", blocks) + field("at", offset_in_library(at)) +
            field("width", width) + field("instructions", count.instructions) +
            field(shared ? "wavefronts" : "sectors", count.units) + field("ideal", count.ideal) + "}";
  }
  return json.empty() ? "[]" : json + "]";
}

void count_launch(const char* name, const void* kernel) {
  launch_name = name;
  running_kernel = kernel;
}

void count_access(int thread, uint64_t interval, const void* at, bool shared, Access access, uintptr_t address,
                  size_t size) {
  Warp& warp = warps[thread / kLanes];
  // A lane is in a new interval only after every lane of its warp has come to the end of the last one.
  if (warp.interval != interval) finish(warp);
  warp.interval = interval;
  const uintptr_t alignment = address | size | kWidest, width = alignment & -alignment;
  Executions& executions = warp.sites[{at, shared, access, width}];
  for (uintptr_t piece = address; piece < address + size; piece += width) {
    const size_t n = executions.times[thread % kLanes]++;
    if (n == executions.instructions.size()) executions.instructions.emplace_back();
    executions.instructions[n].lanes |= 1u << thread % kLanes;
    executions.instructions[n].address[thread % kLanes] = piece;
  }
}

void finish_counts() {
  for (Warp& warp : warps) finish(warp);
}

}  // namespace flexattn::simt
