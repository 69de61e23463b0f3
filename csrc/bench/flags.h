// The command line of the driver.
#pragma once

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

namespace flexattn::bench {

struct Flags {
  std::string op;  // of kOperators
  int64_t batch = 1, heads = 32, kv_heads = 0, queries = 640, keys = 0, selected = 576, head_dim = 128;
  int64_t window = 0, bidirectional = 0;
  int64_t lr_side = 24, hr_side = 72, pool = 9;
  int64_t iterations = 50, warmup = 5;
  std::string dtype = "fp16", path = "auto", hr_rows = "last";
  bool cold_l2 = false, profile = false, help = false;
  double softcap = 0, peak_gbs = 0, peak_tflops = 0;
};

inline const std::vector<std::string> kOperators{"attention", "select", "gather", "assign", "write"};

inline const char* kHelp =
    R"(flexattn_bench attention|select|gather|assign|write [flags]: time one operator on the current GPU.

  --batch 1           samples
  --heads 32          query heads
  --kv-heads          key heads; by default as many as --heads
  --queries 640       query rows: 1 is a decode step
  --keys              sequence keys, the queries at their end; by default as many as --queries
  --selected 576      selected high-resolution tokens of every sample
  --head-dim 128      channels of a head; gather moves rows of heads x head-dim, write of kv-heads x head-dim
  --hr-rows last      which query rows see the selected tokens: last or all
  --window 0          latest keys that a query of attention sees, 0 for all
  --bidirectional 0   first keys of the sequence that see each other, as those of an image; 0 for none
  --softcap 0         cap of the logits of attention, 0 for none
  --lr-side 24        side of the low-resolution grid, for the map of attention (0: none) and the input of select
  --hr-side 72        side of the high-resolution grid
  --pool 9            side of the max-pool of select, 0 for none
  --dtype fp16        fp16, bf16 or fp32; the map of select is always fp32, assign has only integers
  --path auto         which attention kernels: auto, volta (those of the V100) or generic (no tiles)
  --iterations 50     timed calls
  --warmup 5          calls before them
  --cold-l2           flush the L2 cache before every timed call
  --warm-l2           do not (default)
  --profile           cudaProfilerStart and Stop around the timed calls
  --peak-gbs, --peak-tflops   the roofline, if the figures reported by the device are wrong

Prints one line of text and one of CSV with its header. Exit 1: bad flags or a CUDA error; 2: no GPU.
)";

// Every refusal is one sentence.
[[noreturn]] inline void refuse(const std::string& sentence) { throw std::invalid_argument(sentence); }

using Target = std::variant<int64_t*, double*, std::string*>;

inline std::map<std::string, Target> flags_with_a_value(Flags& f) {
  return {
      {"--batch", &f.batch},
      {"--heads", &f.heads},
      {"--kv-heads", &f.kv_heads},
      {"--queries", &f.queries},
      {"--keys", &f.keys},
      {"--selected", &f.selected},
      {"--head-dim", &f.head_dim},
      {"--window", &f.window},
      {"--bidirectional", &f.bidirectional},
      {"--softcap", &f.softcap},
      {"--lr-side", &f.lr_side},
      {"--hr-side", &f.hr_side},
      {"--pool", &f.pool},
      {"--iterations", &f.iterations},
      {"--warmup", &f.warmup},
      {"--dtype", &f.dtype},
      {"--path", &f.path},
      {"--hr-rows", &f.hr_rows},
      {"--peak-gbs", &f.peak_gbs},
      {"--peak-tflops", &f.peak_tflops},
  };
}

inline void assign(const std::string& flag, const Target& target, const std::string& value) {
  size_t used = 0;
  try {
    if (auto* text = std::get_if<std::string*>(&target)) **text = value, used = value.size();
    if (auto* whole = std::get_if<int64_t*>(&target)) **whole = std::stoll(value, &used);
    if (auto* real = std::get_if<double*>(&target)) **real = std::stod(value, &used);
  } catch (const std::logic_error&) {
    used = 0;
  }
  if (used == 0 || used != value.size()) refuse(flag + " is '" + value + "', it must be a number.");
}

inline void check_choice(const std::string& name, const std::string& value, const std::vector<std::string>& allowed) {
  std::string list;
  for (const std::string& word : allowed) {
    if (word == value) return;
    list += (list.empty() ? "" : ", ") + word;
  }
  refuse(name + " is '" + value + "', allowed: " + list + ".");
}

