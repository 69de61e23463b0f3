"""The operators of FlexAttention on CPU and CUDA tensors.

They are also registered as `torch.ops.flexattn_cuda`, work under `torch.compile(fullgraph=True)`, and know no model.
`flexattn_cuda.reference` defines each of them in a few lines of plain torch.

Sizes in the shapes below:

| size  | meaning                                                      |
|-------|--------------------------------------------------------------|
| B     | samples in the batch                                         |
| R     | query rows with a map of their own                           |
| I     | images per sample                                            |
| C, T  | low-resolution (LR) cells, high-resolution (HR) tokens that an image has room for |
| N, Nk | query rows, sequence keys                                    |
| M, P  | selected HR tokens per sample, slots of the HR pool          |
| H, Hkv | query heads, key heads                                      |
| d     | head dimension                                               |

Grids are row-major from the top left. Each image has its own, given as rows and columns in [B, I, 2] tensors. Its cells
are the first rows x columns of C, its HR tokens the first rows x columns of T, and HR token t of image i of a sample
has the number `i*T + t`. An image of 0 x 0 is absent.

Every index tensor is int32. "Dense last dimension" means stride 1 there and any strides elsewhere; such tensors are
read in place. Results never share memory with arguments. Every operator is deterministic.

Bad arguments raise one ValueError that lists every reason. The values of index tensors are checked on the CPU only,
because reading them from a GPU would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flexattn_cuda import registration
from flexattn_cuda.native import compiled

_WORD = 32


class SelectedTokens(NamedTuple):
    """Result of `select_tokens`; all int32.

    Attributes:
        index: [B, I*T]; the numbers of the HR tokens that any row selects, ascending, then -1.
        count: [B]; the number of those tokens.
        row_bits: [B, R, ceil(I*T / 32)]; bit m of row r is set if row r selects `index[m]`.
    """

    index: Tensor  # type: ignore[assignment]  # a field, not the method of tuples
    count: Tensor  # type: ignore[assignment]
    row_bits: Tensor

    def mask(self, images: int) -> Tensor:
        """Return [B, R, I, T] bool, the HR tokens that each row selects. I = `images`. Nothing is read back."""
        tokens = self.index.shape[1]
        bits = unpack_bits(self.row_bits, tokens)
        # The entries of -1 go to an extra token, which is cut off.
        number = torch.where(self.index >= 0, self.index, tokens).long()[:, None].expand_as(bits)
        mask = bits.new_zeros(*bits.shape[:2], tokens + 1).scatter(-1, number, bits)[..., :tokens]
        return mask.reshape(*bits.shape[:2], images, tokens // max(images, 1))


def select_tokens(
    attention_map: Tensor,
    lr_grid: Tensor,
    hr_grid: Tensor,
    *,
    hr_tokens: int,
    scale: float,
    threshold: float,
    pool_grid: Tensor | None = None,
    valid_rect: Tensor | None = None,
) -> SelectedTokens:
    """Return the HR tokens to attend to, given the attention map of the layer before (section 4.2).

    For each map, in its own dtype:

    1. set the cells outside `valid_rect` to zero (as in the released code);
    2. min-max normalise the grid to a;
    3. choose the cells with `a * scale > threshold`;
    4. max-pool the choice adaptively to `pool_grid`, if there is one (as in the released code);
    5. resize it to `hr_grid` by nearest neighbour.

    A constant grid selects nothing, and neither does one with a NaN, nor an absent image.

    Args:
        attention_map: [B, R, I, C] float32 or float64, not negative. What follows an image's cells is not read.
        lr_grid: [B, I, 2] int32; rows and columns of the LR grid, at most C cells.
        hr_grid: [B, I, 2] int32; rows and columns of the HR grid, at most T tokens.
        hr_tokens: T; I*T is below 2^31.
        scale: Factor on the normalised map. A second number beside the threshold makes both `a * 255 > 48` (released)
            and `a * 1 > 0.1875` (paper) exact.
        threshold: Value that `a * scale` must exceed.
        pool_grid: [B, I, 2] int32; rows and columns of the pooled grid, from 1 x 1 to the LR grid; no pooling if
            absent.
        valid_rect: [B, I, 4] int32; top, left, bottom and right of the image inside its padding, in LR cells,
            half-open; the whole grid if absent.

    Returns:
        The selection, on the device of the map. Counts are not read back from a GPU.

    Raises:
        ValueError: If a shape, dtype or device is wrong, `hr_tokens` is out of range, or a grid or rectangle is too
            large (CPU only).
        NotImplementedError: If the tensors are on a GPU and this build cannot run there.
    """
    return SelectedTokens(
        *registration.SELECT_TOKENS(attention_map, lr_grid, hr_grid, hr_tokens, scale, threshold, pool_grid, valid_rect)
    )


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Return the selected rows of a table (f_SHR in section 4.2). Differentiable in `tokens`, any number of times.

    Args:
        tokens: [B, T, D] float32, float64, float16 or bfloat16, with a dense last dimension.
        index: [B, M] int32 in [0, T) or -1. A row must not repeat a token.

    Returns:
        [B, M, D] in the dtype of `tokens`: `tokens[b, index[b, m]]`, or zeros where the index is -1.

    Raises:
        ValueError: If a shape, dtype or device is wrong, or an index is out of range or repeated (CPU only).
        NotImplementedError: If the tensors are on a GPU and this build cannot run there, or a tensor carries a
            forward-mode tangent.
    """
    return registration.call(registration.GATHER_TOKENS, tokens, index)  # type: ignore[no-any-return]


