// N x (N+M) attention, forward: tiles of logits and an online softmax; nothing has the size of the attention matrix.

#include <cmath>

#include "attention_tiles.h"

namespace flexattn::cpu {
namespace {

enum class Layout {
  kLanes,  // [columns, queries]: many queries, one per lane
  kRows,   // [queries, columns]: few queries, each a row of its own
};

// The online softmax of a tile of queries: logits of the current keys, max and sum so far, unnormalised output.
template <typename A, Layout layout>
class TileSoftmax {
 public:
  TileSoftmax(int64_t queries, int64_t d)
      : d_(d),
        count_(layout == Layout::kLanes ? padded(queries) : queries),
        queries_(count_ * d),
        logits_(count_ * kTileKeys),
        out_(count_ * d),
        row_max_(count_, -kInfinity<A>),
        row_sum_(count_) {}

  A& query(int64_t i, int64_t c) { return queries_[index(i, c, d_)]; }
  A& out(int64_t i, int64_t c) { return out_[index(i, c, d_)]; }
  A& row_max(int64_t i) { return row_max_[i]; }
  A& row_sum(int64_t i) { return row_sum_[i]; }
  A logit(int64_t i, int64_t j) const { return logits_[index(i, j, kTileKeys)]; }
  void hide(int64_t i, int64_t j) { logits_[index(i, j, kTileKeys)] = -kInfinity<A>; }

  void multiply_keys(Matrix<A> keys, int64_t n) {
    if constexpr (layout == Layout::kLanes)
      multiply<A>(keys.data, keys.ld, 1, queries_.data(), count_, logits_.data(), count_, n, count_, d_, false);
    else
      for (int64_t i = 0; i < count_; ++i) dot_rows(&query(i, 0), keys.data, keys.ld, n, d_, logits_of(i));
  }
  void cap(int64_t n, A softcap) {
    if constexpr (layout == Layout::kLanes)
      cap_logits<A>(logits_.data(), n * count_, softcap, nullptr);
    else
      for (int64_t i = 0; i < count_; ++i) cap_logits<A>(logits_of(i), n, softcap, nullptr);
  }
  void update(Matrix<A> values, int64_t n) {
    if constexpr (layout == Layout::kLanes) {
      softmax_step(logits_.data(), n, count_, row_max_.data(), row_sum_.data(), out_.data(), d_);
      multiply<A>(values.data, 1, values.ld, logits_.data(), count_, out_.data(), count_, d_, count_, n, true);
    } else {
      for (int64_t i = 0; i < count_; ++i)
        softmax_step_of_row(logits_of(i), n, &row_max_[i], &row_sum_[i], &out(i, 0), values.data, values.ld, d_);
    }
  }

 private:
  int64_t index(int64_t i, int64_t column, int64_t columns) const {
    return layout == Layout::kLanes ? column * count_ + i : i * columns + column;
  }
  A* logits_of(int64_t i) { return &logits_[i * kTileKeys]; }

  int64_t d_, count_;  // queries, padded in lanes
  std::vector<A> queries_, logits_, out_, row_max_, row_sum_;
};

template <typename A>
using ManyQueries = TileSoftmax<A, Layout::kLanes>;
template <typename A>
using FewQueries = TileSoftmax<A, Layout::kRows>;

template <typename T>
class Forward {
  using A = typename Accumulator<T>::type;

 public:
  explicit Forward(const AttentionForwardParams& params) : params_(params), in_(params.in), d_(params.in.head_dim) {}

