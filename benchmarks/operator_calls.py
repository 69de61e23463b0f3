"""Calls that reach every kernel of a V100 and of Turing, with sizes at which main loops outweigh the rest."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from flexattn_cuda import ops

EVERY_DTYPE = (torch.float16, torch.bfloat16, torch.float32)


class Inputs:
    """Random tensors, the same at every run."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(dtype)

    def uniform(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=dtype)

    def permutation(self, size: int) -> torch.Tensor:
        return torch.randperm(size, generator=self.generator)


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@dataclass(frozen=True)
class Attention:
    """A sample whose image has side * side keys, `selected` HR tokens of a larger pool, and one key head.

    capability: That of the GPU whose kernels are chosen, 70 for a V100.
    """

    dtype: torch.dtype
    head_dim: int
    queries: int
    keys: int
    heads: int
    selected: int
    side: int
    capability: int = 70
    backward: bool = False

    def call(self, inputs: Inputs, **more: torch.Tensor) -> None:
        """more: The rows that see HR keys, as the operator takes them, and alpha."""
        os.environ["FLEXATTN_CAPABILITY"] = str(self.capability)
        tensors = self._tensors(inputs)
        chosen = inputs.permutation(self.selected + 7)[None, : self.selected].int()
        result = ops.hierarchical_attention(
            **{name: tensor.requires_grad_(self.backward) for name, tensor in tensors.items()},
            **more,
            hr_slots=chosen,
            hr_count=int32(self.selected),
            map_ranges=int32([[5, 5 + self.side**2]]),
            map_size=self.side**2,
        )
        if self.backward:
            result.out.sum().backward()

    def _tensors(self, inputs: Inputs) -> dict[str, torch.Tensor]:
        d, pool = self.head_dim, self.selected + 7
        return {
            "q": inputs.normal(1, self.queries, self.heads, d, dtype=self.dtype).transpose(1, 2),
            "k": inputs.normal(1, self.keys, 1, d, dtype=self.dtype).transpose(1, 2),
            "v": inputs.normal(1, self.keys, 1, d, dtype=self.dtype).transpose(1, 2),
            "k_hr": inputs.normal(pool, 1, d, dtype=self.dtype),
            "v_hr": inputs.normal(pool, 1, d, dtype=self.dtype),
        }


def call_every_operator() -> None:
    """Call every kernel of the operators but those for newer GPUs."""
    inputs = Inputs()
    prefill(inputs)
    prefill_without_tensor_cores(inputs)
    decode(inputs)
    generic(inputs)
    gradients(inputs)
    gradients_without_tensor_cores(inputs)
    selection_and_pool(inputs)


def prefill(inputs: Inputs) -> None:
    def case(head_dim: int) -> Attention:
        return Attention(torch.float16, head_dim, queries=320, keys=320, heads=2, selected=130, side=16)

    for head_dim in (64, 96, 128):
        case(head_dim).call(inputs, hr_from=int32(261))  # the paper's form: the text after the image sees HR keys
    case(128).call(inputs, hr_rows=int32([319]))  # the released form: the last row does


def prefill_without_tensor_cores(inputs: Inputs) -> None:
    for dtype in EVERY_DTYPE:
        for head_dim in (256,) if dtype == torch.float16 else (64, 128, 256):
            case = Attention(dtype, head_dim, queries=192, keys=192, heads=2, selected=130, side=12)
            case.call(inputs, hr_from=int32(150))


def decode(inputs: Inputs) -> None:
    for dtype in EVERY_DTYPE:
        for head_dim in (64, 80, 96, 128):
            for heads in (1, 4):
                case = Attention(dtype, head_dim, queries=1, keys=700, heads=heads, selected=130, side=24)
                case.call(inputs, hr_rows=int32([0]))


def generic(inputs: Inputs) -> None:
    for dtype in (*EVERY_DTYPE, torch.float64):
        case = Attention(
            dtype, head_dim=128, queries=20, keys=40, heads=2, selected=33, side=4, capability=60, backward=True
        )
        case.call(inputs, hr_from=int32(10))


def gradients(inputs: Inputs) -> None:
    """Differentiate on tensor cores: a V100's blocks have eight warps, Turing's four."""
    for capability in (70, 75):
        for head_dim in (64, 96, 128):
            case = Attention(
                torch.float16, head_dim, queries=160, keys=160, heads=2, selected=130, side=12, capability=capability,
                backward=True,
            )  # fmt: skip
            case.call(inputs, hr_from=int32(101))
            if capability == 70:  # the kernels that alpha takes are the same for both
                case.call(inputs, hr_from=int32(101), alpha=torch.tensor([0.5]))


def gradients_without_tensor_cores(inputs: Inputs) -> None:
    for dtype in EVERY_DTYPE:
        for head_dim in (256,) if dtype == torch.float16 else (64, 128, 256):
            case = Attention(dtype, head_dim, queries=130, keys=130, heads=2, selected=130, side=8, backward=True)
            case.call(inputs, hr_from=int32(101))
            case.call(inputs, hr_from=int32(101), alpha=torch.tensor([0.5]))


def selection_and_pool(inputs: Inputs) -> None:
    """Select tokens, gather them, assign their slots and write their keys, in every dtype, in whole vectors and not."""
    tokens, capacity = 72 * 72, 600
    for dtype in (torch.float32, torch.float64):
        attention_map = inputs.uniform(1, 1, 1, 576, dtype=dtype)
        for margin in (None, int32([[0, 3, 24, 21]])):  # without pooling and margin, and with both
            pool_grid = None if margin is None else int32([[9, 9]])
            chosen = ops.select_tokens(
                attention_map, int32([[24, 24]]), int32([[72, 72]]), hr_tokens=tokens, scale=1, threshold=0.6,
                pool_grid=pool_grid, valid_rect=margin,
            )  # fmt: skip
    index = chosen.index[:, :capacity]
    for dtype, channels in ((torch.float16, 1024), (torch.float16, 129), (torch.float32, 129), (torch.float64, 129)):
        features = inputs.normal(1, tokens, channels, dtype=dtype).requires_grad_()
        ops.gather_tokens(features, index).sum().backward()
    table = torch.full((1, tokens), -1, dtype=torch.int32)
    slots = ops.assign_slots(index, chosen.count.clamp(max=capacity), table, int32(0), capacity=capacity)
    for dtype in (*EVERY_DTYPE, torch.float64):
        for table_dtype in {dtype, torch.float32}:
            for head_dim in (128, 6):
                rotary = [inputs.normal(64, head_dim, dtype=table_dtype) for _ in range(2)]
                rows = [inputs.normal(64, 2, head_dim, dtype=dtype) for _ in range(2)]
                pools = [inputs.normal(capacity, 2, head_dim, dtype=dtype) for _ in range(2)]
                ops.write_hr_kv(*rows, *rotary, slots.new_slots[:64], *pools)
                project_few_tokens(inputs, slots, rotary, pools)


def project_few_tokens(
    inputs: Inputs, slots: ops.AssignedSlots, rotary: list[torch.Tensor], pools: list[torch.Tensor]
) -> None:
    """Project nine tokens, in whole vectors and not."""
    (tokens, head_dim), dtype, new = rotary[0].shape, pools[0].dtype, int32(*range(9))
    for channels in (256, 129):
        weights = [inputs.normal(2 * head_dim, channels, dtype=dtype) for _ in range(2)]
        features = inputs.normal(1, tokens, channels, dtype=dtype)
        tables = [table[None] for table in rotary]
        ops.project_hr_kv(features, *tables, *weights, new, slots.new_slots[:9], int32(9), *pools)
