// Gradients of N x (N+M) attention. Probabilities are computed again from the log-sum-exps, tile by tile.
//
//   out_i = sum_j w_ij v_j          w = (1 - alpha) P_seq + alpha P_full      (alpha = 1 without mixing; P_seq alone
//   dv_j += w_ij dout_i                                                        for a row that sees no HR key)
//   ds_ij = (1 - alpha) P_seq (dp_ij - D_seq) + alpha P_full (dp_ij - D_full) with dp_ij = dout_i . v_j
//   D     = sum_j P_ij dp_ij, found in a first pass over the tiles
//
// A task is one key/value head; it walks over the samples and its query heads in a fixed order, so that every sum,
// also into a slot of the pool that several samples share, has one order.

#include "attention_tiles.h"

namespace flexattn::cpu {
namespace {

template <typename T>
class Backward {
  using A = typename Accumulator<T>::type;
  static constexpr A kNothing = -std::numeric_limits<A>::infinity();

 public:
  explicit Backward(const AttentionBackwardParams& params) : params_(params), in_(params.in), d_(params.in.head_dim) {}

  void run() {
    at::parallel_for(0, in_.kv_heads, 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      for (int64_t group = begin; group < end; ++group) key_head(group);
    });
  }

 private:
  // Query rows handled together: their gradients and what their probabilities are made of.
  struct Tile {
    int64_t rows;
    std::vector<A> q_scratch, grad_scratch;
    std::vector<A> queries, grads;            // only where the rows are not neighbours
    Matrix<A> q, grad_out;                    // [rows, d]
    std::vector<A> lse_seq, lse;              // +inf where there is nothing to see, so that exp gives 0
    std::vector<A> d_seq, d_full;
    std::vector<A> plain_weight, full_weight; // 1 - alpha and alpha, or 1 and 0 for a row without HR keys
    std::vector<A> grad_q;                    // [rows, d]
  };
  struct Scratch {
    std::vector<A> keys, values, logits, dp, weights;
  };

  void key_head(int64_t group) {
    const int64_t heads_per_group = in_.heads / in_.kv_heads;
    std::vector<A> grad_k_hr(in_.k_hr ? in_.pool * d_ : 0, 0), grad_v_hr(grad_k_hr);
    for (int64_t b = 0; b < in_.batch; ++b) {
      const Sample sample{in_, b};
      const std::vector<HrRow> hr_rows = hr_rows_of(sample);
      std::vector<A> grad_k(in_.keys * d_, 0), grad_v(in_.keys * d_, 0);
      for (int64_t h = 0; h < heads_per_group; ++h)
        for (int64_t first = 0; first < in_.queries; first += kTileQueries)
          query_tile(sample, group, group * heads_per_group + h, first, hr_rows, grad_k, grad_v, grad_k_hr, grad_v_hr);
      const int64_t at = (b * in_.kv_heads + group) * in_.keys * d_;
      std::copy(grad_k.begin(), grad_k.end(), static_cast<T*>(params_.grad_k) + at);
      std::copy(grad_v.begin(), grad_v.end(), static_cast<T*>(params_.grad_v) + at);
    }
    for (int64_t slot = 0; in_.k_hr && slot < in_.pool; ++slot) {
      const int64_t at = (slot * in_.kv_heads + group) * d_;
      std::copy_n(grad_k_hr.begin() + slot * d_, d_, static_cast<T*>(params_.grad_k_hr) + at);
      std::copy_n(grad_v_hr.begin() + slot * d_, d_, static_cast<T*>(params_.grad_v_hr) + at);
    }
  }

  void query_tile(const Sample& sample, int64_t group, int64_t head, int64_t first, const std::vector<HrRow>& all_hr_rows,
                  std::vector<A>& grad_k, std::vector<A>& grad_v, std::vector<A>& grad_k_hr, std::vector<A>& grad_v_hr) {
    const int64_t b = sample.b, rows = std::min(kTileQueries, in_.queries - first);
    Tile tile = read_tile(b, head, first, rows);
    const auto before = [](const HrRow& row, int64_t n) { return row.query < n; };
    const auto begin = std::lower_bound(all_hr_rows.begin(), all_hr_rows.end(), first, before);
    const auto end = std::lower_bound(begin, all_hr_rows.end(), first + rows, before);
    const std::vector<HrRow> hr_rows(begin, end);
    const A alpha = static_cast<A>(sample.alpha());
    for (const HrRow& row : hr_rows) {
      tile.plain_weight[row.query - first] = A(1) - alpha;
      tile.full_weight[row.query - first] = alpha;
    }
    Tile hr = hr_part(tile, hr_rows, first);

    Scratch scratch;
    const bool two_passes[] = {false, true};
    for (const bool gradients : two_passes) {
      sequence_pass(sample, head, first, tile, scratch, gradients, grad_k, grad_v);
      if (!gradients)
        for (size_t i = 0; i < hr_rows.size(); ++i) hr.d_full[i] = tile.d_full[hr_rows[i].query - first];
      if (!hr_rows.empty()) hr_pass(sample, group, hr_rows, hr, scratch, gradients, grad_k_hr, grad_v_hr);
      if (!gradients)
        for (size_t i = 0; i < hr_rows.size(); ++i) tile.d_full[hr_rows[i].query - first] = hr.d_full[i];
    }
    for (size_t i = 0; i < hr_rows.size(); ++i)
      for (int64_t c = 0; c < d_; ++c) tile.grad_q[(hr_rows[i].query - first) * d_ + c] += hr.grad_q[i * d_ + c];
    T* grad_q = static_cast<T*>(params_.grad_q) + ((b * in_.heads + head) * in_.queries + first) * d_;
    std::copy(tile.grad_q.begin(), tile.grad_q.end(), grad_q);
  }

