"""The operators, documented. `torch.ops.flexattn_cuda` holds them in C++ for CPU, CUDA and Meta tensors.

Names: B samples, R query rows with a map of their own, I images per sample, S x S the low-resolution (LR) grid, h x h
the high-resolution (HR) grid, N query rows, Nk sequence keys, M selected HR tokens, H query heads, Hkv key heads, d head
dimension. Grids are row-major, top-left first. Every index tensor is int32. Tensors that an operator writes are marked so;
nothing returned shares memory with an argument. Wrong arguments raise one ValueError that lists every reason; values of
index tensors are checked on the CPU only, where reading them costs no wait.
`reference.py` has each operator again in a few lines of plain torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.utils.flop_counter import register_flop_formula

try:
    from flexattn_cuda import _C  #  loading it registers the operators
except ImportError as error:
    raise ImportError(
        f"the compiled part of flexattn_cuda is missing ({error}); build it with `pip install .` in its repository"
    ) from error

_WORD = 32


class SelectedTokens(NamedTuple):
    """Result of `select_tokens`.

    mask: [B, R, I, h*h] bool, what each row selects.
    index: [B, I*h*h] int32, `image * h*h + token` of the tokens that any row selects, ascending, then -1.
    count: [B] int32, how many these are.
    row_bits: [B, R, ceil(I*h*h / 32)] int32, bit m of row r: row r selects `index[m]`.
    """

    mask: torch.Tensor
    index: torch.Tensor
    count: torch.Tensor
    row_bits: torch.Tensor


def select_tokens(
    map: torch.Tensor,
    live: torch.Tensor,
    *,
    hr_side: int,
    scale: float,
    threshold: float,
    pool_side: int = 0,
) -> SelectedTokens:
    """High-resolution tokens to attend to, from an attention map (section 4.2; margin and pool as released).

    Per map: cells outside `live` are zeroed; the whole grid is min-max normalised to a; the cells with
    `a * scale > threshold` are chosen; they are max-pooled adaptively to pool_side x pool_side (0: not); and each HR token
    takes the nearest cell. A constant grid, or one with a NaN, selects nothing. Arithmetic is done in the map's dtype.

    Args:
        map: [B, R, I, S*S] float32 or float64, not negative.
        live: [B, I, 4] int32: top, left, bottom, right of the image inside its padding, in LR cells, half-open.
        hr_side: h.
        scale, threshold: Two numbers, so that `a * 255 > 48` and `a * 1 > 0.1875` are both exact.
        pool_side: Side of the pooled grid, at most S.
    Returns:
        `SelectedTokens`, on the map's device; counts are not read back.
    Raises:
        ValueError: Shapes, dtypes or devices do not fit; S*S is no square; `live` leaves the grid (CPU).
        NotImplementedError: A CUDA tensor, and the build has no CUDA kernels.
    """
    return SelectedTokens(*torch.ops.flexattn_cuda.select_tokens(map, live, hr_side, scale, threshold, pool_side))


def gather_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Selected rows of a table (f_SHR of section 4.2). Differentiable in `tokens`, deterministic.

    Args:
        tokens: [B, T, D] float32, float64, float16 or bfloat16; any strides with a dense last dimension.
        index: [B, M] int32 in [0, T), or -1; no token twice in a row.
    Returns:
        [B, M, D]: `tokens[b, index[b, m]]`, zero where the index is -1.
    Raises:
        ValueError: Shapes, dtypes or devices do not fit; an index is out of range or doubled (CPU).
        NotImplementedError: A CUDA tensor, and the build has no CUDA kernels.
    """
    return torch.ops.flexattn_cuda.gather_tokens(tokens, index)


class AssignedSlots(NamedTuple):
    """Result of `assign_slots`, all int32.

    slots: [B, M] slot of `index[b, m]`; -1 beyond `count`, where the index is -1, and where no slot was left.
    new_tokens: [B*M] `g*T + token` of the tokens that took their slot in this call, in the order (b, m), then -1.
    new_slots: [B*M] their slots, ascending, then -1.
    new_count: [1] how many these are.
    overflow: [1] how many selected tokens found no slot; 0 when all is well.
    """

    slots: torch.Tensor
    new_tokens: torch.Tensor
    new_slots: torch.Tensor
    new_count: torch.Tensor
    overflow: torch.Tensor


