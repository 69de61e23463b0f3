"""Every operator again in plain torch: the specification in code, which the tests compare with.

Written for reading. The attention holds the whole N x (N+M) matrix and is meant for float64; gradients come from
autograd. `select_tokens` computes in the dtype of the map, because its thresholds are exact in it. Arguments as in
`ops`.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from flexattn_cuda.ops import AssignedSlots, Attention, SelectedTokens, pack_bits, unpack_bits


def select_tokens(
    attention_map: torch.Tensor,
    lr_grid: torch.Tensor,
    hr_grid: torch.Tensor,
    *,
    hr_tokens: int,
    scale: float,
    threshold: float,
    pool_grid: torch.Tensor | None = None,
    valid_rect: torch.Tensor | None = None,
) -> SelectedTokens:
    """Select tokens as in section 4.2: zero the margin, min-max normalise, binarise, pool, resize; then list them."""
    B, R, images, _ = attention_map.shape
    mask = torch.zeros(B, R, images, hr_tokens, dtype=torch.bool, device=attention_map.device)
    for b in range(B):
        for i in range(images):
            (rows, cols), hr = lr_grid[b, i].tolist(), hr_grid[b, i].tolist()
            if rows * cols == 0 or hr[0] * hr[1] == 0:
                continue
            grids = attention_map[b, :, i, : rows * cols].view(R, rows, cols)
            if valid_rect is not None:
                top, left, bottom, right = valid_rect[b, i].tolist()
                inside = torch.zeros_like(grids, dtype=torch.bool)
                inside[:, top:bottom, left:right] = True
                grids = torch.where(inside, grids, 0)
            low, high = grids.amin((-1, -2), keepdim=True), grids.amax((-1, -2), keepdim=True)
            chosen = ((grids - low) / (high - low) * scale > threshold).float()[:, None]
            if pool_grid is not None:
                chosen = functional.adaptive_max_pool2d(chosen, pool_grid[b, i].tolist())
            mask[b, :, i, : hr[0] * hr[1]] = functional.interpolate(chosen, size=hr, mode="nearest").flatten(1) > 0
    return list_tokens(mask)


def list_tokens(mask: torch.Tensor) -> SelectedTokens:
    """List what a mask [B, R, I, T] selects; the inverse of `SelectedTokens.mask`."""
    tokens = mask.flatten(2)  # [B, R, I*T]
    index = torch.full((len(tokens), tokens.shape[2]), -1, dtype=torch.int32, device=mask.device)
    bits = torch.zeros_like(tokens)
    for b, rows in enumerate(tokens):
        selected = rows.any(0).nonzero().flatten()
        index[b, : len(selected)] = selected.int()
        bits[b, :, : len(selected)] = rows[:, selected]
    return SelectedTokens(index, tokens.any(1).sum(-1, dtype=torch.int32), pack_bits(bits))


def gather_tokens(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return tokens[b, index[b, m]], and zeros where the index is -1."""
    rows = tokens.gather(1, index.long().clamp(min=0)[..., None].expand(-1, -1, tokens.shape[-1]))
    return rows * (index >= 0)[..., None]


def assign_slots(
    index: torch.Tensor,
    count: torch.Tensor,
    table: torch.Tensor,
    next_free: torch.Tensor,
    *,
    capacity: int,
    width: int | None = None,
) -> AssignedSlots:
    """Give tokens without a slot the next free ones in the order (b, m). Update `table` and `next_free` in place."""
    B, (G, T), W = len(index), table.shape, index.shape[1] if width is None else width
    slots = torch.full_like(index[:, :W], -1)
    new_tokens, new_slots = torch.full((2, B * W), -1, dtype=torch.int32, device=index.device)
    taken, overflow = 0, int((count - W).clamp(min=0).sum())
    for b in range(B):
        prompt = b // (B // G)
        for m, token in enumerate(index[b, : min(W, int(count[b]))].tolist()):
            if token < 0:
                continue
            if table[prompt, token] < 0 and next_free < capacity:
                table[prompt, token] = new_slots[taken] = next_free
                new_tokens[taken] = prompt * T + token
                next_free += 1
                taken += 1
            slots[b, m] = table[prompt, token]
            overflow += int(slots[b, m] < 0)
    usable = torch.zeros_like(count) if overflow else count.clone()
    return AssignedSlots(slots, usable, new_tokens, new_slots, *index.new_tensor([[taken], [overflow]]))


def write_hr_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slots: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
) -> None:
    """Set k_pool[slots[m]] to the rotated k[m], and v_pool[slots[m]] to v[m], where the slot is not -1."""
    written = slots >= 0
    at = slots[written].long()
    k_pool[at] = rotate(k, cos[:, None], sin[:, None])[written].to(k_pool.dtype)
    v_pool[at] = v[written]


