"""Generated calls of the operators: odd sizes, empty and full selections, GQA, padding, holes, any strides."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from operator_arguments import AttentionSizes, RandomTensors

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
    """The same values with other strides: dense, a view of [B, N, H, d] as in transformers, or a slice."""
    if how == 1:
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if how == 2:
        return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]
    return x


@st.composite
def attention_sizes(draw, small: bool) -> AttentionSizes:
    B = draw(st.integers(1, 3))
    Hkv, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 4), (1, 8)]))
    N = draw(st.sampled_from([1, 2, 5, 9] if small else [1, 2, 17, 63, 64, 65, 127, 130]))
    past = draw(st.sampled_from([0, 1, 4] if small else [0, 1, 31, 64, 515]))
    d = draw(st.sampled_from([2, 3] if small else [8, 20, 64, 80, 96, 128]))
    M = draw(st.sampled_from([0, 1, 5] if small else [0, 1, 31, 63, 64, 600]))
    return AttentionSizes(B, Hkv * group, Hkv, N, N + past, d, M)


class AttentionTensors(RandomTensors):
    """The parts of a generated call of attention."""

    def __init__(self, draw: st.DrawFn, sizes: AttentionSizes):
        super().__init__(sizes, seed=draw(st.integers(0, 2**16)))
        self.draw = draw

    def integers(self, low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high + 1, (self.sizes.B,), generator=self.generator, dtype=torch.int32)

    def sequence(self) -> dict[str, torch.Tensor]:
        x, how = self.sizes, self.draw(st.integers(0, 2))
        shapes = {"q": (x.B, x.H, x.N, x.d), "k": (x.B, x.Hkv, x.Nk, x.d), "v": (x.B, x.Hkv, x.Nk, x.d)}
        return {name: strided(self.normal(*shape), how) for name, shape in shapes.items()}

    def visible_keys(self) -> dict[str, Any]:
        x, others = self.sizes, {}
        if self.draw(st.booleans()):
            others["kv_len"] = self.integers(x.N, x.Nk)  # an unfilled tail
        if self.draw(st.booleans()):
            others["kv_start"] = self.integers(0, x.Nk // 2)  # left padding; early rows may see nothing
        if self.draw(st.booleans()):
            others["key_mask"] = self.chances(x.B, x.Nk) < 0.7
        if self.draw(st.booleans()):
            others["window"] = self.draw(st.sampled_from([1, 2, x.Nk // 3 + 1, x.Nk]))
        if count := self.draw(st.sampled_from([0, 0, 1, 3])):
            ends = others["kv_len"].tolist() if "kv_len" in others else [x.Nk] * x.B
            others["bidirectional_ranges"] = self.ranges(ends, count)
        return others

    def hr_rows(self) -> dict[str, torch.Tensor]:
        x, form = self.sizes, self.draw(st.sampled_from(["last", "from", "rows", "bits"]))
        if form == "from":
            return {"hr_from": self.integers(0, x.N)}
        if form == "last":
            return {"hr_rows": torch.full((x.B, 1), x.N - 1, dtype=torch.int32)}
        R = self.draw(st.integers(1, x.N))
        others = {"hr_rows": self.distinct(x.N, R)}
        if R > 1:
            others["hr_rows"][0, 0] = -1
        if form == "bits" and x.M:
            density = self.draw(st.sampled_from([0.1, 0.5]))
            others["hr_row_bits"] = pack_bits(self.chances(x.B, R, x.M) < density)
        return others

    def pool(self) -> dict[str, torch.Tensor]:
        return {name: self.normal(self.sizes.slots, self.sizes.Hkv, self.sizes.d) for name in ("k_hr", "v_hr")}

    def hr_slots(self) -> dict[str, torch.Tensor]:
        x = self.sizes
        in_order = torch.arange(x.B * x.M, dtype=torch.int32).view(x.B, x.M)
        others = {
            "hr_slots": in_order if self.draw(st.booleans()) else self.distinct(x.slots, x.M),
            "hr_count": self.integers(x.M if self.draw(st.booleans()) else 0, x.M),
        }
        if self.draw(st.booleans()):
            others["alpha"] = self.chances(x.B)
        return others

    def maps(self) -> dict[str, Any]:
        x = self.sizes
        if x.Nk < 2 * SIDE**2:
            return {}
        ranges = torch.tensor([[1, 1 + SIDE**2], [x.Nk - SIDE**2, x.Nk]], dtype=torch.int32).repeat(x.B, 1, 1)
        ranges[-1, 1] = 0  # one sample with a single image
        return {"map_ranges": ranges, "map_size": SIDE**2, "map_over_all": self.draw(st.booleans())}


@st.composite
def attention_cases(draw, gradients: bool = False, small: bool = False, most_work: float = math.inf) -> AttentionCase:
    tensors = AttentionTensors(draw, draw(attention_sizes(small).filter(lambda sizes: sizes.work <= most_work)))
    floats = tensors.sequence()
    others: dict[str, Any] = {"scale": tensors.sizes.d**-0.5 * draw(st.sampled_from([1.0, 3.0]))}
    others |= tensors.visible_keys() | tensors.hr_rows() | {"softcap": draw(st.sampled_from([0.0, 0.0, 2.0, 30.0]))}
    if tensors.sizes.M:
        floats |= tensors.pool()
        others |= tensors.hr_slots()
    if not gradients:
        others |= tensors.maps()
    return AttentionCase(floats, others)


@st.composite
def grids(draw) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """The LR grid of an image, and a pooled and an HR grid for it; often squares, sometimes 0 x 0."""
    if draw(st.integers(0, 7)) == 0:
        return (0, 0), (0, 0), (0, 0)
    sides = st.sampled_from([1, 2, 3, 5, 9, 12, 24])
    rows = draw(sides)
    cols = draw(sides) if draw(st.booleans()) else rows

    def hr(side: int) -> int:
        return draw(st.sampled_from([1, side, 2 * side, 3 * side, 3 * side + 1]))

    def pooled(side: int) -> int:
        return draw(st.sampled_from([1, min(side, 3), min(side, 9)]))

    if rows == cols and draw(st.booleans()):
        return (rows, rows), (pooled(rows),) * 2, (hr(rows),) * 2
    return (rows, cols), (pooled(rows), pooled(cols)), (hr(rows), hr(cols))


@st.composite
def selection_cases(draw) -> dict[str, Any]:
    """A call with grids of their own for all images, in a map and HR numbers with or without room to spare."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    B, R, images = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    of_images = [draw(grids()) for _ in range(B * images)]
    lr_grid, pool_grid, hr_grid = torch.tensor(of_images, dtype=torch.int32).view(B, images, 3, 2).unbind(2)
    spare = draw(st.sampled_from([0, 3]))
    C = int(lr_grid.prod(-1).max()) + spare
    kind = draw(st.sampled_from(["uniform", "peaks", "constant", "one", "nan"]))
    attention_map = torch.rand(B, R, images, C, generator=generator)
    if kind == "peaks":
        attention_map = attention_map**12
    elif kind == "constant":
        attention_map[:] = 0.25
    elif kind == "one":
        peak = lr_grid.prod(-1)[:, None, :, None] // 2
        attention_map = (torch.arange(C) == peak).float().expand(B, R, images, C).clone()
    elif kind == "nan":
        attention_map[0, 0, 0, :1] = torch.nan
    of_cells = torch.arange(C) < lr_grid.prod(-1)[:, None, :, None]
    attention_map = torch.where(of_cells, attention_map, torch.nan)  # what follows an image's cells is not read
    corners = (torch.rand(B, images, 2, 2, generator=generator) * (lr_grid[:, :, None] + 1)).int()
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    scale, threshold = draw(
        st.sampled_from([(255.0, 48.0), (255.0, 64.0), (1.0, 0.1875), (255.0, 0.0), (255.0, 254.0)])
    )
    return dict(
        attention_map=attention_map.to(dtype),
        lr_grid=lr_grid.contiguous(),
        hr_grid=hr_grid.contiguous(),
        hr_tokens=int(hr_grid.prod(-1).max()) + spare,
        scale=scale,
        threshold=threshold,
        pool_grid=pool_grid.contiguous() if draw(st.booleans()) else None,
        valid_rect=corners.sort(2).values.flatten(2) if draw(st.booleans()) else None,
    )


@st.composite
def slot_cases(draw) -> dict[str, Any]:
    """Calls of one pool. Later ones find tokens that earlier ones stored; some pools are too small for all."""
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
    width = draw(st.sampled_from([None, M, M // 2]))
    return dict(selections=selections, table=table, capacity=capacity, width=width)


@st.composite
def write_cases(draw) -> dict[str, torch.Tensor]:
    """Arguments of one call, in float64."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def rows(count: int) -> torch.Tensor:
        """[count, heads, d]: dense, heads outermost, a half of a fused projection, or not aligned to 16 bytes."""
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