def assign_slots(
    index: torch.Tensor,
    count: torch.Tensor,
    table: torch.Tensor,
    next_free: torch.Tensor,
    *,
    capacity: int,
) -> AssignedSlots:
    """Gives each selected token its slot in the pool of HR keys, for good: a token is projected once, when first selected.

    A pool, with its `table` and `next_free`, belongs to one layer and is shared by the batch; the beams of a prompt, rows that
    follow each other, also share their row of the table, so that no token is stored twice. Tokens without a slot take
    `next_free`, `next_free + 1`, ... in the order (b, m). When the pool is full the rest go without: slot -1, counted in
    `overflow`, and still without a slot in the table. Deterministic; counts stay on the device.

    `gather_tokens(features.view(1, G*T, D), new_tokens[None])` are the features to project, with zeros behind them,
    `write_hr_kv(..., new_slots, ...)` stores what was made of them and skips the rest, and `slots` and `count` are the
    `hr_slots` and `hr_count` of `hierarchical_attention`, which needs an overflow of 0.

    Args:
        index: [B, M] int32 in [0, T), or -1; no token twice in a row. As from `select_tokens`.
        count: [B] int32, at most M: the places that are read. As from `select_tokens`.
        table: [G, T] int32 slot of each token, -1 = none yet. Written. Any row stride. G divides B: row b of the batch
            belongs to row `b // (B / G)` of the table.
        next_free: [1] int32 first free slot, at most `capacity`. Written.
        capacity: P, the slots of the pool.
    Returns:
        `AssignedSlots`.
    Raises:
        ValueError: Shapes, dtypes or devices do not fit; a value is out of range, or an index doubled (CPU).
        NotImplementedError: A CUDA tensor, and the build has no CUDA kernels.
    """
    return AssignedSlots(*torch.ops.flexattn_cuda.assign_slots(index, count, table, next_free, capacity))


def write_hr_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """Rotates new HR keys and writes them and their values into the pool, in one pass. Carries no gradient.

    With x = (x1, x2) in halves: `x * cos + (-x2, x1) * sin`, as transformers' Llama, but in float32 for half-precision
    types (float64 for float64) and rounded once.

    Args:
        k, v: [M, Hkv, d] float32, float64, float16 or bfloat16, d even; any strides with a dense last dimension.
        cos, sin: [M, d] rotary tables at the positions of the rows, in k's dtype or float32.
        slots: [M] int32 in [0, P), or -1 = the row is not written; no slot twice. As `new_slots` of `assign_slots`.
        k_pool, v_pool: [P, Hkv, d] in k's dtype; any strides with a dense last dimension. Written.
    Raises:
        ValueError: Shapes, dtypes or devices do not fit; a slot is out of range or doubled (CPU).
        NotImplementedError: A CUDA tensor, and the build has no CUDA kernels.
    """
    torch.ops.flexattn_cuda.write_hr_kv(k, v, cos, sin, slots, k_pool, v_pool)


class Attention(NamedTuple):
    """Result of `hierarchical_attention`; `lse`, `lse_seq` and `map` carry no gradient.

    out: [B, N, H, d] in q's dtype.
    lse: [B, H, N] log-sum-exp over all the keys that a row sees; -inf where it sees none.
    lse_seq: [B, H, N] the same over the sequence keys only.
    map: [B, R, I, S*S] probabilities of each image's LR keys, summed over heads.

    The last three are float32, or float64 for float64 inputs.
    """

    out: torch.Tensor
    lse: torch.Tensor
    lse_seq: torch.Tensor
    map: torch.Tensor


