"""Saved tensors of fused calls come back otherwise than they went: hooks that move, copy and lay them out anew."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from bn_ext.functional import batch_norm
from support import LAYOUTS, normal

F64 = torch.float64
hooks = torch.autograd.graph.saved_tensors_hooks


def other_strides(t: Tensor) -> Tensor:
    """The same values, stored with the dimensions in reverse order."""
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def with_a_gap(t: Tensor) -> Tensor:
    """The same values as a slice of something wider."""
    return torch.cat((t, t), -1)[..., : t.shape[-1]]


COMES_BACK: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "contiguous": lambda: hooks(lambda t: t, lambda t: t.contiguous()),
    "reversed": lambda: hooks(lambda t: t, lambda t: other_strides(t) if t.dim() == 3 else t),
    "sliced": lambda: hooks(lambda t: t, lambda t: with_a_gap(t) if t.dim() == 3 else t),
    "cloned": lambda: hooks(lambda t: t.clone(), lambda t: t),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", None])
@pytest.mark.parametrize("back", COMES_BACK)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "channels_first", "sliced_permuted", "expanded_last"])
def test_gradients_do_not_depend_on_how_saved_tensors_come_back(
    device: str, layout: str, back: str, activation: str | None, training: bool
) -> None:
    shape = (5, 3, 7)
    mean, var = normal((3,), F64, device, seed=5), normal((3,), F64, device, seed=6).abs() + 0.5
    found: dict[str, list[Tensor]] = {}
    for way in ("plain", back):
        x = LAYOUTS[layout](normal(shape, F64, device)).detach().requires_grad_()
        r = LAYOUTS["permuted"](normal(shape, F64, device, seed=1)).detach().requires_grad_()
        w, b = (normal((3,), F64, device, seed=k).requires_grad_() for k in (2, 3))
        g = normal(shape, F64, device, seed=4).requires_grad_()
        leaves = (x, r, w, b)

        def call(x: Tensor = x, r: Tensor = r, w: Tensor = w, b: Tensor = b) -> Tensor:
            return batch_norm(
                x, mean.clone(), var.clone(), w, b, training, residual=r, activation=activation, negative_slope=0.3
            )

        if way == "plain":
            y = call()
        else:
            with COMES_BACK[back]():
                y = call()
        first = torch.autograd.grad(y, leaves, g, retain_graph=True)
        again = torch.autograd.grad(y, leaves, g, create_graph=True)
        total = sum(t.square().sum() for t in again)
        second = torch.autograd.grad(total, (*leaves, g), allow_unused=True, materialize_grads=True)
        found[way] = [y, *first, *again, *second]
    for mine, right in zip(found[back], found["plain"], strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


def test_a_bias_that_changes_between_forward_and_backward(device: str) -> None:
    """Backward does not read it; second derivatives do, as it was."""
    x = normal((6, 4), F64, device).requires_grad_()
    found = []
    for change in (False, True):
        w, b = (normal((4,), F64, device, seed=k).requires_grad_() for k in (1, 2))
        y = batch_norm(x, None, None, w, b, True, activation="silu")
        if change:
            with torch.no_grad():
                b.mul_(-3).add_(1)
        first = torch.autograd.grad(y.square().sum(), (x, w, b), create_graph=True, retain_graph=True)
        second = torch.autograd.grad(sum(t.square().sum() for t in first), (x, w, b), retain_graph=True)
        found.append([*first, *second, *torch.autograd.grad(y.square().sum(), (x, w, b))])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu", None])
def test_an_input_that_no_gradient_needs_may_change(device: str, activation: str | None, training: bool) -> None:
    """Only the residual has a gradient, as over a frozen batch norm: it is that of what follows alone."""
    w, b = normal((4,), F64, device, seed=1), normal((4,), F64, device, seed=2)
    found = []
    for layout in ("contiguous", "permuted"):
        x = LAYOUTS[layout](normal((6, 4, 5), F64, device))
        r = normal((6, 4, 5), F64, device, seed=3).requires_grad_()
        y = batch_norm(
            x, torch.zeros_like(w), torch.ones_like(w), w, b, training, residual=r, activation=activation,
            negative_slope=0.3,
        )  # fmt: skip
        x.zero_()
        once = torch.autograd.grad(y, r, normal((6, 4, 5), F64, device, seed=4), retain_graph=True)[0]
        again = torch.autograd.grad(y, r, normal((6, 4, 5), F64, device, seed=4), create_graph=True)[0]
        slope = {"relu": 0.0, "leaky_relu": 0.3, None: 1.0}[activation]
        expected = torch.where(y > 0, 1.0, slope) * normal((6, 4, 5), F64, device, seed=4)
        torch.testing.assert_close(once, expected)
        torch.testing.assert_close(again, expected)
        found.append(once)
    torch.testing.assert_close(*found)