  Tile read_tile(int64_t b, int64_t head, int64_t first, int64_t rows) {
    Tile tile = empty_tile(rows);
    const Strides &qs = in_.q_strides, &gs = params_.grad_out_strides;
    const T* q = static_cast<const T*>(in_.q) + b * qs.batch + head * qs.head + first * qs.row;
    const T* grad = static_cast<const T*>(params_.grad_out) + b * gs.batch + head * gs.head + first * gs.row;
    tile.q = read_rows<T, A>(q, qs.row, rows, d_, tile.q_scratch);
    tile.grad_out = read_rows<T, A>(grad, gs.row, rows, d_, tile.grad_scratch);
    const int64_t at = (b * in_.heads + head) * in_.queries + first;
    for (int64_t i = 0; i < rows; ++i) {
      tile.lse_seq[i] = finite_shift(static_cast<const A*>(params_.lse_seq)[at + i]);
      tile.lse[i] = finite_shift(static_cast<const A*>(params_.lse)[at + i]);
    }
    return tile;
  }

  Tile empty_tile(int64_t rows) const {
    Tile tile;
    tile.rows = rows;
    for (auto* part : {&tile.lse_seq, &tile.lse, &tile.d_seq, &tile.d_full, &tile.full_weight}) part->assign(rows, 0);
    tile.plain_weight.assign(rows, 1);
    tile.grad_q.assign(rows * d_, 0);
    return tile;
  }

  // The tile's rows that see HR keys, side by side.
  Tile hr_part(const Tile& tile, const std::vector<HrRow>& hr_rows, int64_t first) const {
    Tile part = empty_tile(hr_rows.size());
    part.queries.resize(part.rows * d_);
    part.grads.resize(part.rows * d_);
    for (int64_t i = 0; i < part.rows; ++i) {
      const int64_t local = hr_rows[i].query - first;
      std::copy_n(tile.q.data + local * tile.q.ld, d_, part.queries.data() + i * d_);
      std::copy_n(tile.grad_out.data + local * tile.grad_out.ld, d_, part.grads.data() + i * d_);
      part.lse[i] = tile.lse[local];
      part.full_weight[i] = tile.full_weight[local];
    }
    part.q = {part.queries.data(), d_};
    part.grad_out = {part.grads.data(), d_};
    return part;
  }

  static A finite_shift(A lse) { return lse == kNothing ? std::numeric_limits<A>::infinity() : lse; }

  void sequence_pass(const Sample& sample, int64_t head, int64_t first, Tile& tile, Scratch& s, bool gradients,
                     std::vector<A>& grad_k, std::vector<A>& grad_v) {
    const int64_t b = sample.b, group = head / (in_.heads / in_.kv_heads);
    const Strides &ks = in_.k_strides, &vs = in_.v_strides;
    const T* k = static_cast<const T*>(in_.k) + b * ks.batch + group * ks.head;
    const T* v = static_cast<const T*>(in_.v) + b * vs.batch + group * vs.head;
    const int64_t end = sample.end_of_keys(first + tile.rows);
    for (int64_t j = sample.first_key(); j < end; j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, end - j);
      const Matrix<A> keys = read_rows<T, A>(k + j * ks.row, ks.row, n, d_, s.keys);
      const Matrix<A> values = read_rows<T, A>(v + j * vs.row, vs.row, n, d_, s.values);
      products(tile, keys, values, n, s);
      if (sample.hides(first, j, n)) sample.mask_sequence(s.logits.data(), n, first, tile.rows, j, n);
      for (int64_t i = 0; i < tile.rows; ++i) {
        A *p = &s.logits[i * n], *dp = &s.dp[i * n], *w = &s.weights[i * n];
        exp_and_sum(p, n, tile.lse_seq[i]);
        // P_full = P_seq * share
        const A share = std::isinf(tile.lse_seq[i]) ? A(0) : std::exp(tile.lse_seq[i] - tile.lse[i]);
        if (!gradients) {
          A sum = 0;
          for (int64_t c = 0; c < n; ++c) sum += p[c] * dp[c];
          tile.d_seq[i] += sum;
          tile.d_full[i] += sum * share;
          continue;
        }
        const A plain = tile.plain_weight[i], full = tile.full_weight[i] * share;
        const A mixed = plain * tile.d_seq[i] + full * tile.d_full[i];
        for (int64_t c = 0; c < n; ++c) {
          w[c] = (plain + full) * p[c];
          dp[c] = p[c] * ((plain + full) * dp[c] - mixed) * static_cast<A>(in_.scale);
        }
      }
      if (gradients) add_gradients(tile, keys, n, s, &grad_k[j * d_], &grad_v[j * d_]);
    }
  }