def hierarchical_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    kv_len: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    k_hr: torch.Tensor | None = None,
    v_hr: torch.Tensor | None = None,
    hr_slots: torch.Tensor | None = None,
    hr_count: torch.Tensor | None = None,
    hr_from: torch.Tensor | None = None,
    hr_rows: torch.Tensor | None = None,
    hr_row_bits: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
    map_ranges: torch.Tensor | None = None,
    map_size: int = 0,
    map_over_all: bool = False,
    scale: float | None = None,
) -> Attention:
    """N x (N+M) attention (equations 3 to 7): causal over the sequence, full over the selected HR keys.

    Query n of sample b stands at position `kv_len[b] - N + n` and sees the sequence keys from `kv_start[b]` to that
    position. Left padding, prefill, chunks, decoding and a static cache with an unfilled tail are this one rule. A row
    that sees no key gives 0. No N x (N+M) matrix is held. Differentiable in q, k, v, k_hr and v_hr; deterministic.

    Args:
        q: [B, H, N, d] float32, float64, float16 or bfloat16; any strides with a dense last dimension, as are k, v, k_hr
            and v_hr. Nothing is copied.
        k, v: [B, Hkv, Nk, d]; Hkv divides H, N <= Nk.
        kv_start: [B] int32 first visible key; zeros when absent.
        kv_len: [B] int32 one past the last written key, from N to Nk; Nk when absent.
        key_mask: [B, Nk] bool (False = hidden), or its bits [B, ceil(Nk / 32)] int32.
        k_hr, v_hr: [P, Hkv, d] pool of HR keys (rotated) and values.
        hr_slots: [B, M] int32 slots of the pool that a sample owns, no slot twice; read up to `hr_count`.
        hr_count: [B] int32, at most M.
        hr_from: [B] int32: the rows from there on see HR keys (the paper's form: 0). Or
        hr_rows: [B, R] int32: these rows see them, -1 for none (the released form: the last row).
        hr_row_bits: [B, R, ceil(M / 32)] int32: which of the sample's HR keys each listed row sees; all when absent.
        alpha: [B] float32: a row that sees HR keys gives (1 - alpha) * plain + alpha * with_hr; 1 when absent.
        map_ranges: [B, I, 2] int32: first LR key of each image and one past its last; equal for no image.
        map_size: S*S, the length of a range.
        map_over_all: Softmax of the map over the N+M keys (eq. 7) instead of the N sequence keys (released).
        scale: Of the logits; 1 / sqrt(d) when absent.
    Returns:
        `Attention`. Map rows are those of `hr_rows`; without it R = 1 and the row is the last query.
    Raises:
        ValueError: Lists every argument that does not fit.
        NotImplementedError: A CUDA tensor, and the build has no CUDA kernels.
    """
    if kv_start is None:
        kv_start = torch.zeros(q.shape[0], dtype=torch.int32, device=q.device)
    if kv_len is None:
        kv_len = torch.full((q.shape[0],), k.shape[-2], dtype=torch.int32, device=q.device)
    if key_mask is not None and key_mask.dtype == torch.bool:
        key_mask = pack_bits(key_mask)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    return Attention(
        *torch.ops.flexattn_cuda.hierarchical_attention(
            q, k, v, kv_start, kv_len, key_mask, k_hr, v_hr, hr_slots, hr_count, hr_from, hr_rows, hr_row_bits, alpha,
            map_ranges, map_size, map_over_all, scale,
        )
    )  # fmt: skip


@register_flop_formula(torch.ops.flexattn_cuda.hierarchical_attention)
def attention_flops(
    q, k, v, kv_start, kv_len, key_mask, k_hr, v_hr, hr_slots, hr_count, hr_from, hr_rows, *_, **__
) -> int:
    """For torch's FlopCounterMode, from shapes alone: 2 for each multiply-add of scores and outputs.

    As torch counts its own attention, causality saves nothing: N x Nk for the sequence. HR keys are counted for the rows
    that see them: R x M with `hr_rows`, N x M with `hr_from`.
    """
    B, H, N, d = q
    pairs = N * k[2]
    if hr_slots is not None:
        pairs += (N if hr_rows is None else hr_rows[1]) * hr_slots[1]
    return 4 * B * H * pairs * d


@register_flop_formula(torch.ops.flexattn_cuda.hierarchical_attention_backward)
def attention_backward_flops(grad_out, *inputs, **_) -> int:
    """As torch counts its fused attention: five products where the forward pass has two."""
    return attention_flops(*inputs) * 5 // 2


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """[..., n] bool -> [..., ceil(n / 32)] int32; element i is bit i % 32 of word i // 32."""
    bits = torch.nn.functional.pad(mask, (0, -mask.shape[-1] % _WORD)).unflatten(-1, (-1, _WORD))
    # Summed in int64, where 32 bits fit; the conversion keeps the low ones.
    return (bits.to(torch.int64) << torch.arange(_WORD, device=mask.device)).sum(-1).to(torch.int32)


class AttentionPath(NamedTuple):
    """Result of `attention_path`.

    path: "cpu", "generic", "decode" (up to 16 query rows), or tensor cores: "volta" (mma.m8n8k4), "ampere" (mma.m16n8k16).
    reasons: Why no faster kernel than the generic one takes the call; empty where one does.
    """

    path: str
    reasons: tuple[str, ...]


def attention_path(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    k_hr: torch.Tensor | None = None,
    v_hr: torch.Tensor | None = None,
    scale: float | None = None,
    capability: tuple[int, int] | None = None,
) -> AttentionPath:
    """Which kernel a call of `hierarchical_attention` takes, and why not a faster one.

    Args:
        q, k, v, k_hr, v_hr, scale: As given to `hierarchical_attention`; only dtype, sizes, strides and alignment count.
        capability: Of the GPU, e.g. (7, 0); by default that of q's device, and a CPU tensor takes the CPU kernel.
    """
    if capability is None:
        if not q.is_cuda:
            return AttentionPath("cpu", (f"the tensors are on {q.device}",))
        capability = torch.cuda.get_device_capability(q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    path, reasons = _C.attention_path(q, k, v, k_hr, v_hr, scale, 10 * capability[0] + capability[1])
    return AttentionPath(path, tuple(reasons))
