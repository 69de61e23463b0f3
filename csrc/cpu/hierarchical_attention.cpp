// N x (N+M) attention, forward: tiles of logits, an online softmax, and nothing of the size of the attention matrix.

#include "attention_tiles.h"

namespace flexattn::cpu {
namespace {

// Running softmax of some query rows: largest logit, sum of exponentials, and the unnormalised output.
template <typename A>
struct OnlineSoftmax {
  std::vector<A> largest, sum, out;
  int64_t d;

  OnlineSoftmax(int64_t rows, int64_t d)
      : largest(rows, -std::numeric_limits<A>::infinity()), sum(rows, 0), out(rows * d, 0), d(d) {}

  // Takes in a tile of logits [rows, n], which become weights, and the values [n, d] of its keys.
  void absorb(A* logits, int64_t rows, int64_t n, Matrix<A> values) {
    for (int64_t i = 0; i < rows; ++i) {
      A* row = logits + i * n;
      const A highest = std::max(largest[i], max_of(row, n));
      if (highest == -std::numeric_limits<A>::infinity()) {  // nothing seen so far: exp(-inf - -inf) is no number
        std::fill(row, row + n, A(0));
        continue;
      }
      if (highest > largest[i]) {
        const A shrink = std::exp(largest[i] - highest);
        sum[i] *= shrink;
        for (int64_t c = 0; c < d; ++c) out[i * d + c] *= shrink;
        largest[i] = highest;
      }
      sum[i] += exp_and_sum(row, n, highest);
    }
    add_product<A>({logits, n}, rows, values, n, d, out.data(), d);
  }

  A log_sum_exp(int64_t i) const {
    return sum[i] > 0 ? largest[i] + std::log(sum[i]) : -std::numeric_limits<A>::infinity();
  }
  A normalised(int64_t i, int64_t c) const { return sum[i] > 0 ? out[i * d + c] / sum[i] : A(0); }
};

template <typename T>
class Forward {
  using A = typename Accumulator<T>::type;

 public:
  explicit Forward(const AttentionForwardParams& params) : params_(params), in_(params.in) {}