def project_hr_kv(  # noqa: PLR0913 (as the operator)
    features: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_weight: torch.Tensor,
    v_weight: torch.Tensor,
    tokens: torch.Tensor,
    slots: torch.Tensor,
    count: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    *,
    k_bias: torch.Tensor | None = None,
    v_bias: torch.Tensor | None = None,
) -> None:
    """Project the first `count` of `tokens` by two linear layers and write them as `write_hr_kv` does."""
    new = tokens[: int(count)].long()
    rows, cos, sin = (table.flatten(0, 1)[new] for table in (features, cos, sin))
    heads = k_pool.shape[1:]
    k = functional.linear(rows, k_weight, k_bias).unflatten(-1, heads)
    v = functional.linear(rows, v_weight, v_bias).unflatten(-1, heads)
    write_hr_kv(k, v, cos, sin, slots[: int(count)], k_pool, v_pool)


def softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the softmax over the last dimension; a row of -inf gives zeros."""
    seen = logits.isfinite().any(-1, keepdim=True)
    return torch.where(seen, logits.masked_fill(~seen, 0).softmax(-1), 0)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Return x = (x1, x2), in halves, as x * cos + (-x2, x1) * sin."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def visible_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    kv_start: torch.Tensor | None,
    kv_len: torch.Tensor | None,
    key_mask: torch.Tensor | None,
    window: int = 0,
    bidirectional_ranges: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return which sequence keys each query sees, [B, N, Nk] bool."""
    B, N, Nk = q.shape[0], q.shape[2], k.shape[2]
    key = torch.arange(Nk, device=q.device)
    end = kv_len.long() if kv_len is not None else torch.full((B,), Nk, device=q.device)
    position = end[:, None] - N + torch.arange(N, device=q.device)  # [B, N]
    visible = key <= position[..., None]
    if window:
        visible = visible & (key > position[..., None] - window)
    if bidirectional_ranges is not None:
        begin, end = bidirectional_ranges.long()[:, :, None].unbind(-1)  # [B, G, 1] each
        holds_query = (begin <= position[:, None]) & (position[:, None] < end)  # [B, G, N]
        holds_key = (begin <= key) & (key < end)  # [B, G, Nk]
        visible = visible | (holds_query[..., None] & holds_key[:, :, None]).any(1)
    if kv_start is not None:
        visible = visible & (key >= kv_start.long()[:, None, None])
    if key_mask is not None:
        visible = visible & (key_mask if key_mask.dtype == torch.bool else unpack_bits(key_mask, Nk))[:, None]
    return visible


def cap(logits: torch.Tensor, softcap: float) -> torch.Tensor:
    """Return softcap * tanh(logits / softcap), or the logits themselves if `softcap` is 0."""
    return softcap * (logits / softcap).tanh() if softcap else logits


def visible_hr_keys(
    N: int,
    M: int,
    hr_count: torch.Tensor,
    hr_from: torch.Tensor | None,
    hr_rows: torch.Tensor | None,
    hr_row_bits: torch.Tensor | None,
) -> torch.Tensor:
    """Return which HR keys of its sample each query sees, [B, N, M] bool."""
    device = hr_count.device
    owned = torch.arange(M, device=device) < hr_count[:, None]  # [B, M]
    if hr_from is not None:
        return (torch.arange(N, device=device) >= hr_from[:, None])[..., None] & owned[:, None]
    sees = torch.zeros(len(hr_count), N, M, dtype=torch.bool, device=device)
    chosen = owned[:, None].expand(-1, hr_rows.shape[1], -1)
    if hr_row_bits is not None:
        chosen = chosen & unpack_bits(hr_row_bits, M)
    for b, r in (hr_rows >= 0).nonzero().tolist():
        sees[b, hr_rows[b, r]] = chosen[b, r]
    return sees


def maps(
    probabilities: torch.Tensor, hr_rows: torch.Tensor | None, map_ranges: torch.Tensor | None, map_size: int
) -> torch.Tensor:
    """Return the maps [B, R, I, map_size] of probabilities [B, H, N, Nk], summed over heads."""
    B, _, N, _ = probabilities.shape
    R = 1 if hr_rows is None else hr_rows.shape[1]
    images = 0 if map_ranges is None else map_ranges.shape[1]
    result = probabilities.new_zeros(B, R, images, map_size)
    for b in range(B):
        for r in range(R):
            row = N - 1 if hr_rows is None else int(hr_rows[b, r])
            for i in range(images):
                first, last = map_ranges[b, i].tolist()
                if row >= 0 and last > first:
                    result[b, r, i] = probabilities[b, :, row, first:last].sum(0)
    return result


