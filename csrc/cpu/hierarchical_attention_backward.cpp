// Gradients of N x (N+M) attention. Probabilities are recomputed from the log-sum-exps, tile by tile.
//
//   out_i  = sum_j w_ij v_j           w_ij  = (1 - alpha) P_seq + alpha P_full   (P_seq for a row that sees no HR key)
//   dv_j  += w_ij dout_i              dp_ij = dout_i . v_j
//   dk_j  += scale ds_ij q_i          ds_ij = (1 - alpha) P_seq (dp_ij - E_seq) + alpha P_full (dp_ij - E_full)
//   dq_i  += scale ds_ij k_j          E     = sum_j P_ij dp_ij
//
// Without alpha, E is dout_i . out_i. With it, out mixes two softmaxes, and a first pass over the tiles finds both E.
//
// With a softcap, ds_ij is multiplied by the derivative of the capped logit, 1 - tanh^2(logit / softcap).
//
// On the sequence keys P_full = share P_seq with share_i = exp(lse_seq_i - lse_i), so that both terms are one product
// with P_seq; on the HR keys there is only the second term.
//
// A task is one key/value head. It walks over the samples and tiles of queries in a fixed order, so that every sum has
// one order, including those into a pool slot that several samples share.

#include <cmath>

#include "attention_tiles.h"

namespace flexattn::cpu {
namespace {

// Queries handled together, in lanes: what their probabilities depend on, and the gradients.
template <typename A>
struct Tile {
  Tile(int64_t rows, int64_t d, A softcap)
      : rows(rows),
        d(d),
        softcap(softcap),
        lanes(padded(rows)),
        columns(padded(d)),
        queries(d * lanes),
        grads(d * lanes),
        grad_queries(d * lanes),
        query_rows(rows * columns),
        grad_rows(rows * columns),
        logits(kTileKeys * lanes),
        dp(kTileKeys * lanes),
        slopes(softcap > 0 ? kTileKeys * lanes : 0),
        lse(lanes, kInfinity<A>),
        weight(lanes),
        expectation(lanes) {}

  void set(int64_t i, int64_t c, A query, A grad) {
    queries[c * lanes + i] = query_rows[i * columns + c] = query;
    grads[c * lanes + i] = grad_rows[i * columns + c] = grad;
  }
  // For a row that sees no key, +inf makes every probability 0.
  void set_lse(int64_t i, A value) { lse[i] = value == -kInfinity<A> ? kInfinity<A> : value; }
  void hide(int64_t i, int64_t j) { logits[j * lanes + i] = -kInfinity<A>; }

  // logits = q k^T, capped, and dp = dout v^T, both [n, lanes]
  void multiply_keys(Matrix<A> keys, Matrix<A> values, int64_t n) {
    multiply<A>(keys.data, keys.ld, 1, queries.data(), lanes, logits.data(), lanes, n, lanes, d, false);
    multiply<A>(values.data, values.ld, 1, grads.data(), lanes, dp.data(), lanes, n, lanes, d, false);
    if (softcap > 0) cap_logits(logits.data(), n * lanes, softcap, slopes.data());
  }
  void add_to_expectation(int64_t n) {
    add_expectation(logits.data(), dp.data(), n, lanes, lse.data(), expectation.data());
  }
  // Replace logits by weights and dp by ds.
  void differentiate(int64_t n) {
    logit_gradients(logits.data(), dp.data(), n, lanes, lse.data(), weight.data(), expectation.data());
    for (int64_t i = 0; softcap > 0 && i < n * lanes; ++i) dp[i] *= slopes[i];
  }
  // dv += w^T dout, dk += ds^T q; both are [n, columns].
  void add_key_gradients(int64_t n, A* grad_k, A* grad_v) const {
    multiply<A>(logits.data(), lanes, 1, grad_rows.data(), columns, grad_v, columns, n, columns, rows, true);
    multiply<A>(dp.data(), lanes, 1, query_rows.data(), columns, grad_k, columns, n, columns, rows, true);
  }
  // dq += ds k
  void add_query_gradients(Matrix<A> keys, int64_t n) {
    multiply<A>(keys.data, 1, keys.ld, dp.data(), lanes, grad_queries.data(), lanes, d, lanes, n, true);
  }