class AssignedSlots(NamedTuple):
    """Result of `assign_slots`; all int32.

    Attributes:
        slots: [B, W]; the slot of `index[b, m]`, or -1 beyond `count`, where the index is -1, and where no slot was
            left.
        usable: [B]; how many slots of each row may be read: `count`, or 0 everywhere if a token found no slot.
        new_tokens: [B*W]; `g*T + token` of the tokens that took a slot in this call, in the order (b, m), then -1.
        new_slots: [B*W]; the slots of `new_tokens`, ascending, then -1.
        new_count: [1]; the number of new tokens.
        overflow: [1]; the number of selected tokens that found no slot. Must be 0 for the slots to be usable.
    """

    slots: Tensor
    usable: Tensor
    new_tokens: Tensor
    new_slots: Tensor
    new_count: Tensor
    overflow: Tensor


def assign_slots(
    index: Tensor, count: Tensor, table: Tensor, next_free: Tensor, *, capacity: int, width: int | None = None
) -> AssignedSlots:
    """Give each selected token a permanent slot in the pool of HR keys, so that it is projected only once.

    A pool, with its `table` and `next_free`, belongs to one layer and is shared by the whole batch. Rows of the batch
    that are beams of one prompt follow each other and share a row of the table, so no token is stored twice. Tokens
    without a slot take `next_free`, `next_free + 1`, ... in the order (b, m). Once the pool is full, the rest get slot
    -1, count towards `overflow`, and remain without a slot in the table. So do the tokens of a row beyond its first W.

    The results feed the next operators. `project_hr_kv` projects `new_tokens` and stores them at `new_slots`; where
    their number is known, so do `gather_tokens(features.view(1, G*T, D), new_tokens[None])`, any projection, and
    `write_hr_kv`. `slots` and `usable` are the `hr_slots` and `hr_count` of `hierarchical_attention`.

    This is a cache of this implementation, not part of the paper.

    Args:
        index: [B, M] int32 in [0, T) or -1, as from `select_tokens`. A row must not repeat a token.
        count: [B] int32, at most M, as from `select_tokens`; only the first `count[b]` entries of a row are read.
        table: [G, T] int32 slot of each token, or -1. Written in place. Any row stride. G divides B; row b of the batch
            belongs to row `b // (B / G)` of the table.
        next_free: [1] int32 first free slot, at most `capacity`. Written in place.
        capacity: P, the number of slots in the pool.
        width: W, the number of slots that a row may have, at most M; M if absent.

    Returns:
        Slots of all selected tokens and the list of new ones, on the device of `index`.

    Raises:
        ValueError: If a shape, dtype or device is wrong, a value is out of range or an index repeated (CPU only), or
            `table` or `next_free` shares memory with itself or another argument or is a negative view.
        NotImplementedError: If the tensors are on a GPU and this build cannot run there.
    """
    return AssignedSlots(
        *registration.call_writing(
            registration.ASSIGN_SLOTS, index, count, table, next_free, capacity,
            index.shape[-1] if width is None else width,
        )
    )  # fmt: skip


