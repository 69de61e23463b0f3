"""One call of hierarchical_attention with random inputs; the same in eager torch, and with torch's fused attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from flexattn_cuda import ops


@dataclass
class AttentionCase:
    """N queries at the end of Nk keys, and M HR keys of each sample, seen by its last row or by all.

    map_over_all: The map's softmax is that over all keys (the paper's form); needs rows "all".
    joined: Methods that need keys and values of both kinds in one tensor get them joined ahead, not in every call.
    """

    N: int
    Nk: int
    M: int
    rows: str = "last"
    dtype: torch.dtype = torch.float32
    batch: int = 1
    heads: int = 16
    kv_heads: int = 16
    head_dim: int = 64
    side: int = 24  # of the LR grid
    first: int = 32  # LR key of the image
    map_over_all: bool = False
    joined: bool = False
    backward: bool = False
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        self._make_tensors()
        self.hidden = torch.ones(self.N, self.Nk, device=self.device).tril(self.Nk - self.N) == 0
        self.options = self._options()
        self._joined = self._join() if self.joined and self.M else None

    def _make_tensors(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, device=self.device)
            return values.to(self.dtype).requires_grad_(self.backward)

        B, G, d, M = self.batch, self.kv_heads, self.head_dim, self.M
        self.q = normal(B, self.heads, self.N, d)
        self.k, self.v = normal(B, G, self.Nk, d), normal(B, G, self.Nk, d)
        self.k_hr, self.v_hr = normal(B * M, G, d), normal(B * M, G, d)
        self.weight = normal(B, self.N, self.heads, d).detach()
        self.leaves = [self.q, self.k, self.v] + ([self.k_hr, self.v_hr] if M else [])

    def _options(self) -> dict:
        """Return the operator's keyword arguments."""

        def each(*values: int) -> torch.Tensor:
            return torch.tensor([values], dtype=torch.int32, device=self.device).expand(self.batch, -1).contiguous()

        cells, count = self.side**2, self.batch * self.M
        options = {
            "kv_start": each(0)[:, 0],
            "kv_len": each(self.Nk)[:, 0],
            "map_ranges": each(self.first, self.first + cells)[:, None],
            "map_size": cells,
            "map_over_all": self.map_over_all,
        }
        if self.M:
            slots = torch.arange(count, dtype=torch.int32, device=self.device).view(self.batch, self.M)
            options |= {"k_hr": self.k_hr, "v_hr": self.v_hr, "hr_slots": slots, "hr_count": each(self.M)[:, 0]}
        if self.M and self.rows == "all":
            return options | {"hr_from": each(0)[:, 0]}
        return options | {"hr_rows": each(self.N - 1)}

    def ours(self) -> tuple[torch.Tensor, torch.Tensor]:
        result = ops.hierarchical_attention(self.q, self.k, self.v, **self.options)
        return result.out, result.map

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self.heads // self.kv_heads, 1) if self.kv_heads != self.heads else x

    def _join(self) -> tuple[torch.Tensor, torch.Tensor]:
        """HR keys come first: so the mask of rows that see them all is causal, aligned at its lower right corner."""
        tokens = self.options["hr_slots"].long()

        def join(pool: torch.Tensor, sequence: torch.Tensor) -> torch.Tensor:
            return self._heads(torch.cat([pool[tokens].transpose(1, 2), sequence], 2))

        return join(self.k_hr, self.k), join(self.v_hr, self.v)

    def all_keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._joined or self._join()

    @cached_property
    def hidden_of_all(self) -> torch.Tensor:
        return functional.pad(self.hidden, (self.M, 0))

    def _softmax(self, q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor | None) -> torch.Tensor:
        logits = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        return logits.softmax(-1, dtype=torch.float32).to(q.dtype)

    def eager(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend to the sequence in every row, and over all keys in rows that see HR keys. Return output and map."""
        hidden = None if self.N == 1 else self.hidden
        k, v = self._heads(self.k), self._heads(self.v)
        if self.M and self.rows == "all":
            all_k, all_v = self.all_keys()
            weights = self._softmax(self.q, all_k, None if self.N == 1 else self.hidden_of_all)
            out = torch.matmul(weights, all_v)
            plain = weights[..., self.M :] if self.map_over_all else self._softmax(self.q[:, :, -1:], k, None)
        else:
            plain = self._softmax(self.q, k, hidden)
            if not self.M or self.N > 1:
                out = torch.matmul(plain, v)
            if self.M:
                all_k, all_v = self.all_keys()
                last = torch.matmul(self._softmax(self.q[:, :, -1:], all_k, None), all_v)
                out = last if self.N == 1 else self._with_last(out, last)
        attention_map = plain[:, :, -1, self.first : self.first + self.side**2].detach().float().sum(1)
        return out.transpose(1, 2), attention_map.view(self.batch, 1, 1, -1)

    def _with_last(self, out: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        if self.backward:  # which needs the output as it was
            return torch.cat([out[:, :, :-1], last], 2)
        out[:, :, -1:] = last
        return out

    def sdpa(self, mask_as_tensor: bool = True) -> tuple[torch.Tensor, None]:
        """Call torch's fused attention on the same keys and mask; it has no map.

        mask_as_tensor: If False, a mask is given as torch's causal bias.
        """
        attention = functional.scaled_dot_product_attention
        if not self.M:
            out = attention(self.q, self._heads(self.k), self._heads(self.v), is_causal=self.N > 1)
        elif self.rows == "all" or self.N == 1:
            mask = None
            if self.N > 1:
                mask = ~self.hidden_of_all if mask_as_tensor else causal_lower_right(self.N, self.M + self.Nk)
            out = attention(self.q, *self.all_keys(), attn_mask=mask)
        else:
            out = attention(self.q, self._heads(self.k), self._heads(self.v), is_causal=True)
            out = self._with_last(out, attention(self.q[:, :, -1:], *self.all_keys()))
        return out.transpose(1, 2), None

    def run(self, method: str) -> Callable:
        """Return the call of "ours", "eager" or "sdpa"; with `backward`, of its gradients."""
        function = getattr(self, method)
        if not self.backward:
            return function
        return lambda: torch.autograd.grad(function()[0], self.leaves, self.weight)
