"""An eager graph after its forward: forward mode over it, a bias that changes, hooks that refuse, large means.

Native, and torch's operations behind it, say what is right; at large means float64 does.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import allow_mutation_on_saved_tensors, saved_tensors_hooks

import bn_ext
from bn_ext.functional import batch_norm
from support import normal

F64 = torch.float64
ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")
SLOPE = 0.2


def activated(v: Tensor, activation: str | None) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(v, SLOPE)
    if activation == "silu":
        return v * v.sigmoid()  # torch's own knows no forward mode of its gradient
    return v if activation is None else getattr(F, activation)(v)  # type: ignore[no-any-return]


def elementary(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, activation: str | None,
    mean: Tensor | None = None, var: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """act(bn(x) + residual), of operations that forward mode knows; by the batch's statistics where none are given."""
    dims = [d for d in range(x.dim()) if d != 1]
    column = (1, -1, 1)[: x.dim()]
    mean = x.mean(dims) if mean is None else mean
    var = x.var(dims, unbiased=False) if var is None else var
    y = (x - mean.view(column)) * (var + 1e-5).rsqrt().view(column)
    y = y if weight is None else y * weight.view(column)
    y = y if bias is None else y + bias.view(column)
    return activated(y if residual is None else y + residual, activation)


def call(ours: bool, x: Tensor, weight: Any, bias: Any, residual: Any, activation: Any, stats: Any) -> Tensor:
    if not ours:
        return elementary(x, weight, bias, residual, activation, *(stats or ()))
    mean, var = stats or (None, None)
    return batch_norm(
        x, mean, var, weight, bias, stats is None, 0.1, 1e-5, residual=residual, activation=activation,
        negative_slope=SLOPE,
    )  # fmt: skip


def compare(found: list[Any], right: list[Any], tolerance: float = 1e-9) -> None:
    for mine, theirs in zip(found, right, strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


# ---- forward mode over a graph that was made without it ----


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_tangent_at_the_output(
    device: str, activation: str | None, residual: bool, training: bool, create_graph: bool
) -> None:
    """Forward over reverse: the gradients' tangents are the gradients of the tangent, as they are linear in it."""
    made = [normal(s, F64, device, seed=k) for k, s in enumerate(((6, 3, 4), (3,), (3,), (6, 3, 4)))]
    stats = None if training else (normal((3,), F64, device, seed=8), normal((3,), F64, device, seed=9).abs() + 0.5)
    g, t = normal((6, 3, 4), F64, device, seed=4), normal((6, 3, 4), F64, device, seed=5)
    found = []
    for ours in (True, False):
        leaves = [m.clone().requires_grad_() for m in made[: 3 + residual]]
        y = call(ours, *(leaves if residual else [*leaves, None]), activation, stats)
        with forward_ad.dual_level():
            gradients = torch.autograd.grad(y, leaves, forward_ad.make_dual(g, t), create_graph=create_graph)
            parts = [forward_ad.unpack_dual(d) for d in gradients]
            found.append([p.primal.detach() for p in parts] + [p.tangent for p in parts])
    compare(*found)
    again = torch.autograd.grad(call(True, *(leaves if residual else [*leaves, None]), activation, stats), leaves, t)
    compare(found[0][len(leaves) :], list(again))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_tangent_at_a_second_backward(device: str, activation: str | None) -> None:
    x0, g, v, t = (normal((6, 3), F64, device, seed=k) for k in range(4))
    found = []
    for ours in (True, False):
        x = x0.clone().requires_grad_()
        y = call(ours, x, None, None, None, activation, None)
        (dx,) = torch.autograd.grad(y, x, g, create_graph=True)
        with forward_ad.dual_level():
            (second,) = torch.autograd.grad(dx, x, forward_ad.make_dual(v, t))
            found.append([forward_ad.unpack_dual(second).tangent])
    compare(*found)


def test_hessian_vector_products_of_a_network(device: str) -> None:
    """The tangent goes on to the layers before the batch norm."""
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 4), cls(4), nn.ReLU()).double().to(device) for cls in
            (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d)]  # fmt: skip
    nets[1].load_state_dict(nets[0].state_dict())
    x, g, t = normal((7, 5), F64, device), normal((7, 4), F64, device, seed=1), normal((7, 4), F64, device, seed=2)
    found = []
    for net in nets:
        y = net(x)
        with forward_ad.dual_level():
            gradients = torch.autograd.grad(y, list(net.parameters()), forward_ad.make_dual(g, t))
            found.append([forward_ad.unpack_dual(d).tangent for d in gradients])
    compare(*found)


