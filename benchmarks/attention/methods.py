"""Who computes attention: the operator, eager torch, torch's fused attention by backend, and flex_attention."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attention.case import AttentionCase

VOLTA = "ours, V100's kernels"
OURS = ("ours", VOLTA)
BACKENDS = {
    "sdpa flash": (SDPBackend.FLASH_ATTENTION, False),
    "sdpa efficient": (SDPBackend.EFFICIENT_ATTENTION, False),
    "sdpa cudnn": (SDPBackend.CUDNN_ATTENTION, True),
    "sdpa math": (SDPBackend.MATH, True),
}  # and whether it takes its mask as a tensor
METHODS = (*OURS, "eager", *BACKENDS, "flex_attention")

Method = Callable[[], tuple[torch.Tensor, torch.Tensor | None]]  # -> output, map


def methods_of(sets: list[AttentionCase], native: int) -> dict[str, list[Method]]:
    """Return the calls of every method but flex_attention, one for each set of inputs, in the order of `METHODS`.

    native: 10 * major + minor of the GPU's capability, 0 for none.
    """
    methods: dict[str, list[Method]] = {"ours": [case.ours for case in sets]}
    if sets[0].N > 16 and native != 70:
        methods[VOLTA] = [in_context(partial(capability, "70"), case.ours) for case in sets]
    methods["eager"] = [case.eager for case in sets]
    for name, (backend, as_tensor) in BACKENDS.items():
        calls = [partial(case.sdpa, mask_as_tensor=as_tensor) for case in sets]
        methods[name] = [in_context(partial(sdpa_kernel, backend), call) for call in calls]
    return methods


def in_context(context: Callable[[], AbstractContextManager], function: Callable) -> Callable:
    def call():
        with context():
            return function()

    return call


@contextmanager
def capability(value: str) -> Iterator[None]:
    """Choose kernels as on a GPU of this capability."""
    before = os.environ.get("FLEXATTN_CAPABILITY")
    os.environ["FLEXATTN_CAPABILITY"] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ["FLEXATTN_CAPABILITY"]
        else:
            os.environ["FLEXATTN_CAPABILITY"] = before


def compiled_flex_attention(case: AttentionCase, compiled: bool) -> Method:
    """Return a call of flex_attention with its block mask over the keys in the order HR, sequence, both made ahead."""
    M, past, last, all_rows = case.M, case.Nk - case.N, case.N - 1, case.rows == "all"

    def visible(b, h, q, key):
        in_sequence = (key >= M) & (key - M <= q + past)
        return in_sequence | (key < M if all_rows else (key < M) & (q == last))

    mask = create_block_mask(visible, None, None, case.N, M + case.Nk, device=case.device)
    torch.compiler.reset()  # every case is compiled for its own sizes
    attention = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention
    k, v = case.all_keys() if M else (case.k, case.v)
    return lambda: (attention(case.q, k, v, block_mask=mask).transpose(1, 2), None)