def hierarchical_attention(  # noqa: PLR0913 (as the operator)
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    kv_start: torch.Tensor | None = None,
    kv_len: torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    window: int = 0,
    bidirectional_ranges: torch.Tensor | None = None,
    softcap: float = 0.0,
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
    """Equations 3 to 7, with the released code's rows, mixing and map as options."""
    B, H, N, d = q.shape
    Nk, group, scale = k.shape[2], H // k.shape[1], d**-0.5 if scale is None else scale
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = visible_keys(q, k, kv_start, kv_len, key_mask, window, bidirectional_ranges)
    logits = cap(q @ keys.transpose(-1, -2) * scale, softcap).masked_fill(~visible[:, None], -torch.inf)

    M = 0 if k_hr is None else hr_slots.shape[1]
    sees = torch.zeros(B, N, M, dtype=torch.bool, device=q.device)
    hr_logits, hr_values = q.new_zeros(B, H, N, 0), q.new_zeros(B, H, 0, d)
    if M:
        sees = visible_hr_keys(N, M, hr_count, hr_from, hr_rows, hr_row_bits)
        slots = hr_slots.long().clamp(0, k_hr.shape[0] - 1)
        hr_keys = k_hr[slots].transpose(1, 2).repeat_interleave(group, 1)  # [B, H, M, d]
        hr_values = v_hr[slots].transpose(1, 2).repeat_interleave(group, 1)
        hr_logits = cap(q @ hr_keys.transpose(-1, -2) * scale, softcap).masked_fill(~sees[:, None], -torch.inf)

    all_logits = torch.cat([logits, hr_logits], -1)
    plain, full = softmax(logits), softmax(all_logits)
    with_hr = full[..., :Nk] @ values + full[..., Nk:] @ hr_values
    mixing = sees.any(-1)[:, None, :, None].to(q.dtype)
    if alpha is not None:
        mixing = mixing * alpha.to(q.dtype)[:, None, None, None]
    out = (1 - mixing) * (plain @ values) + mixing * with_hr
    attention_map = maps(full[..., :Nk] if map_over_all else plain, hr_rows, map_ranges, map_size)
    return Attention(out.transpose(1, 2), all_logits.logsumexp(-1), logits.logsumexp(-1), attention_map)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x over its root mean square along the last dimension, times `weight`."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def llama(
    weights: dict[str, torch.Tensor],
    x: torch.Tensor,
    *,
    heads: int,
    kv_heads: int,
    eps: float,
    theta: float,
    hr_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the logits of the language model of LLaVA-HD or LLaVA-XAttn (section 5.1) for one whole sequence.

    Args:
        weights: Of `FlexAttnLlavaForConditionalGeneration.state_dict()`.
        x: [N, D] embeddings of the prompt, with the S*S image tokens in it; for LLaVA-HD, the h*h HR tokens follow
            these.
        heads: Number of query heads.
        kv_heads: Number of key heads; divides `heads`.
        eps: Epsilon of the RMS norms.
        theta: Base of the rotary frequencies.
        hr_tokens: [T, D] tokens that every row of LLaVA-XAttn also attends to.

    Returns:
        [N, V] logits.
    """
    N = len(x)
    d = weights["model.language_model.layers.0.self_attn.q_proj.weight"].shape[0] // heads
    angles = torch.arange(N).to(x)[:, None] * theta ** -(torch.arange(0, d, 2).to(x) / d)
    cos, sin = (table.repeat(1, 2) for table in (angles.cos(), angles.sin()))

    def project(x: torch.Tensor, name: str) -> torch.Tensor:  # -> [heads, N, d]
        return (x @ weights[name].T).unflatten(-1, (-1, d)).transpose(0, 1)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        k, v = (part.repeat_interleave(len(q) // len(part), 0) for part in (k, v))
        logits = (q @ k.transpose(-1, -2) * d**-0.5).masked_fill(~seen, -torch.inf)
        return (softmax(logits) @ v).transpose(0, 1).flatten(1)

    causal = torch.ones(N, N, dtype=torch.bool, device=x.device).tril()
    layers = sum(name.endswith("self_attn.q_proj.weight") and ".language_model." in name for name in weights)
    for layer in range(layers):
        at = f"model.language_model.layers.{layer}."
        normed = rms_norm(x, weights[f"{at}input_layernorm.weight"], eps)
        q, k, v = (project(normed, f"{at}self_attn.{name}_proj.weight") for name in "qkv")
        x = x + attend(rotate(q, cos, sin), rotate(k, cos, sin), v, causal) @ weights[f"{at}self_attn.o_proj.weight"].T
        if hr_tokens is not None:
            q = project(rms_norm(x, weights[f"{at}cross_attn.norm.weight"], eps), f"{at}cross_attn.q_proj.weight")
            k, v = (project(hr_tokens, f"{at}cross_attn.{name}_proj.weight") for name in "kv")
            everything = torch.ones(N, len(hr_tokens), dtype=torch.bool, device=x.device)
            x = x + attend(q, k, v, everything) @ weights[f"{at}cross_attn.o_proj.weight"].T
        normed = rms_norm(x, weights[f"{at}post_attention_layernorm.weight"], eps)
        gate, up = (normed @ weights[f"{at}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (functional.silu(gate) * up) @ weights[f"{at}mlp.down_proj.weight"].T
    return rms_norm(x, weights["model.language_model.norm.weight"], eps) @ weights["lm_head.weight"].T