  void run() {
    hr_rows_.resize(in_.batch);
    for (int64_t b = 0; b < in_.batch; ++b) hr_rows_[b] = hr_rows_of({in_, b});
    const int64_t tiles = (in_.queries + kTileQueries - 1) / kTileQueries;
    at::parallel_for(0, in_.batch * in_.heads * tiles, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      for (int64_t task = begin; task < end; ++task)
        attend(task / tiles / in_.heads, task / tiles % in_.heads, task % tiles * kTileQueries);
    });
    if (params_.pictures > 0)
      at::parallel_for(0, in_.batch * in_.rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) map_row(task / in_.rows, task % in_.rows);
      });
  }

 private:
  const T* key_head(const void* data, const Strides& s, int64_t b, int64_t head) const {
    return static_cast<const T*>(data) + b * s.batch + head / (in_.heads / in_.kv_heads) * s.head;
  }
  const T* query(int64_t b, int64_t head, int64_t n) const {
    const Strides& s = in_.q_strides;
    return static_cast<const T*>(in_.q) + b * s.batch + head * s.head + n * s.row;
  }

  // One tile of queries of one head.
  void attend(int64_t b, int64_t head, int64_t first) {
    const Sample sample{in_, b};
    const int64_t rows = std::min(kTileQueries, in_.queries - first), d = in_.head_dim;
    const A scale = static_cast<A>(in_.scale);
    std::vector<A> q_scratch, k_scratch, v_scratch;
    const Matrix<A> q = read_rows<T, A>(query(b, head, first), in_.q_strides.row, rows, d, q_scratch);

    OnlineSoftmax<A> plain(rows, d);
    std::vector<A> logits(rows * kTileKeys);
    const T* k = key_head(in_.k, in_.k_strides, b, head);
    const T* v = key_head(in_.v, in_.v_strides, b, head);
    const int64_t end = sample.end_of_keys(first + rows);
    for (int64_t j = sample.first_key(); j < end; j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, end - j);
      const Matrix<A> keys = read_rows<T, A>(k + j * in_.k_strides.row, in_.k_strides.row, n, d, k_scratch);
      const Matrix<A> values = read_rows<T, A>(v + j * in_.v_strides.row, in_.v_strides.row, n, d, v_scratch);
      multiply_transposed(q, rows, keys, n, d, scale, logits.data(), n);
      if (sample.hides(first, j, n)) sample.mask_sequence(logits.data(), n, first, rows, j, n);
      plain.absorb(logits.data(), rows, n, values);
    }
    for (int64_t i = 0; i < rows; ++i) write_row(b, head, first + i, plain, i, plain.log_sum_exp(i), plain.log_sum_exp(i));
    attend_hr(sample, head, first, rows, q, plain);
  }

  // The rows of the tile that see HR keys go on from where the sequence left them.
  void attend_hr(const Sample& sample, int64_t head, int64_t first, int64_t rows, Matrix<A> q, const OnlineSoftmax<A>& plain) {
    const auto& all = hr_rows_[sample.b];
    const auto before = [](const HrRow& row, int64_t n) { return row.query < n; };
    const auto begin = std::lower_bound(all.begin(), all.end(), first, before);
    const auto end = std::lower_bound(begin, all.end(), first + rows, before);
    const int64_t count = end - begin, d = in_.head_dim, b = sample.b;
    if (count == 0) return;

    OnlineSoftmax<A> full(count, d);
    std::vector<A> queries(count * d), logits(count * kTileKeys), k_scratch, v_scratch;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t local = begin[i].query - first;
      std::copy_n(q.data + local * q.ld, d, queries.data() + i * d);
      std::copy_n(plain.out.data() + local * d, d, full.out.data() + i * d);
      full.largest[i] = plain.largest[local];
      full.sum[i] = plain.sum[local];
    }
    const int64_t group = head / (in_.heads / in_.kv_heads);
    const T* k = static_cast<const T*>(in_.k_hr) + group * in_.k_hr_strides.head;
    const T* v = static_cast<const T*>(in_.v_hr) + group * in_.v_hr_strides.head;
    for (int64_t j = 0; j < sample.hr_keys(); j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, sample.hr_keys() - j);
      const Matrix<A> keys = read_slots<T, A>(k, in_.k_hr_strides.row, sample.slots() + j, n, d, k_scratch);
      const Matrix<A> values = read_slots<T, A>(v, in_.v_hr_strides.row, sample.slots() + j, n, d, v_scratch);
      multiply_transposed<A>({queries.data(), d}, count, keys, n, d, static_cast<A>(in_.scale), logits.data(), n);
      for (int64_t i = 0; i < count; ++i) mask_hr(logits.data() + i * n, sample.row_bits(begin[i].listed), j, n);
      full.absorb(logits.data(), count, n, values);
    }

    const A alpha = static_cast<A>(sample.alpha());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t local = begin[i].query - first;
      if (alpha != A(1))
        for (int64_t c = 0; c < d; ++c)
          full.out[i * d + c] =
              full.sum[i] * (alpha * full.normalised(i, c) + (A(1) - alpha) * plain.normalised(local, c));
      write_row(b, head, begin[i].query, full, i, full.log_sum_exp(i), plain.log_sum_exp(local));
    }
  }

  void write_row(int64_t b, int64_t head, int64_t n, const OnlineSoftmax<A>& state, int64_t i, A lse, A lse_seq) {
    T* out = static_cast<T*>(params_.out) + ((b * in_.queries + n) * in_.heads + head) * in_.head_dim;
    for (int64_t c = 0; c < in_.head_dim; ++c) out[c] = static_cast<T>(state.normalised(i, c));
    const int64_t at = (b * in_.heads + head) * in_.queries + n;
    static_cast<A*>(params_.lse)[at] = lse;
    static_cast<A*>(params_.lse_seq)[at] = lse_seq;
  }

  // The map of one row: its logits over the pictures' keys once more, and the heads summed in their order.
  void map_row(int64_t b, int64_t r) {
    const Sample sample{in_, b};
    const int64_t size = params_.map_size, d = in_.head_dim;
    A* map = static_cast<A*>(params_.map) + (b * in_.rows + r) * params_.pictures * size;
    std::fill_n(map, params_.pictures * size, A(0));
    const int64_t n = in_.hr_rows ? in_.hr_rows[b * in_.rows + r] : in_.queries - 1;
    if (n < 0) return;
    std::vector<A> q_scratch, k_scratch, row(size);
    for (int64_t picture = 0; picture < params_.pictures; ++picture) {
      const int32_t* range = params_.map_ranges + (b * params_.pictures + picture) * 2;
      const int64_t begin = range[0], count = std::min<int64_t>(range[1] - range[0], size);
      if (count <= 0) continue;
      for (int64_t head = 0; head < in_.heads; ++head) {
        const int64_t at = (b * in_.heads + head) * in_.queries + n;
        const A lse = static_cast<A*>(params_.map_over_all ? params_.lse : params_.lse_seq)[at];
        if (lse == -std::numeric_limits<A>::infinity()) continue;
        const Matrix<A> q = read_rows<T, A>(query(b, head, n), in_.q_strides.row, 1, d, q_scratch);
        const T* k = key_head(in_.k, in_.k_strides, b, head) + begin * in_.k_strides.row;
        const Matrix<A> keys = read_rows<T, A>(k, in_.k_strides.row, count, d, k_scratch);
        multiply_transposed(q, 1, keys, count, d, static_cast<A>(in_.scale), row.data(), count);
        sample.mask_sequence(row.data(), count, n, 1, begin, count);
        for (int64_t j = 0; j < std::min(count, sample.first_key() - begin); ++j)
          row[j] = -std::numeric_limits<A>::infinity();
        exp_and_sum(row.data(), count, lse);
        for (int64_t j = 0; j < count; ++j) map[picture * size + j] += row[j];
      }
    }
  }

  const AttentionForwardParams& params_;
  const AttentionInputs& in_;
  std::vector<std::vector<HrRow>> hr_rows_;
};

}  // namespace

int64_t hierarchical_attention_workspace(const AttentionForwardParams&, Stream) { return 0; }

void hierarchical_attention_forward(const AttentionForwardParams& params, Stream) {
  dispatch(params.in.dtype, [&](auto value) { Forward<decltype(value)>(params).run(); });
}

}  // namespace flexattn::cpu