  void run() {
    for (int64_t b = 0; b < in_.batch; ++b) hr_rows_.push_back(Sample{in_, b}.hr_rows());
    if (params_.images > 0) list_map_rows();
    const int64_t pairs = in_.batch * in_.kv_heads, rows = QueryRows{in_, 0, 0}.count();
    tile_per_query_.assign(pairs, true);  // a single query has a tile of its own anyway
    if (in_.queries > 1)
      for_each_task(pairs, [&](int64_t pair) {
        tile_per_query_[pair] = !Sample{in_, pair / in_.kv_heads}.template finite<T>(pair % in_.kv_heads);
      });
    const int64_t tiles = (rows + kTileQueries - 1) / kTileQueries;
    for_each_task(pairs * tiles, [&](int64_t task) {
      const int64_t tile = tiles - 1 - task / pairs;  // the last tiles see most keys, so they go first
      const QueryRows queries{in_, task % pairs / in_.kv_heads, task % pairs % in_.kv_heads};
      const int64_t end = std::min((tile + 1) * kTileQueries, rows);
      for (int64_t first = tile * kTileQueries, next; first < end; first = next) {
        next = std::min(end, queries.end_of_tile(first, tile_per_query_[task % pairs]));
        const int64_t count = next - first;
        count > kFewRows ? attend<ManyQueries<A>>(queries, first, count) : attend<FewQueries<A>>(queries, first, count);
      }
    });
    for_each_task(in_.batch * in_.rows * params_.images, [&](int64_t task) {
      const int64_t image = task % params_.images, row = task / params_.images;
      write_map(row / in_.rows, row % in_.rows, image);
    });
  }

 private:
  struct Scratch {
    std::vector<A> keys, values, clean;
  };

  // The values of a tile, with zeros for those that may be NaN and that its queries do not see.
  template <typename Hide>
  Matrix<A> seen_values(const QueryRows& queries, Matrix<A> values, int64_t n, Scratch& scratch,
                        const Hide& hide) const {
    if (!tile_per_query_[queries.b * in_.kv_heads + queries.kv_head]) return values;
    UnseenKeys unseen(n);
    hide(unseen);
    return unseen.cleared(values, d_, scratch.clean);
  }

  const T* query(int64_t b, int64_t head, int64_t n) const {
    const Strides& s = in_.q_strides;
    return static_cast<const T*>(in_.q) + b * s.batch + head * s.head + n * s.row;
  }
  static const T* of_head(const void* data, const Strides& s, int64_t b, int64_t kv_head) {
    return static_cast<const T*>(data) + b * s.batch + kv_head * s.head;
  }

  template <class State>
  void multiply_keys(State& state, Matrix<A> keys, int64_t n) const {
    state.multiply_keys(keys, n);
    if (in_.softcap > 0) state.cap(n, static_cast<A>(in_.softcap));
  }

  // One tile of queries: first the sequence, then, for those that see them, the HR keys.
  template <class State>
  void attend(const QueryRows& queries, int64_t first, int64_t rows) {
    const Sample sample{in_, queries.b};
    const auto query_of = [&](int64_t i) { return queries.query(first + i); };
    State plain(rows, d_);
    for (int64_t i = 0; i < rows; ++i) {
      const T* q = query(queries.b, queries.head(first + i), query_of(i));
      for (int64_t c = 0; c < d_; ++c) plain.query(i, c) = static_cast<A>(q[c]) * static_cast<A>(in_.scale);
    }
    Scratch scratch;
    const T* k = of_head(in_.k, in_.k_strides, queries.b, queries.kv_head);
    const T* v = of_head(in_.v, in_.v_strides, queries.b, queries.kv_head);
    const int64_t end = sample.keys_of(query_of(rows - 1)).end;
    for (int64_t j = sample.keys_of(query_of(0)).begin; j < end; j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, end - j), ks = in_.k_strides.row, vs = in_.v_strides.row;
      multiply_keys(plain, read_rows(k + j * ks, ks, nullptr, n, d_, scratch.keys), n);
      sample.hide_sequence_keys(plain, rows, query_of, j, n);
      if (params_.images > 0) keep_logits(queries, first, rows, plain, j, n);
      const Matrix<A> values = read_rows(v + j * vs, vs, nullptr, n, d_, scratch.values);
      const auto hide = [&](UnseenKeys& unseen) { sample.hide_sequence_keys(unseen, rows, query_of, j, n); };
      plain.update(seen_values(queries, values, n, scratch, hide), n);
    }