  int64_t rows, d;
  A softcap;
  int64_t lanes, columns;
  std::vector<A> queries, grads, grad_queries;  // [d, lanes]; queries are multiplied by the scale
  std::vector<A> query_rows, grad_rows;         // [rows, columns]: the same, transposed
  std::vector<A> logits, dp, slopes;            // [keys, lanes]; slopes: derivatives of the capped logits
  std::vector<A> lse, weight, expectation;      // [lanes]
};

template <typename T>
class Backward {
  using A = typename Accumulator<T>::type;

 public:
  explicit Backward(const AttentionBackwardParams& params)
      : params_(params), in_(params.in), d_(params.in.head_dim), columns_(padded(d_)) {}

  void run() {
    for (int64_t b = 0; b < in_.batch; ++b) hr_rows_.push_back(Sample{in_, b}.hr_rows());
    for_each_task(in_.kv_heads, [&](int64_t kv_head) { walk(kv_head); });
  }

 private:
  struct Scratch {
    bool tile_per_query;  // some keys or values are infinite or NaN
    std::vector<A> keys, values, clean_keys, clean_values;
  };
  struct KeysAndValues {
    Matrix<A> keys, values;
  };
  struct KeyGradients {
    bool wanted;
    std::vector<A> k, v;  // [keys, columns]
    KeyGradients(bool wanted, int64_t size) : wanted(wanted), k(wanted ? size : 0), v(wanted ? size : 0) {}
  };

  void walk(int64_t kv_head) {
    KeyGradients pool(params_.grad_k_hr, in_.pool * columns_);
    for (int64_t b = 0; b < in_.batch; ++b) {
      const Sample sample{in_, b};
      const QueryRows queries{in_, b, kv_head};
      KeyGradients sequence(params_.grad_k, in_.keys * columns_), hr(pool.wanted, sample.hr_keys() * columns_);
      Scratch scratch{!sample.template finite<T>(kv_head)};
      for (int64_t first = 0, next; first < queries.count(); first = next) {
        next = queries.end_of_tile(first, scratch.tile_per_query);
        tile(sample, queries, first, next - first, scratch, sequence, hr);
      }
      for (int64_t m = 0; pool.wanted && m < sample.hr_keys(); ++m)
        for (int64_t c = 0; c < columns_; ++c) {
          pool.k[sample.slots()[m] * columns_ + c] += hr.k[m * columns_ + c];
          pool.v[sample.slots()[m] * columns_ + c] += hr.v[m * columns_ + c];
        }
      write(sequence, (b * in_.kv_heads + kv_head) * in_.keys, 1, in_.keys, params_.grad_k, params_.grad_v);
    }
    write(pool, kv_head, in_.kv_heads, in_.pool, params_.grad_k_hr, params_.grad_v_hr);
  }

  // Write the gradients of `keys` keys to the rows first, first + step, ...
  void write(const KeyGradients& from, int64_t first, int64_t step, int64_t keys, void* to_k, void* to_v) const {
    for (int64_t j = 0; from.wanted && j < keys; ++j) {
      const int64_t at = (first + j * step) * d_;
      write(&from.k[j * columns_], static_cast<T*>(to_k) + at);
      write(&from.v[j * columns_], static_cast<T*>(to_v) + at);
    }
  }
  void write(const A* from, T* to) const {
    for (int64_t c = 0; c < d_; ++c) to[c] = static_cast<T>(from[c]);
  }

