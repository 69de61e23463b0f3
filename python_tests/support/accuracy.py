"""How far from the float64 reference an operator may be."""

from __future__ import annotations

import torch


def floor(dtype: torch.dtype, magnitude: float) -> float:
    """Absolute error that rounding alone explains.

    Inputs are given in `dtype`, sums are kept in float32 (float64 for float64). A logit is a sum of d <= 128 products
    and has an error of about sqrt(d) * eps_sum of its size; an output is an average of values of size `magnitude` with
    such weights, rounded once to `dtype`: one unit of the storage type, and 64 of the type of the sums (sqrt(128) for
    the logit, times a logit of size ~5).
    """
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    return magnitude * (torch.finfo(dtype).eps + 64 * torch.finfo(sums).eps)


def assert_as_good_as_eager(ours, eager, exact, dtype, what, cancelled=1.0):
    """Our error is at most twice that of the same formulas in eager torch and the same dtype, or below the floor.

    cancelled: Size of the sums that cancel on the way to the result, over the result's.
    """
    exact = exact.double()
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{what}: not finite where it should be, or the other way round"
    ours, eager, exact = ours.double()[finite], eager.double()[finite], exact[finite]
    if not exact.numel():
        return
    error, theirs = ((ours - exact).abs().max().item(), (eager - exact).nan_to_num(0).abs().max().item())
    allowed = 2 * theirs + floor(dtype, cancelled * max(1.0, exact.abs().max().item()))
    assert error <= allowed, f"{what}: error {error:.3g}, eager torch has {theirs:.3g}, allowed {allowed:.3g}"