  void hr_pass(const Sample& sample, int64_t group, const std::vector<HrRow>& hr_rows, Tile& tile, Scratch& s, bool gradients,
               std::vector<A>& grad_k_hr, std::vector<A>& grad_v_hr) {
    const T* k = static_cast<const T*>(in_.k_hr) + group * in_.k_hr_strides.head;
    const T* v = static_cast<const T*>(in_.v_hr) + group * in_.v_hr_strides.head;
    std::vector<A> tile_grad_k(kTileKeys * d_), tile_grad_v(kTileKeys * d_);
    for (int64_t j = 0; j < sample.hr_keys(); j += kTileKeys) {
      const int64_t n = std::min(kTileKeys, sample.hr_keys() - j);
      const int32_t* slots = sample.slots() + j;
      const Matrix<A> keys = read_slots<T, A>(k, in_.k_hr_strides.row, slots, n, d_, s.keys);
      const Matrix<A> values = read_slots<T, A>(v, in_.v_hr_strides.row, slots, n, d_, s.values);
      products(tile, keys, values, n, s);
      for (int64_t i = 0; i < tile.rows; ++i) {
        A *p = &s.logits[i * n], *dp = &s.dp[i * n], *w = &s.weights[i * n];
        mask_hr(p, sample.row_bits(hr_rows[i].listed), j, n);
        exp_and_sum(p, n, tile.lse[i]);
        if (!gradients) {
          for (int64_t c = 0; c < n; ++c) tile.d_full[i] += p[c] * dp[c];
          continue;
        }
        const A full = tile.full_weight[i];
        for (int64_t c = 0; c < n; ++c) {
          w[c] = full * p[c];
          dp[c] = w[c] * (dp[c] - tile.d_full[i]) * static_cast<A>(in_.scale);
        }
      }
      if (!gradients) continue;
      std::fill(tile_grad_k.begin(), tile_grad_k.end(), A(0));
      std::fill(tile_grad_v.begin(), tile_grad_v.end(), A(0));
      add_gradients(tile, keys, n, s, tile_grad_k.data(), tile_grad_v.data());
      for (int64_t c = 0; c < n; ++c)
        for (int64_t e = 0; e < d_; ++e) {
          grad_k_hr[slots[c] * d_ + e] += tile_grad_k[c * d_ + e];
          grad_v_hr[slots[c] * d_ + e] += tile_grad_v[c * d_ + e];
        }
    }
  }

  // logits = scale q k^T and dp = grad_out v^T, both [rows, n]
  void products(const Tile& tile, Matrix<A> keys, Matrix<A> values, int64_t n, Scratch& s) {
    for (auto* part : {&s.logits, &s.dp, &s.weights}) part->resize(tile.rows * n);
    multiply_transposed(tile.q, tile.rows, keys, n, d_, static_cast<A>(in_.scale), s.logits.data(), n);
    multiply_transposed(tile.grad_out, tile.rows, values, n, d_, A(1), s.dp.data(), n);
  }

  // From the weights w and the logits' gradients (in dp): grad_v += w^T grad_out, grad_k += ds^T q, grad_q += ds k
  void add_gradients(Tile& tile, Matrix<A> keys, int64_t n, Scratch& s, A* grad_k, A* grad_v) {
    add_transposed_product<A>({s.weights.data(), n}, tile.rows, n, tile.grad_out, d_, grad_v, d_);
    add_transposed_product<A>({s.dp.data(), n}, tile.rows, n, tile.q, d_, grad_k, d_);
    add_product<A>({s.dp.data(), n}, tile.rows, keys, n, d_, tile.grad_q.data(), d_);
  }

  const AttentionBackwardParams& params_;
  const AttentionInputs& in_;
  const int64_t d_;
};

}  // namespace

void hierarchical_attention_backward(const AttentionBackwardParams& params, Stream) {
  dispatch(params.in.dtype, [&](auto value) { Backward<decltype(value)>(params).run(); });
}

}  // namespace flexattn::cpu