inline void check_min(const char* name, int64_t value, int64_t min) {
  if (value < min)
    refuse(std::string(name) + " is " + std::to_string(value) + ", it must be at least " + std::to_string(min) + ".");
}

// Sides of grids, whose cells are counted in int32.
inline void check_side(const char* name, int64_t side, int64_t min) {
  constexpr int64_t kMaxSide = 46340;
  check_min(name, side, min);
  if (side > kMaxSide)
    refuse(std::string(name) + " is " + std::to_string(side) + ", it must be at most " + std::to_string(kMaxSide) +
           ".");
}

inline void check_values(const Flags& f) {
  check_choice("the operator", f.op, kOperators);
  check_choice("--dtype", f.dtype, {"fp16", "bf16", "fp32"});
  check_choice("--path", f.path, {"auto", "volta", "generic"});
  check_choice("--hr-rows", f.hr_rows, {"last", "all"});
  check_min("--batch", f.batch, 1);
  check_min("--heads", f.heads, 1);
  check_min("--kv-heads", f.kv_heads, 1);
  check_min("--queries", f.queries, 1);
  check_min("--keys", f.keys, f.queries);
  check_min("--selected", f.selected, 0);
  check_min("--head-dim", f.head_dim, 1);
  check_min("--window", f.window, 0);
  check_min("--bidirectional", f.bidirectional, 0);
  check_side("--hr-side", f.hr_side, 1);
  check_min("--pool", f.pool, 0);
  check_side("--lr-side", f.lr_side, f.op == "select" ? 1 : 0);
  check_min("--iterations", f.iterations, 1);
  check_min("--warmup", f.warmup, 0);
  if (f.peak_gbs < 0 || f.peak_tflops < 0) refuse("peaks must not be negative.");
  if (f.softcap < 0) refuse("--softcap must not be negative.");
}

inline void check_combinations(const Flags& f) {
  if (f.heads % f.kv_heads) refuse("--heads must be a multiple of --kv-heads.");
  if (f.bidirectional > f.keys) refuse("--bidirectional must not be more than --keys.");
  const bool moves_tokens = f.op == "gather" || f.op == "assign" || f.op == "write";
  if (moves_tokens && f.selected > f.hr_side * f.hr_side)
    refuse("--selected is more than the hr-side x hr-side tokens.");
  if (moves_tokens && f.selected == 0) refuse("--selected must be at least 1 for " + f.op + ".");
  if (f.op == "write" && f.head_dim % 2) refuse("--head-dim must be even for write.");
  if (f.op == "select" && f.pool > f.lr_side) refuse("--pool must not be more than --lr-side.");
  if (f.op == "attention" && f.lr_side * f.lr_side > f.keys)
    refuse("--lr-side " + std::to_string(f.lr_side) + " takes " + std::to_string(f.lr_side * f.lr_side) +
           " of the keys and there are " + std::to_string(f.keys) + "; --lr-side 0 asks for no map.");
}

// Parse the words of the command line. Throws std::invalid_argument with one sentence.
inline Flags parse(int count, char** words) {
  Flags f;
  const auto targets = flags_with_a_value(f);
  for (int i = 1; i < count; ++i) {
    const std::string word = words[i];
    if (word == "--help" || word == "-h") {
      f.help = true;
    } else if (word == "--cold-l2" || word == "--warm-l2") {
      f.cold_l2 = word == "--cold-l2";
    } else if (word == "--profile") {
      f.profile = true;
    } else if (word.rfind("--", 0) != 0 && f.op.empty()) {
      f.op = word;
    } else {
      const auto found = targets.find(word);
      if (found == targets.end()) refuse("there is no flag " + word + "; --help lists them.");
      if (++i == count) refuse(word + " needs a value.");
      assign(word, found->second, words[i]);
    }
  }
  if (f.help) return f;
  if (f.op.empty()) refuse("name what to time: attention, select, gather, assign or write.");
  if (f.kv_heads == 0) f.kv_heads = f.heads;
  if (f.keys == 0) f.keys = f.queries;
  check_values(f);
  check_combinations(f);
  return f;
}

}  // namespace flexattn::bench
