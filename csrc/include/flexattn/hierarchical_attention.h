// N x (N+M) attention (equations 3 to 7 of the paper): causal over the sequence, full over the selected high-resolution
// tokens, with the attention map of the rows whose selection the next layer needs. No N x (N+M) matrix is ever stored.
#pragma once

#include "flexattn/types.h"

namespace flexattn {

// What a query row sees; common to the forward and the backward pass.
struct AttentionInputs {
  DType dtype;       // of q, k, v, k_hr, v_hr, out and the gradients; statistics are float32 (float64 for float64)
  int64_t batch;     // B
  int64_t heads;     // H
  int64_t kv_heads;  // Hkv, divides H: query head i reads key head i / (H / Hkv)
  int64_t queries;   // N
  int64_t keys;      // Nk
  int64_t head_dim;  // d
  double scale;      // of the logits, usually 1 / sqrt(d)
  double softcap;  // logits become softcap * tanh(logit / softcap), those of high-resolution keys too; 0 = as they are

  const void* q;  // [B, H, N, d]
  const void* k;  // [B, Hkv, Nk, d]
  const void* v;  // [B, Hkv, Nk, d]
  Strides q_strides, k_strides, v_strides;

  // Query n of sample b stands at position p = kv_len[b] - N + n. It sees the sequence keys j with p - window < j <= p
  // and, if p lies in one of the sample's bidirectional ranges, all keys j of that range; of these, those with
  // kv_start[b] <= j and, where key_mask is given, bit j of its row set. Both sets contain p: together they are one
  // interval, and neither of its bounds decreases from one query to the next.
  const int32_t* kv_start;              // [B]
  const int32_t* kv_len;                // [B]
  const int32_t* key_mask;              // [B, ceil(Nk / 32)] or null
  int64_t window;                       // 0 = unlimited
  int64_t ranges;                       // G; 0 = none
  const int32_t* bidirectional_ranges;  // [B, G, 2]: first position and one past the last; ascending and disjoint,
                                        // those that are empty aside, and at most kv_len; null if G is 0

  // High-resolution keys: a pool of slots, of which sample b owns hr_slots[b, 0 .. hr_count[b]). Null if there are
  // none.
  int64_t pool;      // P
  int64_t selected;  // M
  const void* k_hr;  // [P, Hkv, d]: k_hr[p, g, c] = data[p * row + g * head + c]
  const void* v_hr;
  Strides k_hr_strides, v_hr_strides;  // .batch unused
  const int32_t* hr_slots;             // [B, M] dense; no slot twice in a row
  const int32_t* hr_count;             // [B]

  // Which rows see them: rows n >= hr_from[b]; or the rows listed in hr_rows (-1 = none), each with its own choice of
  // the sample's keys where hr_row_bits is given. At most one of hr_from and hr_rows is set.
  int64_t rows;                // R; 1 if hr_rows is null
  const int32_t* hr_from;      // [B] or null
  const int32_t* hr_rows;      // [B, R] or null; no row twice
  const int32_t* hr_row_bits;  // [B, R, ceil(M / 32)] or null (every key)

  // A row that sees HR keys gives (1 - alpha) * plain + alpha * with_hr. Null = 1.
  const float* alpha;  // [B] or null
};

struct AttentionForwardParams {
  AttentionInputs in;

  // The map: for the rows in hr_rows (without hr_rows: the last query row), the probabilities of the keys of each
  // image, summed over heads.
  int64_t images;    // I; 0 = no map
  int64_t map_size;  // S*S
  // [B, I, 2]: first key of the image and one past its last; S*S keys, or an empty range, which gives zeros.
  const int32_t* map_ranges;
  bool map_over_all;  // softmax over the N+M keys that the row sees instead of its N sequence keys

  void* out;      // [B, N, H, d] dense
  void* lse;      // [B, H, N]: log-sum-exp over all the keys that the row sees; -inf where it sees none
  void* lse_seq;  // [B, H, N]: the same over the sequence keys only
  void* map;      // [B, R, I, S*S] dense, zero for a row of -1

  void* workspace;  // hierarchical_attention_workspace() bytes, 16-byte aligned; null if that is 0
};

struct AttentionBackwardParams {
  AttentionInputs in;
  const void* grad_out;  // [B, N, H, d]: strides as in Strides{batch, head, row}
  Strides grad_out_strides;
  const void* out;  // [B, N, H, d] dense, as written by the forward pass; null with alpha, whose two softmaxes it mixes
  const void* lse;  // [B, H, N] dense, likewise
  const void* lse_seq;

  // Null: not wanted.
  void* grad_q;  // [B, H, N, d] dense
  void* grad_k;  // [B, Hkv, Nk, d] dense; both or neither
  void* grad_v;
  void* grad_k_hr;  // [P, Hkv, d] dense; both or neither, and only with a pool
  void* grad_v_hr;

  // Scratch, allocated by the caller.
  void* row_states;      // [B, H, N, 4], statistics dtype: what the kernels of a path keep about each query
  int32_t* slot_to_key;  // [B, P]: index of a slot in the sample's hr_slots, or -1; null without grad_k_hr
};

namespace cpu {
int64_t hierarchical_attention_workspace(const AttentionForwardParams& params, Stream stream);  // bytes
void hierarchical_attention_forward(const AttentionForwardParams& params, Stream stream);
void hierarchical_attention_backward(const AttentionBackwardParams& params, Stream stream);
}  // namespace cpu
namespace cuda {
int64_t hierarchical_attention_workspace(const AttentionForwardParams& params, Stream stream);  // bytes
void hierarchical_attention_forward(const AttentionForwardParams& params, Stream stream);
void hierarchical_attention_backward(const AttentionBackwardParams& params, Stream stream);
}  // namespace cuda

}  // namespace flexattn