    for (int64_t i = 0; i < rows; ++i) write_row(queries, first + i, plain, i, log_sum_exp(plain, i));
    const std::vector<HrTileRow> hr_rows = hr_rows_of_tile(hr_rows_[queries.b], rows, query_of);
    const int64_t count = hr_rows.size();
    if (count > kFewRows)
      attend_hr<ManyQueries<A>>(queries, first, hr_rows, plain, scratch);
    else if (count > 0)
      attend_hr<FewQueries<A>>(queries, first, hr_rows, plain, scratch);
  }

  // The queries that see HR keys continue from the state that the sequence left.
  template <class State, class Plain>
  void attend_hr(const QueryRows& queries, int64_t first, const std::vector<HrTileRow>& hr_rows, Plain& plain,
                 Scratch& scratch) {
    const Sample sample{in_, queries.b};
    const int64_t rows = hr_rows.size();
    State full(rows, d_);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = hr_rows[i].row;
      full.row_max(i) = plain.row_max(row);
      full.row_sum(i) = plain.row_sum(row);
      for (int64_t c = 0; c < d_; ++c) {
        full.query(i, c) = plain.query(row, c);
        full.out(i, c) = plain.out(row, c);
      }
    }
    const T* k = of_head(in_.k_hr, in_.k_hr_strides, 0, queries.kv_head);
    const T* v = of_head(in_.v_hr, in_.v_hr_strides, 0, queries.kv_head);
    for (int64_t j = 0; j < sample.hr_keys(); j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, sample.hr_keys() - j);
      multiply_keys(full, read_rows(k, in_.k_hr_strides.row, sample.slots() + j, n, d_, scratch.keys), n);
      sample.hide_hr_keys(full, hr_rows, j, n);
      const Matrix<A> values = read_rows(v, in_.v_hr_strides.row, sample.slots() + j, n, d_, scratch.values);
      const auto hide = [&](UnseenKeys& unseen) { sample.hide_hr_keys(unseen, hr_rows, j, n); };
      full.update(seen_values(queries, values, n, scratch, hide), n);
    }