def write_hr_kv(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, slots: Tensor, k_pool: Tensor, v_pool: Tensor) -> None:
    """Rotate new HR keys and write them and their values into the pool. Not differentiable.

    With x = (x1, x2) in halves, a key becomes `x * cos + (-x2, x1) * sin`, as in transformers' Llama. The rotation is
    computed in float32 (float64 for float64) and rounded once.

    Args:
        k: [M, Hkv, d] keys before rotation; float32, float64, float16 or bfloat16, d even, with a dense last dimension.
        v: [M, Hkv, d] values in the dtype of `k`, with a dense last dimension.
        cos: [M, d] cosines at the positions of the rows, in the dtype of `k` or float32, with a dense last dimension.
        sin: [M, d] sines, in the dtype of `cos`, with a dense last dimension.
        slots: [M] int32 in [0, P), or -1 to skip a row, as `new_slots` of `assign_slots`. No slot may be repeated.
        k_pool: [P, Hkv, d] in the dtype of `k`, with a dense last dimension. Written in place.
        v_pool: [P, Hkv, d], likewise. Written in place.

    Raises:
        ValueError: If a shape, dtype or device is wrong, a slot is out of range or repeated (CPU only), or a pool
            shares memory with itself or another argument or is a negative view.
        NotImplementedError: If the tensors are on a GPU and this build cannot run there, or a tensor carries a
            forward-mode tangent.
    """
    registration.call_writing(registration.WRITE_HR_KV, k, v, cos, sin, slots, k_pool, v_pool)


def project_hr_kv(  # noqa: PLR0913 (an operator)
    features: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    tokens: Tensor,
    slots: Tensor,
    count: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    *,
    k_bias: Tensor | None = None,
    v_bias: Tensor | None = None,
) -> None:
    """Project new HR tokens, rotate the keys, and write both into the pool, in one pass. Not differentiable.

    The same as `gather_tokens`, two linear layers and `write_hr_kv` for the first `count` of `tokens`, whose number is
    never read back from a GPU: a decoding step, in a CUDA graph too, projects what is new and nothing else. The weights
    are not read where no token is new. On a GPU this is for few tokens; a prompt's are faster through `write_hr_kv`.

    Args:
        features: [G, T, D] of all tokens of G prompts; float32, float64, float16 or bfloat16, dense.
        cos: [G, T, d] cosines at the positions of the tokens, in the dtype of `features` or float32, dense.
        sin: [G, T, d] sines, in the dtype of `cos`, dense.
        k_weight: [Hkv*d, D] of the linear layer that makes the keys, in the dtype of `features`, dense.
        v_weight: [Hkv*d, D] of the one that makes the values, likewise.
        tokens: [M] int32 `g*T + token`, as `new_tokens` of `assign_slots`.
        slots: [M] int32 in [0, P), as `new_slots` of `assign_slots`. No slot may be repeated.
        count: [1] int32; only the first so many of `tokens` and `slots` are read.
        k_pool: [P, Hkv, d] in the dtype of `features`, d even, with a dense last dimension. Written in place.
        v_pool: [P, Hkv, d], likewise. Written in place.
        k_bias: [Hkv*d] of the linear layer, in the dtype of `features`; none if absent.
        v_bias: [Hkv*d], likewise.

    Raises:
        ValueError: If a shape, dtype or device is wrong, a value is out of range or a slot repeated (CPU only), or a
            pool shares memory with itself or another argument or is a negative view.
        NotImplementedError: If the tensors are on a GPU and this build cannot run there, or a tensor carries a
            forward-mode tangent.
    """
    registration.call_writing(
        registration.PROJECT_HR_KV, features, cos, sin, k_weight, v_weight, k_bias, v_bias, tokens, slots, count,
        k_pool, v_pool,
    )  # fmt: skip


class Attention(NamedTuple):
    """Result of `hierarchical_attention`. Only `out` is differentiable.

    Attributes:
        out: [B, N, H, d] in the dtype of `q`; zero in rows that see no key.
        lse: [B, H, N]; log-sum-exp of the logits of all keys that a row sees, -inf if it sees none.
        lse_seq: [B, H, N]; the same over its sequence keys only.
        map: [B, R, I, map_size]; probabilities of each image's LR keys, summed over heads. The rows are those of
            `hr_rows`; without it, R = 1 and the row is the last query.

    All but `out` are float32, or float64 for float64 inputs.
    """

    out: Tensor
    lse: Tensor
    lse_seq: Tensor
    map: Tensor


