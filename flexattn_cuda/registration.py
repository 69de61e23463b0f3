"""What torch must know of the operators besides their kernels: output shapes, derivatives, version counters and FLOPs.

csrc/torch registers the schemas and the CPU and CUDA implementations; importing this module adds the rest. Arguments of
attention are looked up by their names in the schema, so that their list is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import Function, forward_ad
from torch.utils.flop_counter import register_flop_formula

from flexattn_cuda import native

assert native.compiled, "importing it registers the schemas"

SELECT_TOKENS: OpOverload = torch.ops.flexattn_cuda.select_tokens.default
GATHER_TOKENS: OpOverload = torch.ops.flexattn_cuda.gather_tokens.default
GATHER_TOKENS_BACKWARD: OpOverload = torch.ops.flexattn_cuda.gather_tokens_backward.default
ASSIGN_SLOTS: OpOverload = torch.ops.flexattn_cuda.assign_slots.default
WRITE_HR_KV: OpOverload = torch.ops.flexattn_cuda.write_hr_kv.default
PROJECT_HR_KV: OpOverload = torch.ops.flexattn_cuda.project_hr_kv.default
ATTENTION: OpOverload = torch.ops.flexattn_cuda.hierarchical_attention.default
ATTENTION_BACKWARD: OpOverload = torch.ops.flexattn_cuda.hierarchical_attention_backward.default

# The gradients that each flag of the backward pass asks for, in the order of its results.
_GRADIENTS_BY_FLAG = {"query_gradient": ("q",), "key_gradients": ("k", "v"), "hr_gradients": ("k_hr", "v_hr")}

_LIBRARY = torch.library.Library("flexattn_cuda", "FRAGMENT")
_INT32: dict[str, Any] = {"dtype": torch.int32}
_WORD = 32
_Function = TypeVar("_Function", bound=Callable[..., Any])


# -------------------------------------------------------------------------------------------------------------- Calling
#
# What is registered from Python takes longer than a small call itself. `call` and `call_writing` bypass it when it has
# nothing to do; other callers of torch.ops.flexattn_cuda go through it and get the same results.


def call(operator: OpOverload, *arguments: Any) -> Any:
    """Call a differentiable operator, bypassing autograd if nothing is differentiated."""
    if torch.compiler.is_compiling():
        return operator(*arguments)
    if _may_be_differentiated(arguments):
        return _DERIVATIVES[operator].apply(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def call_writing(operator: OpOverload, *arguments: Any) -> Any:
    """Call an operator that writes arguments, and bump their version counters outside of the dispatcher."""
    if torch.compiler.is_compiling() or _may_be_differentiated(arguments):
        return operator(*arguments)
    with torch._C._AutoDispatchBelowADInplaceOrView():
        result = operator(*arguments)
    torch.autograd.graph.increment_version([arguments[i] for i in _WRITTEN[operator]])
    return result


def _may_be_differentiated(arguments: tuple[Any, ...]) -> bool:
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments))
    )


# --------------------------------------------------------------------------------------------------------------- Shapes


def _by_name(operator: OpOverload, arguments: tuple[Any, ...]) -> SimpleNamespace:
    """Return the positional arguments of a call by the names in the operator's schema."""
    return SimpleNamespace(**{declared.name: value for declared, value in zip(operator._schema.arguments, arguments)})


def _shapes_of(operator: OpOverload) -> Callable[[_Function], _Function]:
    """Register a function that returns an operator's outputs as empty tensors. Sizes may be symbolic."""
    return torch.library.register_fake(operator.name(), lib=_LIBRARY)  # type: ignore[no-any-return]


