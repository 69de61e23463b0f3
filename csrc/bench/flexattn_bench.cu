// Time one operator without Python or torch, for nsys, ncu and comparison with the roofline.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "device.h"
#include "flags.h"
#include "flexattn/assign_slots.h"
#include "flexattn/gather_tokens.h"
#include "flexattn/hierarchical_attention.h"
#include "flexattn/select_tokens.h"
#include "flexattn/write_hr_kv.h"

namespace flexattn::bench {
namespace {

// The least work of a call, and how long it took.
struct Result {
  double bytes = 0;  // inputs and outputs, each once
  double flop = 0;   // products over visible keys only
  std::vector<double> microseconds;
};

template <typename Call>
std::vector<double> timed(const Flags& f, const Call& call) {
  return measure(call, f.warmup, f.iterations, f.cold_l2, f.profile);
}

DType dtype_of(const Flags& f) {
  return f.dtype == "fp16" ? DType::kFloat16 : f.dtype == "bf16" ? DType::kBFloat16 : DType::kFloat32;
}

// 0, 1, ... count - 1.
Buffer ascending(int64_t count) {
  std::vector<int32_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  return on_device(numbers);
}

// The tensors of a call of attention, and its parameters.
class AttentionCase {
 public:
  explicit AttentionCase(const Flags& f)
      : bidirectional_(f.bidirectional),
        q_(random(f.batch * f.heads * f.queries * f.head_dim, dtype_of(f), 1)),
        k_(random(f.batch * f.kv_heads * f.keys * f.head_dim, dtype_of(f), 2)),
        v_(random(f.batch * f.kv_heads * f.keys * f.head_dim, dtype_of(f), 3)),
        k_hr_(random(f.batch * f.selected * f.kv_heads * f.head_dim, dtype_of(f), 4)),
        v_hr_(random(f.batch * f.selected * f.kv_heads * f.head_dim, dtype_of(f), 5)),
        kv_start_(for_all(f, 0)),
        kv_len_(for_all(f, f.keys)),
        ranges_(first_keys(f, f.bidirectional)),
        hr_slots_(ascending(f.batch * f.selected)),
        hr_count_(for_all(f, f.selected)),
        hr_from_(for_all(f, f.hr_rows == "all" ? 0 : f.queries - 1)),
        map_ranges_(first_keys(f, f.lr_side * f.lr_side)),
        out_(q_.bytes()),
        lse_(f.batch * f.heads * f.queries * 4),
        lse_seq_(lse_.bytes()),
        map_(f.batch * f.lr_side * f.lr_side * 4),
        params_{.in = inputs(f),
                .images = f.lr_side > 0,
                .map_size = f.lr_side * f.lr_side,
                .map_ranges = map_ranges_.as<int32_t>(),
                .map_over_all = false,
                .out = out_.as(),
                .lse = lse_.as(),
                .lse_seq = lse_seq_.as(),
                .map = map_.as(),
                .workspace = nullptr},
        workspace_(cuda::hierarchical_attention_workspace(params_, nullptr)) {
    params_.workspace = workspace_.as();
  }

  void run() const { cuda::hierarchical_attention_forward(params_, nullptr); }

  double bytes() const {
    double total = 0;
    for (const Buffer* buffer : {&q_, &k_hr_, &v_hr_, &out_, &lse_, &lse_seq_, &map_}) total += buffer->bytes();
    const AttentionInputs& in = params_.in;
    const int64_t first = in.keys - in.queries;  // position of the first query, which reaches back furthest
    const bool far = !in.window || first < bidirectional_;
    const int64_t seen = far ? in.keys : std::min(in.keys, in.queries - 1 + in.window);
    return total + (k_.bytes() + v_.bytes()) * static_cast<double>(seen) / static_cast<double>(in.keys);
  }

 private:
  static Buffer for_all(const Flags& f, int64_t value) {
    return on_device(std::vector<int32_t>(f.batch, static_cast<int32_t>(value)));
  }
  // The range of the first keys of every sample.
  static Buffer first_keys(const Flags& f, int64_t count) {
    std::vector<int32_t> ranges(2 * f.batch);
    for (int64_t b = 0; b < f.batch; ++b) ranges[2 * b + 1] = static_cast<int32_t>(count);
    return on_device(ranges);
  }