def hierarchical_attention(  # noqa: PLR0913 (an operator)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_start: Tensor | None = None,
    kv_len: Tensor | None = None,
    key_mask: Tensor | None = None,
    window: int = 0,
    bidirectional_ranges: Tensor | None = None,
    softcap: float = 0.0,
    k_hr: Tensor | None = None,
    v_hr: Tensor | None = None,
    hr_slots: Tensor | None = None,
    hr_count: Tensor | None = None,
    hr_from: Tensor | None = None,
    hr_rows: Tensor | None = None,
    hr_row_bits: Tensor | None = None,
    alpha: Tensor | None = None,
    map_ranges: Tensor | None = None,
    map_size: int = 0,
    map_over_all: bool = False,
    scale: float | None = None,
) -> Attention:
    """Return N x (N+M) attention (equations 3 to 7): causal over the sequence, full over the selected HR keys.

    Query n of sample b stands at position `kv_len[b] - N + n` and sees the sequence keys from `kv_start[b]` up to that
    position. This one rule covers left padding, prefill, chunked prompts, decoding, and static caches with an unfilled
    tail. `window` limits it to the latest keys; inside one of `bidirectional_ranges`, a query also sees all keys of
    that range, later ones and those beyond the window included. No N x (N+M) matrix is held in memory. Differentiable
    once in `q`, `k`, `v`, `k_hr` and `v_hr`, in reverse mode.

    HR keys are optional: `k_hr`, `v_hr`, `hr_slots` and `hr_count` are given together, and with them one of `hr_from`
    and `hr_rows`, which say which rows see HR keys.

    Args:
        q: [B, H, N, d] queries; float32, float64, float16 or bfloat16, with a dense last dimension.
        k: [B, Hkv, Nk, d] sequence keys in the dtype of `q`, with a dense last dimension; Hkv divides H, N <= Nk.
        v: [B, Hkv, Nk, d] sequence values, likewise.
        kv_start: [B] int32 first visible key, 0 to Nk; 0 if absent.
        kv_len: [B] int32 number of written keys, N to Nk; Nk if absent.
        key_mask: [B, Nk] bool, False for hidden keys; or the same packed by `pack_bits`, [B, ceil(Nk / 32)] int32.
        window: Number of latest sequence keys that a query sees, its own included (j with p - window < j <= p at
            position p); 0 for no limit. HR keys are not affected.
        bidirectional_ranges: [B, G, 2] int32; positions begin to end - 1 of the sequence, such as the tokens of an
            image, whose queries see all keys of the range that `kv_start` and `key_mask` leave. Ascending and disjoint
            within a sample, 0 <= begin <= end <= `kv_len`; an empty range stands for none and may be anywhere. A range
            that a chunk of the prompt cuts off must end with the chunk: its later keys do not exist yet.
        softcap: Logits become softcap * tanh(logit / softcap), those of HR keys too; 0 for none.
        k_hr: [P, Hkv, d] pool of rotated HR keys in the dtype of `q`, with a dense last dimension.
        v_hr: [P, Hkv, d] pool of HR values, likewise.
        hr_slots: [B, M] int32 slots of the pool that belong to each sample, read up to `hr_count`, none repeated.
        hr_count: [B] int32 number of HR keys of each sample, at most M.
        hr_from: [B] int32, 0 to N; query rows from here on see HR keys (0 is the form of the paper).
        hr_rows: [B, R] int32, -1 to N - 1; only these query rows see HR keys, -1 standing for none (the last row is the
            form of the released code). A sample must not repeat a row.
        hr_row_bits: [B, R, ceil(M / 32)] int32; the HR keys of the sample that each row of `hr_rows` sees; all if
            absent.
        alpha: [B] float32, 0 to 1 (checked on the CPU only); a row that sees HR keys returns
            (1 - alpha) * plain + alpha * with_hr; 1 if absent.
        map_ranges: [B, I, 2] int32; first LR key of each image and one past its last. An empty range gives a map of
            zeros.
        map_size: C, the length of every range that is not empty.
        map_over_all: If True, the softmax behind the map covers all N+M keys (equation 7); if False, the N sequence
            keys (released code).
        scale: Factor on the logits; 1 / sqrt(d) if absent.

    Returns:
        Output, statistics and map.

    Raises:
        ValueError: If any argument is wrong; the message lists every reason.
        NotImplementedError: If the tensors are on a GPU and this build cannot run there, a tensor carries a
            forward-mode tangent, or a gradient is differentiated again.
    """
    if kv_start is None:
        kv_start = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
    if kv_len is None:
        kv_len = torch.full((q.shape[0],), k.shape[-2], dtype=torch.int32, device=q.device)
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = pack_bits(key_mask)
    if scale is None:
        scale = max(1, q.shape[-1]) ** -0.5  # head_dim 0 is refused below
    return Attention(
        *registration.call(  # in the order of the schema (csrc/torch/attention_arguments.h)
            registration.ATTENTION, q, k, v, kv_start, kv_len, key_mask, window, bidirectional_ranges, softcap, k_hr,
            v_hr, hr_slots, hr_count, hr_from, hr_rows, hr_row_bits, alpha, map_ranges, map_size, map_over_all, scale,
        )
    )  # fmt: skip


