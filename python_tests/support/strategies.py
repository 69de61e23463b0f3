"""Generated calls of the operators: odd sizes, empty and full selections, GQA, padding, holes, any strides."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from flexattn_cuda.ops import pack_bits

SIDE = 3  # of the LR grid of attention calls: a map range has 9 keys


@dataclass
class AttentionCase:
    """Tensors of one call in float64; `like` gives them in another dtype."""

    floats: dict[str, torch.Tensor]
    others: dict[str, Any]

    def like(self, dtype: torch.dtype, device: str = "cpu", requires_grad: bool = False) -> tuple[tuple, dict]:
        """(q, k, v) and the keyword arguments."""

        def place(value):
            return value.to(device) if isinstance(value, torch.Tensor) else value

        floats = {
            name: value.to(device, dtype).detach().requires_grad_(requires_grad) for name, value in self.floats.items()
        }
        keywords = {name: place(value) for name, value in self.others.items()}
        keywords |= {name: value for name, value in floats.items() if name.endswith("_hr")}
        return (floats["q"], floats["k"], floats["v"]), keywords

    def without(self, *names: str) -> AttentionCase:
        return replace(self, others={k: v for k, v in self.others.items() if k not in names})


def strided(x: torch.Tensor, how: int) -> torch.Tensor:
    """The same values with other strides: dense, a view of [B, N, H, d] as transformers hands over, or cut out of more."""
    if how == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 2:
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    return x


@st.composite
def attention_cases(draw, gradients: bool = False, small: bool = False) -> AttentionCase:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int32)

    B = draw(st.integers(1, 3))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 4), (1, 8)]))
    N = draw(st.sampled_from([1, 2, 5, 9] if small else [1, 2, 17, 63, 64, 65, 127, 130]))
    past = draw(st.sampled_from([0, 1, 4] if small else [0, 1, 31, 64, 515]))
    d = draw(st.sampled_from([2, 3] if small else [8, 20, 64, 80, 96, 128]))
    M = draw(st.sampled_from([0, 1, 5] if small else [0, 1, 31, 63, 64, 600]))
    Nk, pool = N + past, B * M + 3
    shape = draw(st.integers(0, 2))
    floats = {
        "q": strided(normal(B, kv_heads * group, N, d), shape),
        "k": strided(normal(B, kv_heads, Nk, d), shape),
        "v": strided(normal(B, kv_heads, Nk, d), shape),
    }
    others: dict[str, Any] = {"scale": d**-0.5 * draw(st.sampled_from([1.0, 3.0]))}
    if draw(st.booleans()):
        others["kv_len"] = integers(N, Nk, B)  # an unfilled tail
    if draw(st.booleans()):
        others["kv_start"] = integers(0, Nk // 2, B)  # left padding; early rows may see nothing
    if draw(st.booleans()):
        others["key_mask"] = torch.rand(B, Nk, generator=generator) < 0.7
    form = draw(st.sampled_from(["last", "from", "rows", "bits"]))
    R = 1
    if form == "from":
        others["hr_from"] = integers(0, N, B)
    else:
        R = 1 if form == "last" else draw(st.integers(1, N))
        rows = torch.stack([torch.randperm(N, generator=generator)[:R] for _ in range(B)]).int()
        if form == "last":
            rows[:] = N - 1
        elif R > 1:
            rows[0, 0] = -1
        others["hr_rows"] = rows
    if M:
        floats["k_hr"], floats["v_hr"] = normal(pool, kv_heads, d), normal(pool, kv_heads, d)
        slots = torch.arange(B * M).view(B, M) if draw(st.booleans()) else torch.stack(
            [torch.randperm(pool, generator=generator)[:M] for _ in range(B)]
        )  # fmt: skip
        others["hr_slots"] = slots.int()
        others["hr_count"] = torch.full((B,), M, dtype=torch.int32) if draw(st.booleans()) else integers(0, M, B)
        if form == "bits":
            others["hr_row_bits"] = pack_bits(
                torch.rand(B, R, M, generator=generator) < draw(st.sampled_from([0.1, 0.5]))
            )
        if draw(st.booleans()):
            others["alpha"] = torch.rand(B, generator=generator)
    if Nk >= 2 * SIDE**2 and not gradients:
        first = torch.tensor([[1, 1 + SIDE**2], [Nk - SIDE**2, Nk]], dtype=torch.int32)
        ranges = first.expand(B, 2, 2).clone()
        ranges[-1, 1] = 0  # one sample with a single image
        others |= {"map_ranges": ranges, "map_size": SIDE**2, "map_over_all": draw(st.booleans())}
    return AttentionCase(floats, others)


@st.composite
def selection_cases(draw) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    B, R, I = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    S = draw(st.sampled_from([1, 2, 5, 9, 12, 24]))
    kind = draw(st.sampled_from(["uniform", "peaks", "constant", "one", "nan"]))
    attention_map = torch.rand(B, R, I, S * S, generator=generator)
    if kind == "peaks":
        attention_map = attention_map**12
    elif kind == "constant":
        attention_map[:] = 0.25
    elif kind == "one":
        attention_map = (torch.arange(S * S) == S * S // 2).float().expand(B, R, I, -1).clone()
    elif kind == "nan":
        attention_map[0, 0, 0, 0] = torch.nan
    corners = torch.randint(0, S + 1, (B, I, 2, 2), generator=generator).sort(2).values
    whole = torch.tensor([0, 0, S, S]).expand(B, I, 4)
    valid_rect = (corners.flatten(2) if draw(st.booleans()) else whole).int().clone()
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, threshold = draw(
        st.sampled_from([(255.0, 48.0), (255.0, 64.0), (1.0, 0.1875), (255.0, 0.0), (255.0, 254.0)])
    )
    return dict(
        attention_map=attention_map.to(dtype),
        valid_rect=valid_rect,
        hr_side=draw(st.sampled_from([1, S, 2 * S, 3 * S, 4 * S + 1])),
        scale=scale,
        threshold=threshold,
        pool_side=draw(st.sampled_from([0, 1, min(S, 3), min(S, 9)])),
    )


@st.composite
def slot_cases(draw) -> dict[str, Any]:
    """Calls of one pool, the later ones finding tokens that the earlier ones stored; some pools are too small for all."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    (G, beams), T = (
        draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 3), (2, 2)])),
        draw(st.sampled_from([1, 5, 40, 1100, 2500])),
    )
    B = G * beams
    M, calls = draw(st.sampled_from([0, 1, T // 2, T])), draw(st.integers(1, 3))
    selections = []
    for _ in range(calls):
        index = torch.stack([torch.randperm(T, generator=generator)[:M] for _ in range(B)]).int()
        if draw(st.booleans()):
            index[:, ::3] = -1
        count = torch.randint(0, M + 1, (B,), generator=generator, dtype=torch.int32)
        selections.append((index, count))
    padded = draw(st.booleans())  # the table's rows stand apart
    table = torch.full((G, T + 7 * padded), -1, dtype=torch.int32)[:, :T]
    capacity = draw(st.sampled_from([0, 1, G * T // 3, G * T]))
    return dict(selections=selections, table=table, capacity=capacity)


@st.composite
def write_cases(draw) -> dict[str, torch.Tensor]:
    """Arguments of one call, in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rows(count: int) -> torch.Tensor:
        """[count, heads, d]: dense, heads apart from each other, a half of a fused projection, or off a 16-byte border."""
        how = draw(st.sampled_from(["dense", "heads first", "fused", "odd"]))
        if how == "heads first":
            return normal(heads, count, d).transpose(0, 1)
        if how == "fused":
            return normal(count, 2, heads, d)[:, 1]
        return normal(count, heads, d + 1)[..., 1:] if how == "odd" else normal(count, heads, d)

    M, heads = draw(st.sampled_from([0, 1, 7, 40])), draw(st.integers(1, 4))
    d, pool = draw(st.sampled_from([2, 6, 16, 20, 64, 80, 128])), M + draw(st.integers(0, 5))
    slots = torch.randperm(pool, generator=generator)[:M].int()
    slots[torch.rand(M, generator=generator) < draw(st.sampled_from([0.0, 0.3]))] = -1
    angles = 7 * normal(M, d)  # the two halves of a rotary table are equal; the operator does not count on it
    tables = dict(cos=angles.cos(), sin=angles.sin())
    return dict(k=rows(M), v=rows(M), slots=slots, k_pool=rows(pool), v_pool=rows(pool)) | tables