@_shapes_of(SELECT_TOKENS)
def _select_tokens(*arguments: Any) -> tuple[Tensor, ...]:
    given = _by_name(SELECT_TOKENS, arguments)
    B, R, images, _ = given.attention_map.shape
    tokens = images * given.hr_tokens
    return tuple(
        given.attention_map.new_empty(size, **_INT32)
        for size in ((B, tokens), (B,), (B, R, (tokens + _WORD - 1) // _WORD))
    )


@_shapes_of(GATHER_TOKENS)
def _gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[0], index.shape[1], tokens.shape[2])


@_shapes_of(GATHER_TOKENS_BACKWARD)
def _gather_tokens_backward(grad: Tensor, index: Tensor, num_tokens: int) -> Tensor:
    return grad.new_empty(grad.shape[0], num_tokens, grad.shape[2])


@_shapes_of(ASSIGN_SLOTS)
def _assign_slots(*arguments: Any) -> tuple[Tensor, ...]:
    given = _by_name(ASSIGN_SLOTS, arguments)
    B, W = given.index.shape[0], given.width
    return tuple(given.index.new_empty(size) for size in ((B, W), (B,), (B * W,), (B * W,), (1,), (1,)))


@_shapes_of(WRITE_HR_KV)
def _write_hr_kv(*arguments: Tensor) -> None:
    return None


@_shapes_of(PROJECT_HR_KV)
def _project_hr_kv(*arguments: Tensor | None) -> None:
    return None


@_shapes_of(ATTENTION)
def _attention(*arguments: Any) -> tuple[Tensor, ...]:
    given = _by_name(ATTENTION, arguments)
    B, H, N, d = given.q.shape
    R = 1 if given.hr_rows is None else given.hr_rows.shape[1]
    images = 0 if given.map_ranges is None else given.map_ranges.shape[1]
    statistics: dict[str, Any] = {"dtype": torch.float64 if given.q.dtype == torch.float64 else torch.float32}
    return (
        given.q.new_empty(B, N, H, d),
        given.q.new_empty(B, H, N, **statistics),
        given.q.new_empty(B, H, N, **statistics),
        given.q.new_empty(B, R, images, given.map_size, **statistics),
    )


@_shapes_of(ATTENTION_BACKWARD)
def _attention_backward(*arguments: Any) -> tuple[Tensor, ...]:
    given = _by_name(ATTENTION_BACKWARD, arguments)
    shapes = (
        (0,) if getattr(given, name) is None or not getattr(given, flag) else getattr(given, name).shape
        for flag, names in _GRADIENTS_BY_FLAG.items()
        for name in names
    )
    return tuple(map(given.q.new_empty, shapes))


# ---------------------------------------------------------------------------------------------------------- Derivatives
#
# A gradient may arrive expanded from a constant, without a dense last dimension: hence `contiguous`.


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, index = inputs
    ctx.save_for_backward(index)
    ctx.num_tokens = tokens.shape[1]


def _gather_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return call(GATHER_TOKENS_BACKWARD, grad.contiguous(), index, ctx.num_tokens), None


def _save_gather_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, _ = inputs
    ctx.save_for_backward(index)


def _gather_second_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (index,) = ctx.saved_tensors
    return call(GATHER_TOKENS, grad.contiguous(), index), None, None


_ATTENTION_NAMES = [declared.name for declared in ATTENTION._schema.arguments]
_BACKWARD_NAMES = [declared.name for declared in ATTENTION_BACKWARD._schema.arguments]


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the schema of the backward pass names, besides what only that pass knows.

    The output stands for sums over all keys that the backward pass would otherwise repeat; with alpha it mixes two
    softmaxes, whose sums cannot be told from it.
    """
    out, lse, lse_seq, attention_map = output
    known = dict(zip(_ATTENTION_NAMES, inputs))
    known |= {"out": out if known["alpha"] is None else None, "lse": lse, "lse_seq": lse_seq}
    saved = [known[name] for name in _BACKWARD_NAMES if name != "grad_out" and name not in _GRADIENTS_BY_FLAG]
    ctx.save_for_backward(*(x if isinstance(x, Tensor) else None for x in saved))
    ctx.saved_values = [None if isinstance(x, Tensor) else x for x in saved]
    ctx.mark_non_differentiable(lse, lse_seq, attention_map)
    ctx.set_materialize_grads(False)  # the three outputs without a gradient get None, not zeros


def _attention_gradient(ctx: Any, grad_out: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * len(_ATTENTION_NAMES)
    saved = (value if tensor is None else tensor for tensor, value in zip(ctx.saved_tensors, ctx.saved_values))
    needed = dict(zip(_ATTENTION_NAMES, ctx.needs_input_grad))
    asked = (any(needed[name] for name in names) for names in _GRADIENTS_BY_FLAG.values())
    q, k, v, k_hr, v_hr = call(ATTENTION_BACKWARD, grad_out.contiguous(), *saved, *asked)
    gradients = {"q": q, "k": k, "v": v, "k_hr": k_hr, "v_hr": v_hr}
    return tuple(gradients[name] if needed[name] else None for name in _ATTENTION_NAMES)


def _save_nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _refuse_second_gradient(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "flexattn_cuda::hierarchical_attention cannot be differentiated twice;"
        " use flexattn_cuda.reference.hierarchical_attention for second derivatives"
    )


def _no_forward_mode(operator: OpOverload) -> NotImplementedError:
    advice = "; use reverse mode instead" if operator in _DERIVATIVES else ""
    return NotImplementedError(f"{operator.name()} has no forward-mode derivative{advice}")


def _derivative(operator: OpOverload, save: Callable[..., None], gradient: Callable[..., Any]) -> type[Function]:
    """Make the derivative of an operator and register it.

    Not torch.library.register_autograd: it drops forward-mode tangents without a word, does not support torch.func, and
    reads the whole schema for each argument of each call, which takes 0.3 ms for attention.
    """

    def forward(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    def jvp(ctx: Any, *_: Any) -> None:
        raise _no_forward_mode(operator)

    def dispatched(*inputs: Any) -> Any:
        if torch._C._are_functorch_transforms_active():  # too late to hand them a Function
            wrapper = f"flexattn_cuda.ops.{operator._opname}"
            raise NotImplementedError(f"{operator.name()} is opaque to torch.func; call {wrapper} instead")
        return derivative.apply(*inputs)

    methods = {"forward": forward, "setup_context": save, "backward": gradient, "jvp": jvp}
    attributes = {name: staticmethod(method) for name, method in methods.items()} | {"generate_vmap_rule": True}
    derivative: type[Function] = type(f"{operator._opname}_derivative", (Function,), attributes)
    _LIBRARY.impl(operator, dispatched, "Autograd")
    return derivative


_DERIVATIVES = {
    GATHER_TOKENS: _derivative(GATHER_TOKENS, _save_gather, _gather_gradient),
    GATHER_TOKENS_BACKWARD: _derivative(GATHER_TOKENS_BACKWARD, _save_gather_backward, _gather_second_gradient),
    ATTENTION: _derivative(ATTENTION, _save_attention, _attention_gradient),
    ATTENTION_BACKWARD: _derivative(ATTENTION_BACKWARD, _save_nothing, _refuse_second_gradient),
}


# ---------------------------------------------------------------------------------------------------- Written arguments

_WRITTEN = {
    operator: [i for i, x in enumerate(operator._schema.arguments) if x.alias_info and x.alias_info.is_write]
    for operator in (ASSIGN_SLOTS, WRITE_HR_KV, PROJECT_HR_KV)
}


def _refuse_tangents(operator: OpOverload, arguments: tuple[Any, ...]) -> None:
    if forward_ad._current_level < 0:
        return
    floats = (x for x in arguments if isinstance(x, Tensor) and x.is_floating_point())
    if any(forward_ad.unpack_dual(x).tangent is not None for x in floats):
        raise _no_forward_mode(operator)


def _register_writing(operator: OpOverload) -> None:
    """Make calls bump the version counters of what they write, and refuse or pass on what torch would mishandle.

    Without the version counters, a backward pass that needs an overwritten tensor is silently wrong. Forward-mode
    tangents would be dropped. Negative views are left to the operator's own checks: torch's fallback for them aborts
    the process if an operator writes two arguments.
    """

    def bump_versions(keyset: Any, *arguments: Any) -> Any:
        _refuse_tangents(operator, arguments)
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = operator.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)
        torch.autograd.graph.increment_version([arguments[i] for i in _WRITTEN[operator]])
        return result

    _LIBRARY.impl(operator, bump_versions, "ADInplaceOrView", with_keyset=True)
    for view in ("Negative", "Conjugate"):
        _LIBRARY.impl(operator, torch.library.fallthrough_kernel, view)


for _operator in _WRITTEN:
    _register_writing(_operator)


# ---------------------------------------------------------------------------------------------------------------- FLOPs


@register_flop_formula(torch.ops.flexattn_cuda.hierarchical_attention)
def attention_flops(*shapes: Any, **_: Any) -> int:
    """Return the FLOPs of attention for torch's FlopCounterMode: 2 for each multiply-add of scores and outputs.

    As in torch's count of its own attention, causality saves nothing, nor does a window: N x Nk for the sequence. HR
    keys count for the rows that see them: R x M with `hr_rows`, N x M with `hr_from`.
    """
    given = _by_name(ATTENTION, shapes)
    B, H, N, d = given.q
    pairs = N * given.k[2]
    if given.hr_slots is not None:
        pairs += (N if given.hr_rows is None else given.hr_rows[1]) * given.hr_slots[1]
    return int(4 * B * H * pairs * d)


@register_flop_formula(torch.ops.flexattn_cuda.hierarchical_attention_backward)
def attention_backward_flops(grad_out: Any, *inputs: Any, **_: Any) -> int:
    """Return the FLOPs of the backward pass as torch counts its own: five products, where the forward pass has two."""
    return attention_flops(*inputs) * 5 // 2