def pack_bits(mask: Tensor) -> Tensor:
    """Pack booleans into 32-bit words: element i becomes bit i % 32 of word i // 32.

    Args:
        mask: [..., n] bool.

    Returns:
        [..., ceil(n / 32)] int32; unused bits are 0.
    """
    padded = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % _WORD))
    bits: Tensor = padded.unflatten(-1, (-1, _WORD))  # type: ignore[no-untyped-call]
    # Summed in int64, which holds all 32 bits; the conversion keeps the low ones.
    return (bits.to(torch.int64) << torch.arange(_WORD, device=mask.device)).sum(-1).to(torch.int32)


def unpack_bits(words: Tensor, n: int) -> Tensor:
    """Unpack the first n bits of words; the inverse of `pack_bits`.

    Args:
        words: [..., ceil(n / 32)] int32.
        n: Bits to unpack.

    Returns:
        [..., n] bool.
    """
    bits = words.long()[..., None] >> torch.arange(_WORD, device=words.device) & 1
    return bits.flatten(-2)[..., :n].bool()


class AttentionPath(NamedTuple):
    """Result of `attention_path`.

    Attributes:
        path: "cpu"; "generic"; "decode", for up to 16 query rows; for more, "fma" or a kernel on tensor cores: "volta"
            (mma.m8n8k4) or "ampere" (mma.m16n8k16).
        reasons: Why no faster kernel takes the call; empty if this is the fastest.
    """

    path: str
    reasons: tuple[str, ...]


def attention_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_hr: Tensor | None = None,
    v_hr: Tensor | None = None,
    scale: float | None = None,
    capability: tuple[int, int] | None = None,
) -> AttentionPath:
    """Return which kernel a call of `hierarchical_attention` takes, and why not a faster one.

    The choice depends on dtype, sizes, strides and alignment only; no value is read.

    Args:
        q: As for `hierarchical_attention`.
        k: As for `hierarchical_attention`.
        v: As for `hierarchical_attention`.
        k_hr: As for `hierarchical_attention`.
        v_hr: As for `hierarchical_attention`.
        scale: As for `hierarchical_attention`.
        capability: Compute capability of the GPU, e.g. (7, 0); that of the device of `q` if absent. A CPU tensor then
            takes the CPU kernel.

    Returns:
        The kernel and the reasons against a faster one.

    Raises:
        ValueError: If `q` is not float32, float64, float16 or bfloat16.
    """
    return _chosen(compiled.attention_path, (q, k, v, k_hr, v_hr), scale, capability)


def attention_backward_path(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k_hr: Tensor | None = None,
    v_hr: Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    capability: tuple[int, int] | None = None,
) -> AttentionPath:
    """Return which kernels the gradients of a call of `hierarchical_attention` take, given that of `out` is dense.

    Args:
        q: As for `hierarchical_attention`.
        k: As for `hierarchical_attention`.
        v: As for `hierarchical_attention`.
        k_hr: As for `hierarchical_attention`.
        v_hr: As for `hierarchical_attention`.
        scale: As for `hierarchical_attention`.
        softcap: As for `hierarchical_attention`.
        capability: As for `attention_path`.

    Returns:
        The kernels and the reasons against faster ones.

    Raises:
        ValueError: If `q` is not float32, float64, float16 or bfloat16.
    """
    return _chosen(compiled.attention_backward_path, (q, k, v, k_hr, v_hr), scale, capability, softcap)


def _chosen(
    choose: Callable[..., tuple[str, list[str]]],
    tensors: tuple[Tensor | None, ...],
    scale: float | None,
    capability: tuple[int, int] | None,
    *others: float,
) -> AttentionPath:
    q = tensors[0]
    assert q is not None
    if capability is None:
        if not q.is_cuda:
            return AttentionPath("cpu", (f"the tensors are on {q.device}",))
        capability = torch.cuda.get_device_capability(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    path, reasons = choose(*tensors, scale, 10 * capability[0] + capability[1], *others)
    return AttentionPath(path, tuple(reasons))