  AttentionInputs inputs(const Flags& f) const {
    const int64_t d = f.head_dim;
    const bool any_hr = f.selected > 0;
    const Strides kv{.batch = f.kv_heads * f.keys * d, .head = f.keys * d, .row = d};
    const Strides kv_hr{.batch = 0, .head = d, .row = f.kv_heads * d};
    return {.dtype = dtype_of(f),
            .batch = f.batch,
            .heads = f.heads,
            .kv_heads = f.kv_heads,
            .queries = f.queries,
            .keys = f.keys,
            .head_dim = d,
            .scale = 1 / std::sqrt(static_cast<double>(d)),
            .softcap = f.softcap,
            .q = q_.as(),
            .k = k_.as(),
            .v = v_.as(),
            .q_strides = {.batch = f.heads * f.queries * d, .head = f.queries * d, .row = d},
            .k_strides = kv,
            .v_strides = kv,
            .kv_start = kv_start_.as<int32_t>(),
            .kv_len = kv_len_.as<int32_t>(),
            .key_mask = nullptr,
            .window = f.window,
            .ranges = f.bidirectional > 0,
            .bidirectional_ranges = f.bidirectional > 0 ? ranges_.as<int32_t>() : nullptr,
            .pool = f.batch * f.selected,
            .selected = f.selected,
            .k_hr = any_hr ? k_hr_.as() : nullptr,
            .v_hr = any_hr ? v_hr_.as() : nullptr,
            .k_hr_strides = kv_hr,
            .v_hr_strides = kv_hr,
            .hr_slots = any_hr ? hr_slots_.as<int32_t>() : nullptr,
            .hr_count = any_hr ? hr_count_.as<int32_t>() : nullptr,
            .rows = 1,
            .hr_from = any_hr ? hr_from_.as<int32_t>() : nullptr,
            .hr_rows = nullptr,
            .hr_row_bits = nullptr,
            .alpha = nullptr};
  }