  void tile(const Sample& sample, const QueryRows& queries, int64_t first, int64_t rows, Scratch& scratch,
            KeyGradients& sequence, KeyGradients& hr) {
    Tile<A> all = read_tile(queries, first, rows);
    const std::vector<HrTileRow> hr_rows =
        hr_rows_of_tile(hr_rows_[sample.b], rows, [&](int64_t i) { return queries.query(first + i); });
    Tile<A> seeing = rows_seeing_hr(all, queries, first, hr_rows);

    std::fill_n(all.weight.begin(), rows, A(1));
    if (params_.out) {
      read_expectations(queries, first, all);
    } else {
      walk_sequence(sample, queries, first, all, scratch, nullptr);
      walk_hr(sample, queries.kv_head, hr_rows, seeing, scratch, nullptr);
    }
    mix_expectations(static_cast<A>(sample.alpha()), hr_rows, all, seeing);
    if (params_.grad_q || hr.wanted) walk_hr(sample, queries.kv_head, hr_rows, seeing, scratch, &hr);
    if (params_.grad_q || sequence.wanted) walk_sequence(sample, queries, first, all, scratch, &sequence);
    if (!params_.grad_q) return;

    for (size_t i = 0; i < hr_rows.size(); ++i)
      for (int64_t c = 0; c < d_; ++c)
        all.grad_queries[c * all.lanes + hr_rows[i].row] += seeing.grad_queries[c * seeing.lanes + i];
    write_grad_queries(queries, first, all);
  }

  // Without alpha: the expectation over all the keys of each row.
  void read_expectations(const QueryRows& queries, int64_t first, Tile<A>& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      const int64_t at = (queries.b * in_.queries + queries.query(first + i)) * in_.heads + queries.head(first + i);
      const T* out = static_cast<const T*>(params_.out) + at * d_;
      for (int64_t c = 0; c < d_; ++c) tile.expectation[i] += tile.grad_rows[i * columns_ + c] * static_cast<A>(out[c]);
    }
  }

  // Find the weights and expectations of the gradient for the rows that see HR keys. What is known of `all` is the
  // expectation over the sequence, and of `seeing` the rest of that over all keys; or, of `all`, that over all keys.
  void mix_expectations(A alpha, const std::vector<HrTileRow>& hr_rows, Tile<A>& all, Tile<A>& seeing) const {
    for (size_t i = 0; i < hr_rows.size(); ++i) {
      const int64_t row = hr_rows[i].row;
      const A share = std::isinf(all.lse[row]) ? A(0) : std::exp(all.lse[row] - seeing.lse[i]);
      const A e_seq = all.expectation[row], e_full = params_.out ? e_seq : seeing.expectation[i] + share * e_seq;
      all.weight[row] = (A(1) - alpha) + alpha * share;
      all.expectation[row] = (A(1) - alpha) * e_seq + alpha * share * e_full;
      seeing.weight[i] = alpha;
      seeing.expectation[i] = alpha * e_full;
    }
  }

  void write_grad_queries(const QueryRows& queries, int64_t first, const Tile<A>& tile) const {
    for (int64_t i = 0; i < tile.rows; ++i) {
      T* grad_q = static_cast<T*>(params_.grad_q) + queries.statistic(first + i) * d_;
      for (int64_t c = 0; c < d_; ++c)
        grad_q[c] = static_cast<T>(tile.grad_queries[c * tile.lanes + i] * static_cast<A>(in_.scale));
    }
  }

  Tile<A> read_tile(const QueryRows& queries, int64_t first, int64_t rows) const {
    Tile<A> tile(rows, d_, static_cast<A>(in_.softcap));
    const Strides &qs = in_.q_strides, &gs = params_.grad_out_strides;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t head = queries.head(first + i), n = queries.query(first + i);
      const T* q = static_cast<const T*>(in_.q) + queries.b * qs.batch + head * qs.head + n * qs.row;
      const T* grad = static_cast<const T*>(params_.grad_out) + queries.b * gs.batch + head * gs.head + n * gs.row;
      for (int64_t c = 0; c < d_; ++c)
        tile.set(i, c, static_cast<A>(q[c]) * static_cast<A>(in_.scale), static_cast<A>(grad[c]));
      tile.set_lse(i, static_cast<const A*>(params_.lse_seq)[queries.statistic(first + i)]);
    }
    return tile;
  }

  // The rows of a tile that see HR keys, with the log-sum-exp over all their keys.
  Tile<A> rows_seeing_hr(const Tile<A>& tile, const QueryRows& queries, int64_t first,
                         const std::vector<HrTileRow>& hr_rows) const {
    Tile<A> result(hr_rows.size(), d_, static_cast<A>(in_.softcap));
    for (size_t i = 0; i < hr_rows.size(); ++i) {
      const int64_t row = hr_rows[i].row;
      for (int64_t c = 0; c < d_; ++c)
        result.set(i, c, tile.query_rows[row * columns_ + c], tile.grad_rows[row * columns_ + c]);
      result.set_lse(i, static_cast<const A*>(params_.lse)[queries.statistic(first + row)]);
    }
    return result;
  }

