"""One call of hierarchical_attention with random inputs, and the same thing in eager torch and with torch's fused attention."""

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
    joined: Keys and values of both kinds are put into one tensor ahead for those that need that, not in every call.
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

    def __post_init__(self):
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def normal(*shape):
            return (
                torch.randn(*shape, generator=generator, device=self.device)
                .to(self.dtype)
                .requires_grad_(self.backward)
            )

        def each(*values):
            return torch.tensor([values], dtype=torch.int32, device=self.device).expand(self.batch, -1).contiguous()

        B, G, d, M = self.batch, self.kv_heads, self.head_dim, self.M
        self.q = normal(B, self.heads, self.N, d)
        self.k, self.v = normal(B, G, self.Nk, d), normal(B, G, self.Nk, d)
        self.k_hr, self.v_hr = normal(B * M, G, d), normal(B * M, G, d)
        self.weight = normal(B, self.N, self.heads, d).detach()
        self.leaves = [self.q, self.k, self.v] + ([self.k_hr, self.v_hr] if M else [])
        self.hidden = torch.ones(self.N, self.Nk, device=self.device).tril(self.Nk - self.N) == 0
        cells = self.side**2
        self.options = {"kv_start": each(0)[:, 0], "kv_len": each(self.Nk)[:, 0]}
        self.options |= {
            "map_ranges": each(self.first, self.first + cells)[:, None],
            "map_size": cells,
            "map_over_all": self.map_over_all,
        }
        if M:
            slots = torch.arange(B * M, dtype=torch.int32, device=self.device).view(B, M)
            self.options |= {
                "k_hr": self.k_hr,
                "v_hr": self.v_hr,
                "hr_slots": slots,
                "hr_count": each(M)[:, 0],
            }
        self.options |= {"hr_from": each(0)[:, 0]} if self.rows == "all" and M else {"hr_rows": each(self.N - 1)}
        self._joined = self._join() if self.joined and M else None

    def ours(self):
        result = ops.hierarchical_attention(self.q, self.k, self.v, **self.options)
        return result.out, result.map

    def _heads(self, x):
        return x.repeat_interleave(self.heads // self.kv_heads, 1) if self.kv_heads != self.heads else x

    def _join(self):
        """HR keys first: so the mask of rows that see them all is causal, aligned at its lower right corner."""
        tokens = self.options["hr_slots"].long()
        join = lambda pool, seq: torch.cat([pool[tokens].transpose(1, 2), seq], 2)  # noqa: E731
        return self._heads(join(self.k_hr, self.k)), self._heads(join(self.v_hr, self.v))

    def all_keys(self):
        return self._joined or self._join()

    @cached_property
    def hidden_of_all(self):
        return functional.pad(self.hidden, (self.M, 0))

    def _softmax(self, q, k, hidden):
        logits = torch.matmul(q, k.transpose(2, 3)) * self.head_dim**-0.5
        if hidden is not None:
            logits = logits.masked_fill(hidden, -torch.inf)
        return logits.softmax(-1, dtype=torch.float32).to(q.dtype)

    def eager(self):
        """Sequence attention for every row; the rows that see HR keys once more over all keys. With the map."""
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
        map = plain[:, :, -1, self.first : self.first + self.side**2].detach().float().sum(1)
        return out.transpose(1, 2), map.view(self.batch, 1, 1, -1)

    def _with_last(self, out, last):
        if self.backward:  # the output is kept for it
            return torch.cat([out[:, :, :-1], last], 2)
        out[:, :, -1:] = last
        return out

    def sdpa(self, mask_as_tensor: bool = True):
        """torch's fused attention on the same keys and mask; it has no map.

        mask_as_tensor: Else as torch's causal bias, where a mask is needed at all.
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

    def run(self, which: str) -> Callable:
        function = getattr(self, which)
        if not self.backward:
            return function
        return lambda: torch.autograd.grad(function()[0], self.leaves, self.weight)