@pytest.mark.parametrize("which", ["input", "weight", "bias", "residual"])
def test_the_operator_refuses_what_it_would_lose(device: str, which: str) -> None:
    x = normal((6, 3), F64, device)
    given = {"input": x, "weight": x[0], "bias": x[1], "residual": x + 1}
    with forward_ad.dual_level():
        given[which] = forward_ad.make_dual(given[which], given[which].cos())
        with pytest.raises(NotImplementedError, match="forward AD with bn_ext::batch_norm"):
            torch.ops.bn_ext.batch_norm(
                given["input"], given["weight"], given["bias"], None, None, None, True, 0.1, 1e-5, given["residual"]
            )


# ---- a bias that changes between forward and backward, which torch's batch norm does not look at again ----

CHANGES = {
    "multiplied": lambda b: b.mul_(3),
    "detached": lambda b: b.detach_(),
    "of large values": lambda b: b.detach().fill_(1e8),
    "infinite": lambda b: b.detach().fill_(float("inf")),
    "not a number": lambda b: b.detach().fill_(float("nan")),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_goes_by_the_bias_of_forward(device: str, activation: str | None, residual: bool, change: str) -> None:
    x0, r = normal((6, 3), F64, device), normal((6, 3), F64, device, seed=1) if residual else None
    found = []
    for ours in (True, False):
        x, leaf = x0.clone().requires_grad_(), normal((3,), F64, device, seed=2).requires_grad_()
        b = leaf * 1
        y = call(ours, x, None, b, r, activation, None)
        CHANGES[change](b)
        first = torch.autograd.grad(y.pow(2).sum(), (x, leaf), create_graph=True)
        second = torch.autograd.grad(sum(d.pow(2).sum() for d in first), (x, leaf))  # type: ignore[arg-type]
        found.append([y, *first, *second])
    compare(*found)


def test_a_parameter_may_change_its_memory(device: str) -> None:
    x = normal((6, 3), F64, device).requires_grad_()
    b = nn.Parameter(normal((3,), F64, device, seed=1))
    y = batch_norm(x, None, None, None, b, True, activation="silu")
    expected = torch.autograd.grad(y.sum(), (x, b), create_graph=True, retain_graph=True)
    b.data = torch.zeros(0, dtype=F64, device=device)
    (found,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(found, expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_second_derivatives_reach_a_bias_of_any_type(device: str, dtype: torch.dtype) -> None:
    x = normal((16, 3), torch.float32, device).requires_grad_()
    b = nn.Parameter(normal((3,), dtype, device, seed=1))
    (dx,) = torch.autograd.grad(
        batch_norm(x, None, None, None, b, True, activation="gelu").pow(2).sum(), x, create_graph=True
    )
    dx.pow(2).sum().backward()
    wide = nn.Parameter(b.detach().double())
    far = x.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(elementary(far, None, wide, None, "gelu").pow(2).sum(), far, create_graph=True)
    dx.pow(2).sum().backward()
    assert b.grad is not None and b.grad.dtype == dtype and wide.grad is not None
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(b.grad.double(), wide.grad, rtol=8 * eps, atol=8 * eps * float(wide.grad.abs().max()))


class Mark:
    """What a node's metadata keeps alive as long as the node."""


@pytest.mark.parametrize(("activation", "residual"), itertools.product(ACTIVATIONS, [False, True]))
def test_a_bias_made_of_the_output_is_freed(device: str, activation: str | None, residual: bool) -> None:
    """A node that held the bias would hold its own output."""
    x = normal((8, 3), F64, device).requires_grad_()
    r = normal((8, 3), F64, device, seed=1) if residual else None
    b = torch.zeros(3, dtype=F64, device=device, requires_grad=True) * 1
    y = batch_norm(x, None, None, None, b, True, residual=r, activation=activation)
    b.add_(y.mean(0))
    mark = Mark()
    y.grad_fn.metadata["mark"] = mark  # type: ignore[union-attr]
    watched = weakref.ref(mark)
    del y, b, mark
    gc.collect()
    assert watched() is None


# ---- float32 at large means: a graph's gradients agree with its output ----


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
@pytest.mark.parametrize("shape", [(256, 64), (32, 16, 40)], ids=["rows", "planes"])
def test_the_gate_is_that_of_the_output(device: str, shape: tuple[int, ...], activation: str, mean: float) -> None:
    x = (normal(shape, torch.float32, device) + mean).requires_grad_()
    b = torch.zeros(shape[1], device=device, requires_grad=True)
    y = batch_norm(x, None, None, None, b, True, activation=activation, negative_slope=0.0)
    dims = [d for d in range(len(shape)) if d != 1]
    live = (y > 0).float().sum(dims)
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(y.sum(), b, create_graph=create_graph, retain_graph=True)
        assert torch.equal(found, live)


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e5])
@pytest.mark.parametrize("activation", ["silu", "gelu", None])
@pytest.mark.parametrize("residual", [False, True])
def test_composed_gradients_at_large_means(device: str, residual: bool, activation: str | None, mean: float) -> None:
    """First and second derivatives of a float32 graph against float64 on the same numbers.

    What is left of a mean in x - mean is its rounding: none beside the standard deviation, whatever the mean is.
    """
    x0, g = normal((256, 16), torch.float32, device) + mean, normal((256, 16), torch.float32, device, seed=1)
    r0 = normal((256, 16), torch.float32, device, seed=2) if residual else None
    v = normal((256, 16), torch.float32, device, seed=3)
    w0, b0 = (normal((16,), torch.float32, device, seed=k).abs() + 0.5 for k in (4, 5))
    found = []
    for ours, dtype in ((True, torch.float32), (False, F64)):
        x, w, b = (t.to(dtype).requires_grad_() for t in (x0, w0, b0))
        y = call(ours, x, w, b, None if r0 is None else r0.to(dtype), activation, None)
        first = torch.autograd.grad(y, (x, w, b), g.to(dtype), create_graph=True)
        second = torch.autograd.grad(first[0], (x, w), v.to(dtype))
        found.append([*first, *second])
    for mine, right in zip(*found, strict=True):
        # Sums of 256 addends, a rounding each, on the way of which a second derivative has three.
        bound = 64 * torch.finfo(torch.float32).eps * float(right.abs().max())
        torch.testing.assert_close(mine.double(), right, rtol=0, atol=bound)


# ---- hooks that refuse ----


@pytest.mark.parametrize("at", ["input", "weight", "statistics"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_hook_that_refuses(device: str, momentum: float | None, at: str) -> None:
    """What is given to the call is saved before anything moves; the batch's statistics can only be afterwards.

    Native's running statistics go by the same rule, and checkpoints, which end their recomputation in such a hook, by
    that.
    """
    moved = []
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        norm = cls(3, momentum=momentum).to(device)
        x = normal((4, 3), torch.float32, device)

        def refuse(t: Tensor, norm: nn.BatchNorm1d = norm, x: Tensor = x) -> Tensor:
            role = "input" if t.shape == x.shape else "weight" if t is norm.weight else "statistics"
            if role == at and not (t is norm.running_mean or t is norm.running_var):
                raise OSError("no space left")
            return t

        with saved_tensors_hooks(refuse, lambda t: t), pytest.raises(OSError, match="no space left"):
            norm(x)
        moved.append(not torch.equal(norm.running_mean, torch.zeros(3, device=device)))
        if cls is bn_ext.FusedBatchNorm1d:
            assert bool(norm.num_batches_tracked) == moved[0]
    assert moved == [at == "statistics"] * 2


# ---- saved tensors that may be changed ----


@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_mutation_of_saved_tensors(device: str, training: bool, options: dict[str, bool]) -> None:
    x0 = normal((6, 3), F64, device)
    found = []
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        norm = cls(3, **options).double().to(device).train(training)
        x = x0.clone().requires_grad_()
        with allow_mutation_on_saved_tensors():
            h = x * 1
            y = norm(h)
            h.mul_(2)
            y.square().sum().backward()
        found.append([y, x.grad, *norm.buffers()])
    compare(*found)


def test_mutation_of_saved_tensors_in_the_functional_form(device: str) -> None:
    x = normal((6, 3), F64, device).requires_grad_()
    with allow_mutation_on_saved_tensors():
        mean, var = torch.zeros(3, dtype=F64, device=device), torch.ones(3, dtype=F64, device=device)
        y = batch_norm(x, mean, var, training=True, residual=x * 2, activation="relu")
        y.sum().backward()
    other = x.detach().clone().requires_grad_()
    elementary(other, None, None, other * 2, "relu").sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-9, atol=1e-9)


# ---- tensors of inference mode, where nothing of them is kept ----


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu"])
def test_a_residual_that_is_not_kept_may_be_of_inference_mode(device: str, activation: str) -> None:
    with torch.inference_mode():
        frozen = normal((6, 3), F64, device)
    x = normal((6, 3), F64, device, seed=1).requires_grad_()
    batch_norm(x, None, None, None, None, True, residual=frozen, activation=None if activation == "identity" else
               activation).square().sum().backward()  # fmt: skip
    other = x.detach().clone().requires_grad_()
    named = None if activation == "identity" else activation
    (F.batch_norm(other, None, None, training=True) + frozen if named is None else
     activated_native(other, frozen, named)).square().sum().backward()  # fmt: skip
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-9, atol=1e-9)


def activated_native(x: Tensor, residual: Tensor, activation: str) -> Tensor:
    v = F.batch_norm(x, None, None, training=True) + residual
    return F.leaky_relu(v, 0.01) if activation == "leaky_relu" else F.relu(v)


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_an_input_that_is_not_kept_may_be_of_inference_mode(device: str, activation: str | None) -> None:
    with torch.inference_mode():
        frozen = normal((6, 3), F64, device)
    r = normal((6, 3), F64, device, seed=1).requires_grad_()
    y = batch_norm(frozen, None, None, None, None, True, residual=r, activation=activation)
    y.square().sum().backward()
    assert r.grad is not None


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_residual_that_is_kept_may_not(device: str, activation: str) -> None:
    with torch.inference_mode():
        frozen = normal((6, 3), F64, device)
    x = normal((6, 3), F64, device, seed=1).requires_grad_()
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        batch_norm(x, None, None, None, None, True, residual=frozen, activation=activation)


# ---- a flag that is none ----


@pytest.mark.parametrize("training", [1, 0, None, "yes"])
def test_training_is_a_bool(device: str, training: Any) -> None:
    x, mean, var = normal((6, 3), F64, device), torch.zeros(3, dtype=F64), torch.ones(3, dtype=F64)
    stats = mean.to(device), var.to(device)
    with pytest.raises(TypeError) as theirs:
        F.batch_norm(x, *stats, training=training)
    with pytest.raises(TypeError) as ours:
        batch_norm(x, *stats, training=training)
    assert str(ours.value) == str(theirs.value)


def test_a_modules_mode_may_be_any_truth(device: str) -> None:
    """As native's: the module asks whether it is true."""
    for cls in (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d):
        norm = cls(3).to(device)
        norm.training = 1
        norm(normal((6, 3), torch.float32, device))
        assert norm.num_batches_tracked == 1
        norm.training = 0
        norm(normal((6, 3), torch.float32, device))
        assert norm.num_batches_tracked == 1