  int64_t bidirectional_;
  Buffer q_, k_, v_, k_hr_, v_hr_, kv_start_, kv_len_, ranges_, hr_slots_, hr_count_, hr_from_, map_ranges_;
  Buffer out_, lse_, lse_seq_, map_;
  AttentionForwardParams params_;
  Buffer workspace_;
};

// Pairs of a query and a key of the sequence that it sees, in one head of one sample.
double sequence_pairs(const Flags& f) {
  double pairs = 0;
  for (int64_t position = f.keys - f.queries; position < f.keys; ++position) {
    const bool in_range = position < f.bidirectional;
    const int64_t begin = in_range || !f.window ? 0 : std::max<int64_t>(0, position + 1 - f.window);
    pairs += static_cast<double>((in_range ? f.bidirectional : position + 1) - begin);
  }
  return pairs;
}

Result attention(const Flags& f) {
  const AttentionCase attention(f);
  const int64_t hr_rows = f.hr_rows == "all" ? f.queries : 1;
  const double pairs = f.batch * f.heads * (sequence_pairs(f) + static_cast<double>(hr_rows * f.selected));
  return {attention.bytes(), 4.0 * f.head_dim * pairs, timed(f, [&] { attention.run(); })};
}

Result select(const Flags& f) {
  const int64_t cells = f.lr_side * f.lr_side, tokens = f.hr_side * f.hr_side;
  std::vector<float> values(f.batch * cells);
  std::mt19937 generator(1);
  for (float& x : values)
    x = std::pow(std::uniform_real_distribution<float>()(generator), 27.f);  // selects 6 % of the cells, pooled 40 %
  const auto squares = [&](int64_t side) {
    return on_device(std::vector<int32_t>(2 * f.batch, static_cast<int32_t>(side)));
  };
  const Buffer map = on_device(values), lr_grid = squares(f.lr_side), hr_grid = squares(f.hr_side);
  const Buffer pool_grid = squares(f.pool), chosen(2 * f.batch * words_for_bits(cells) * 4);
  const Buffer index(f.batch * tokens * 4), count(f.batch * 4), bits(f.batch * words_for_bits(tokens) * 4);
  const SelectTokensParams p{.dtype = DType::kFloat32,
                             .map = map.as(),
                             .lr_grid = lr_grid.as<int32_t>(),
                             .pool_grid = f.pool ? pool_grid.as<int32_t>() : nullptr,
                             .hr_grid = hr_grid.as<int32_t>(),
                             .valid_rect = nullptr,
                             .batch = f.batch,
                             .rows = 1,
                             .images = 1,
                             .cells = cells,
                             .hr_tokens = tokens,
                             .scale = 255.0,
                             .threshold = 48.0,
                             .chosen = chosen.as<int32_t>(),
                             .any_chosen = chosen.as<int32_t>() + f.batch * words_for_bits(cells),
                             .index = index.as<int32_t>(),
                             .count = count.as<int32_t>(),
                             .row_bits = bits.as<int32_t>()};
  const double bytes = map.bytes() + lr_grid.bytes() + hr_grid.bytes() + (f.pool ? pool_grid.bytes() : 0) +
                       index.bytes() + count.bytes() + bits.bytes();
  return {static_cast<double>(bytes), 0, timed(f, [&] { cuda::select_tokens(p, nullptr); })};
}

// Tokens spread evenly over the high-resolution grid, ascending: [B, M].
Buffer evenly_chosen(const Flags& f) {
  std::vector<int32_t> chosen(f.batch * f.selected);
  for (int64_t i = 0; i < f.batch * f.selected; ++i)
    chosen[i] = static_cast<int32_t>(i % f.selected * f.hr_side * f.hr_side / f.selected);
  return on_device(chosen);
}

Result gather(const Flags& f) {
  const int64_t B = f.batch, T = f.hr_side * f.hr_side, M = f.selected, D = f.heads * f.head_dim;
  const DType dtype = dtype_of(f);
  const Buffer tokens = random(B * T * D, dtype, 1), index = evenly_chosen(f), rows(B * M * D * size_of(dtype));
  const GatherTokensParams p{.element_size = static_cast<int64_t>(size_of(dtype)),
                             .batch = B,
                             .tokens = T,
                             .selected = M,
                             .channels = D,
                             .index = index.as<int32_t>(),
                             .source = tokens.as(),
                             .source_batch = T * D,
                             .source_row = D,
                             .result = rows.as()};
  return {2.0 * rows.bytes() + index.bytes(), 0, timed(f, [&] { cuda::gather_tokens(p, nullptr); })};
}

// After the first call every token has its slot, as in a decode step whose selection stays the same.
Result assign(const Flags& f) {
  const int64_t B = f.batch, T = f.hr_side * f.hr_side, M = f.selected;
  const Buffer index = evenly_chosen(f), count = on_device(std::vector<int32_t>(B, static_cast<int32_t>(M)));
  const Buffer table = on_device(std::vector<int32_t>(B * T, -1)), next_free = on_device(std::vector<int32_t>{0});
  const Buffer slots(B * M * 4), usable(B * 4), new_tokens(B * M * 4), new_slots(B * M * 4), new_count(4), overflow(4);
  const AssignSlotsParams p{.batch = B,
                            .prompts = B,
                            .tokens = T,
                            .selected = M,
                            .width = M,
                            .capacity = B * T,
                            .index = index.as<int32_t>(),
                            .count = count.as<int32_t>(),
                            .table = table.as<int32_t>(),
                            .table_batch = T,
                            .next_free = next_free.as<int32_t>(),
                            .slots = slots.as<int32_t>(),
                            .usable = usable.as<int32_t>(),
                            .new_tokens = new_tokens.as<int32_t>(),
                            .new_slots = new_slots.as<int32_t>(),
                            .new_count = new_count.as<int32_t>(),
                            .overflow = overflow.as<int32_t>()};
  const double bytes =
      2.0 * index.bytes() + slots.bytes() + new_tokens.bytes() + new_slots.bytes();  // index, and as much of the table
  return {bytes, 0, timed(f, [&] { cuda::assign_slots(p, nullptr); })};
}

Result write(const Flags& f) {
  const int64_t M = f.batch * f.selected, G = f.kv_heads, d = f.head_dim, row = G * d;
  const DType dtype = dtype_of(f);
  const Buffer k = random(M * row, dtype, 1), v = random(M * row, dtype, 2), cos = random(M * d, dtype, 3),
               sin = random(M * d, dtype, 4);
  const Buffer slots = ascending(M), k_pool(k.bytes()), v_pool(v.bytes());
  const Strides strides{0, d, row};
  const WriteHrKvParams p{.dtype = dtype,
                          .table_dtype = dtype,
                          .rows = M,
                          .heads = G,
                          .head_dim = d,
                          .pool = M,
                          .slots = slots.as<int32_t>(),
                          .k = k.as(),
                          .v = v.as(),
                          .k_pool = k_pool.as(),
                          .v_pool = v_pool.as(),
                          .k_strides = strides,
                          .v_strides = strides,
                          .k_pool_strides = strides,
                          .v_pool_strides = strides,
                          .cos = cos.as(),
                          .sin = sin.as(),
                          .cos_row = d,
                          .sin_row = d};
  const double bytes = 2.0 * (k.bytes() + v.bytes()) + cos.bytes() + sin.bytes() + slots.bytes();
  return {bytes, 0, timed(f, [&] { cuda::write_hr_kv(p, nullptr); })};
}

Result time_of(const Flags& f) {
  if (f.op == "attention") return attention(f);
  if (f.op == "select") return select(f);
  if (f.op == "gather") return gather(f);
  return f.op == "assign" ? assign(f) : write(f);
}

void report(const Flags& f, const Result& r, const Peaks& peaks) {
  const double median = r.microseconds[r.microseconds.size() / 2], seconds = median * 1e-6;
  const double gbs = r.bytes / seconds * 1e-9, tflops = r.flop / seconds * 1e-12;
  const double by_bytes = r.bytes / (peaks.gbs * 1e9), by_flop = r.flop > 0 ? r.flop / (peaks.tflops * 1e12) : 0;
  const bool known = peaks.gbs > 0 && (r.flop == 0 || peaks.tflops > 0);
  const double roofline = known ? std::max(by_bytes, by_flop) / seconds : NAN;
  const char* l2 = f.cold_l2 ? "cold" : "warm";

  std::printf("%s on %s, %s L2: %.2f us (%.2f to %.2f over %lld calls), %.1f GB/s, %.2f TFLOP/s, ", f.op.c_str(),
              peaks.device.c_str(), l2, median, r.microseconds.front(), r.microseconds.back(),
              static_cast<long long>(f.iterations), gbs, tflops);
  if (known)
    std::printf("%.1f %% of the roofline, which %s bounds\n", 100 * roofline,
                by_flop > by_bytes ? "arithmetic" : "memory");
  else
    std::printf("no roofline: give --peak-gbs and --peak-tflops for this GPU\n");
  std::printf("peaks: %s\n", peaks.how.c_str());
  std::printf(
      "op,device,dtype,path,batch,heads,kv_heads,queries,keys,selected,head_dim,hr_rows,window,bidirectional,"
      "softcap,lr_side,hr_side,pool,l2,iterations,median_us,min_us,max_us,gbs,tflops,roofline_fraction\n");
  std::printf(
      "%s,%s,%s,%s,%lld,%lld,%lld,%lld,%lld,%lld,%lld,%s,%lld,%lld,%g,%lld,%lld,%lld,%s,%lld,%.3f,%.3f,%.3f,%.2f,%.3f,%"
      ".4f\n",
      f.op.c_str(), peaks.device.c_str(),
      f.op == "select"   ? "fp32"
      : f.op == "assign" ? "int32"
                         : f.dtype.c_str(),
      f.path.c_str(), (long long)f.batch, (long long)f.heads, (long long)f.kv_heads, (long long)f.queries,
      (long long)f.keys, (long long)f.selected, (long long)f.head_dim, f.hr_rows.c_str(), (long long)f.window,
      (long long)f.bidirectional, f.softcap, (long long)f.lr_side, (long long)f.hr_side, (long long)f.pool, l2,
      (long long)f.iterations, median, r.microseconds.front(), r.microseconds.back(), gbs, tflops, roofline);
}

int run(const Flags& f) {
  int devices = 0;
  const cudaError_t found = cudaGetDeviceCount(&devices);
  if (found != cudaSuccess || devices == 0) {
    std::fprintf(stderr, "flexattn_bench: there is no GPU to run on: %s.\n",
                 found != cudaSuccess ? cudaGetErrorString(found) : "none was found");
    return 2;
  }
  int device = 0;
  check(cudaGetDevice(&device), "device");
  // The kernels choose by compute capability, which this lowers.
  if (f.path != "auto") setenv("FLEXATTN_CAPABILITY", f.path == "volta" ? "70" : "60", 1);
  Peaks peaks = peaks_of(device, f.dtype != "fp32");
  if (f.peak_gbs > 0) peaks.gbs = f.peak_gbs, peaks.how += "; given: " + std::to_string(f.peak_gbs) + " GB/s";
  if (f.peak_tflops > 0)
    peaks.tflops = f.peak_tflops, peaks.how += "; given: " + std::to_string(f.peak_tflops) + " TFLOP/s";
  report(f, time_of(f), peaks);
  return 0;
}

}  // namespace
}  // namespace flexattn::bench

int main(int count, char** words) {
  using namespace flexattn::bench;
  try {
    const Flags flags = parse(count, words);
    if (flags.help) return std::fputs(kHelp, stdout) < 0;
    return run(flags);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "flexattn_bench: %s\n", error.what());
    return 1;
  }
}