    const A alpha = static_cast<A>(sample.alpha());
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = hr_rows[i].row;
      if (alpha != A(1)) {
        const A of_plain = (A(1) - alpha) * full.row_sum(i) * inverse(plain.row_sum(row));
        for (int64_t c = 0; c < d_; ++c) full.out(i, c) = alpha * full.out(i, c) + of_plain * plain.out(row, c);
      }
      write_row(queries, first + row, full, i, log_sum_exp(plain, row));
    }
  }

  // The sum is 0 for a row that sees no key; a NaN must show.
  static A inverse(A sum) { return sum == 0 ? A(0) : A(1) / sum; }
  template <class State>
  static A log_sum_exp(State& state, int64_t i) {
    if (state.row_sum(i) == 0) return -kInfinity<A>;
    return state.row_max(i) + std::log(state.row_sum(i));
  }

  template <class State>
  void write_row(const QueryRows& queries, int64_t row, State& state, int64_t i, A lse_seq) {
    const int64_t n = queries.query(row), head = queries.head(row);
    T* out = static_cast<T*>(params_.out) + ((queries.b * in_.queries + n) * in_.heads + head) * d_;
    const A factor = inverse(state.row_sum(i));
    for (int64_t c = 0; c < d_; ++c) out[c] = static_cast<T>(factor == 0 ? A(0) : state.out(i, c) * factor);
    static_cast<A*>(params_.lse)[queries.statistic(row)] = log_sum_exp(state, i);
    static_cast<A*>(params_.lse_seq)[queries.statistic(row)] = lse_seq;
  }

  // ------------------------------------------------------------------------------------------------------- the map

  int64_t map_row(int64_t b, int64_t n) const { return map_rows_[b * in_.queries + n]; }
  void list_map_rows() {
    map_rows_.assign(in_.batch * in_.queries, -1);
    for (int64_t b = 0; b < in_.batch; ++b)
      for (int64_t r = 0; r < in_.rows; ++r)
        if (const int64_t n = in_.hr_rows ? in_.hr_rows[b * in_.rows + r] : in_.queries - 1; n >= 0)
          map_rows_[b * in_.queries + n] = r;
  }

  // Logits [S*S] of a row of the map in one head over one image, in the workspace [B, R, I, H, S*S].
  A* kept_logits(int64_t b, int64_t r, int64_t image, int64_t head) const {
    return static_cast<A*>(params_.workspace) +
           (((b * in_.rows + r) * params_.images + image) * in_.heads + head) * params_.map_size;
  }
  // Keys of an image: its first, and those that a query sees.
  struct Range {
    int64_t first, begin, end;
  };
  Range range_of(int64_t b, int64_t image, int64_t n) const {
    const int32_t* range = params_.map_ranges + (b * params_.images + image) * 2;
    const KeyInterval seen = Sample{in_, b}.keys_of(n);
    return {range[0], std::max<int64_t>(range[0], seen.begin), std::min<int64_t>(range[1], seen.end)};
  }

  template <class State>
  void keep_logits(const QueryRows& queries, int64_t first, int64_t rows, const State& state, int64_t j0,
                   int64_t keys) {
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t n = queries.query(first + i), r = map_row(queries.b, n);
      for (int64_t image = 0; r >= 0 && image < params_.images; ++image) {
        const Range range = range_of(queries.b, image, n);
        A* to = kept_logits(queries.b, r, image, queries.head(first + i)) - range.first;
        for (int64_t j = std::max(range.begin, j0); j < std::min(range.end, j0 + keys); ++j)
          to[j] = state.logit(i, j - j0);
      }
    }
  }

  // Sum the heads in their order.
  void write_map(int64_t b, int64_t r, int64_t image) {
    A* map = static_cast<A*>(params_.map) + ((b * in_.rows + r) * params_.images + image) * params_.map_size;
    std::fill_n(map, params_.map_size, A(0));
    const int64_t n = in_.hr_rows ? in_.hr_rows[b * in_.rows + r] : in_.queries - 1;
    if (n < 0) return;
    const Range range = range_of(b, image, n);
    for (int64_t head = 0; head < in_.heads && range.begin < range.end; ++head) {
      const A lse = static_cast<A*>(params_.map_over_all ? params_.lse
                                                         : params_.lse_seq)[(b * in_.heads + head) * in_.queries + n];
      if (lse == -kInfinity<A>) continue;
      A* probabilities = kept_logits(b, r, image, head) - range.first;
      exp_shifted(probabilities + range.begin, range.end - range.begin, lse);
      for (int64_t j = range.begin; j < range.end; ++j) map[j - range.first] += probabilities[j];
    }
  }

  const AttentionForwardParams& params_;
  const AttentionInputs& in_;
  const int64_t d_;
  std::vector<std::vector<HrRow>> hr_rows_;
  std::vector<int64_t> map_rows_;     // [B, N]: row of the map that a query has, or -1
  std::vector<char> tile_per_query_;  // [B, Hkv]: whether some keys or values may be infinite or NaN
};

}  // namespace

int64_t hierarchical_attention_workspace(const AttentionForwardParams& params, Stream) {
  const int64_t size = params.in.dtype == DType::kFloat64 ? sizeof(double) : sizeof(float);
  return params.in.batch * params.in.rows * params.images * params.in.heads * params.map_size * size;
}

void hierarchical_attention_forward(const AttentionForwardParams& params, Stream) {
  dispatch(params.in.dtype, [&](auto value) { Forward<decltype(value)>(params).run(); });
}

}  // namespace flexattn::cpu
