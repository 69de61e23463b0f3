"""Which derivatives the operators have, and that all others are refused instead of being silently wrong."""

from __future__ import annotations

import pytest
import torch
from operator_arguments import attention_arguments, write_arguments
from torch.utils._python_dispatch import TorchDispatchMode

from flexattn_cuda import ops


class BackwardCalls(TorchDispatchMode):
    """Keeps the results of each call of the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[tuple[torch.Tensor, ...]] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.flexattn_cuda.hierarchical_attention_backward.default:
            self.results.append(result)
        return result


def small_attention(**changes):
    return ops.hierarchical_attention(**attention_arguments(**changes)).out


@pytest.mark.parametrize("name", ["q", "k", "v", "k_hr", "v_hr"])
def test_a_second_derivative_of_attention_is_refused(name):
    leaf = attention_arguments()[name].requires_grad_()
    (gradient,) = torch.autograd.grad(small_attention(**{name: leaf}).square().sum(), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="hierarchical_attention cannot be differentiated twice; use"):
        gradient.sum().backward()


def test_a_second_derivative_under_torch_func_is_refused():
    def loss(q):
        return small_attention(q=q).square().sum()

    with pytest.raises(NotImplementedError, match="hierarchical_attention cannot be differentiated twice; use"):
        torch.func.jacrev(torch.func.jacrev(loss))(attention_arguments()["q"])


def test_a_first_derivative_under_torch_func_equals_that_of_autograd():
    arguments = attention_arguments()
    leaf = arguments["q"].clone().requires_grad_()
    small_attention(**arguments | {"q": leaf}).square().sum().backward()
    gradient = torch.func.grad(lambda q: small_attention(**arguments | {"q": q}).square().sum())(leaf.detach())
    assert torch.equal(gradient, leaf.grad)


def test_a_first_derivative_may_be_part_of_a_graph_that_is_differentiated_elsewhere():
    """A gradient penalty on another term of the loss: attention itself is differentiated once."""
    q, other = attention_arguments()["q"].requires_grad_(), torch.ones(3, requires_grad=True)
    loss = small_attention(q=q).square().sum() + other.pow(3).sum()
    _, gradient = torch.autograd.grad(loss, (q, other), create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), other)
    assert torch.equal(second, torch.full((3,), 6.0))


def test_gather_is_twice_differentiable():
    tokens = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[4, -1, 0], [5, 2, 1]], dtype=torch.int32)
    assert torch.autograd.gradgradcheck(lambda tokens: ops.gather_tokens(tokens, index), tokens)


@pytest.mark.parametrize("operator", [ops.gather_tokens, torch.ops.flexattn_cuda.gather_tokens])
def test_forward_mode_is_refused(operator):
    tokens, index = torch.randn(1, 6, 3), torch.tensor([[4, -1, 0]], dtype=torch.int32)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens, torch.ones_like(tokens))
        with pytest.raises(NotImplementedError, match="gather_tokens has no forward-mode derivative"):
            operator(dual, index)
        assert operator(tokens, index).shape == (1, 3, 3)


@pytest.mark.parametrize("operator", [ops.write_hr_kv, torch.ops.flexattn_cuda.write_hr_kv])
@pytest.mark.parametrize("name", ["k", "v", "cos", "sin", "k_pool", "v_pool"])
def test_forward_mode_is_refused_by_writes_too(operator, name):
    arguments = write_arguments()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        with pytest.raises(NotImplementedError, match="write_hr_kv has no forward-mode derivative"):
            operator(**arguments | {name: dual})
        assert not arguments["v_pool"].any()
        operator(**arguments)
    assert torch.equal(arguments["v_pool"][arguments["slots"].long()], arguments["v"])


def test_forward_mode_under_torch_func_is_refused_by_writes_too():
    def pool_after(k: torch.Tensor) -> torch.Tensor:
        arguments = write_arguments(k=k)
        ops.write_hr_kv(**arguments)
        return arguments["k_pool"]

    k = write_arguments()["k"]
    with pytest.raises(NotImplementedError, match="write_hr_kv has no forward-mode derivative"):
        torch.func.jvp(pool_after, (k,), (torch.ones_like(k),))


def test_gradients_that_nobody_needs_are_absent():
    q, k = attention_arguments()["q"].requires_grad_(), attention_arguments()["k"]
    out = small_attention(q=q, k=k)
    out.sum().backward()
    assert q.grad is not None and k.grad is None
    assert [node is not None for node, _ in out.grad_fn.next_functions].count(True) == 1


@pytest.mark.parametrize("alpha", [None, torch.tensor([0.3, 1.0])], ids=["plain", "alpha"])
@pytest.mark.parametrize("asked", [("q",), ("k", "v"), ("k_hr", "v_hr"), ("q", "k_hr"), ("v",)], ids="-".join)
def test_only_the_gradients_that_are_asked_for_are_computed(asked, alpha):
    """By the operator itself; those of a key and of its value come together."""
    tensors = attention_arguments(alpha=alpha)
    floats = {name: tensors[name].requires_grad_() for name in ("q", "k", "v", "k_hr", "v_hr")}
    every = torch.autograd.grad(small_attention(**tensors).square().sum(), list(floats.values()))
    out = small_attention(**tensors | {name: x.detach() for name, x in floats.items() if name not in asked})
    with BackwardCalls() as calls:
        found = torch.autograd.grad(out.square().sum(), [floats[name] for name in asked])
    (results,) = calls.results
    groups = [("q",), ("k", "v"), ("k_hr", "v_hr")]
    wanted = {name for group in groups if set(group) & set(asked) for name in group}
    assert {name for name, x in zip(floats, results) if x.numel()} == wanted
    for name, x in zip(asked, found):
        assert torch.equal(x, every[list(floats).index(name)]), name