  // Multiply n keys and values with the tile, and hide those that its queries do not see. Return the keys as they were
  // multiplied: with zeros for those that may be NaN and are not seen.
  template <typename Hide>
  Matrix<A> multiply_keys(KeysAndValues read, int64_t n, Scratch& scratch, Tile<A>& tile, const Hide& hide) const {
    if (scratch.tile_per_query) {
      UnseenKeys unseen(n);
      hide(unseen);
      read = {unseen.cleared(read.keys, d_, scratch.clean_keys), unseen.cleared(read.values, d_, scratch.clean_values)};
    }
    tile.multiply_keys(read.keys, read.values, n);
    hide(tile);
    return read.keys;
  }

  // Walk over the tiles of keys; sum the expectation or, if `grads` is given, the gradients.
  void walk_sequence(const Sample& sample, const QueryRows& queries, int64_t first, Tile<A>& tile, Scratch& scratch,
                     KeyGradients* grads) {
    const auto query_of = [&](int64_t i) { return queries.query(first + i); };
    const Strides &ks = in_.k_strides, &vs = in_.v_strides;
    const T* k = static_cast<const T*>(in_.k) + sample.b * ks.batch + queries.kv_head * ks.head;
    const T* v = static_cast<const T*>(in_.v) + sample.b * vs.batch + queries.kv_head * vs.head;
    const int64_t end = sample.keys_of(query_of(tile.rows - 1)).end;
    for (int64_t j = sample.keys_of(query_of(0)).begin; j < end; j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, end - j);
      const KeysAndValues read{read_rows(k + j * ks.row, ks.row, nullptr, n, d_, scratch.keys),
                               read_rows(v + j * vs.row, vs.row, nullptr, n, d_, scratch.values)};
      const Matrix<A> keys = multiply_keys(
          read, n, scratch, tile, [&](auto& hidden) { sample.hide_sequence_keys(hidden, tile.rows, query_of, j, n); });
      add(tile, keys, j, n, grads);
    }
  }

  void walk_hr(const Sample& sample, int64_t kv_head, const std::vector<HrTileRow>& hr_rows, Tile<A>& tile,
               Scratch& scratch, KeyGradients* grads) {
    if (hr_rows.empty()) return;
    const T* k = static_cast<const T*>(in_.k_hr) + kv_head * in_.k_hr_strides.head;
    const T* v = static_cast<const T*>(in_.v_hr) + kv_head * in_.v_hr_strides.head;
    for (int64_t j = 0; j < sample.hr_keys(); j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, sample.hr_keys() - j);
      const int32_t* slots = sample.slots() + j;
      const KeysAndValues read{read_rows(k, in_.k_hr_strides.row, slots, n, d_, scratch.keys),
                               read_rows(v, in_.v_hr_strides.row, slots, n, d_, scratch.values)};
      const Matrix<A> keys =
          multiply_keys(read, n, scratch, tile, [&](auto& hidden) { sample.hide_hr_keys(hidden, hr_rows, j, n); });
      add(tile, keys, j, n, grads);
    }
  }

  // Add what the keys j .. j + n - 1 contribute, to the expectation or to the gradients that are wanted.
  void add(Tile<A>& tile, Matrix<A> keys, int64_t j, int64_t n, KeyGradients* grads) const {
    if (!grads) return tile.add_to_expectation(n);
    tile.differentiate(n);
    if (grads->wanted) tile.add_key_gradients(n, &grads->k[j * columns_], &grads->v[j * columns_]);
    if (params_.grad_q) tile.add_query_gradients(keys, n);
  }

  const AttentionBackwardParams& params_;
  const AttentionInputs& in_;
  const int64_t d_, columns_;
  std::vector<std::vector<HrRow>> hr_rows_;
};

}  // namespace

void hierarchical_attention_backward(const AttentionBackwardParams& params, Stream) {
  dispatch(params.in.dtype, [&](auto value) { Backward<decltype(value)>(params).run(); });
}

}  // namespace flexattn::cpu
