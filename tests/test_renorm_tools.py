"""Batch renormalisation under compilers and transforms, without a kernel, and its errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

import bn_ext
from bn_ext.functional import batch_renorm
from renorm import (
    EPS,
    OPS,
    PLAIN,
    C,
    buffers,
    norm_of,
    step,
    unmoved,
)
from support import FLOATS, name_of, normal

# ---- compilers, transforms, and no kernel ----


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(dynamic: bool, training: bool) -> None:
    ours, eager = (norm_of(warmup_steps=1).train(training) for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic)
    for n in (23, 23, 17) if dynamic else (23, 23):
        x, g = normal((n, C), seed=n), normal((n, C), seed=2)
        for a, b in zip(step(compiled, ours, x, g), step(eager, eager, x, g), strict=True):
            assert torch.equal(a, b)
    assert unmoved(ours, buffers(eager))


def test_exported_with_any_batch_size() -> None:
    norm, eager = norm_of(warmup_steps=1), norm_of(warmup_steps=1)
    n = torch.export.Dim("n", min=2, max=512)
    for decompose in (False, True):
        program = torch.export.export(copy.deepcopy(norm), (normal((23, C)),), dynamic_shapes={"input": {0: n}})
        exported: Any = (program.run_decompositions() if decompose else program).module()
        other = copy.deepcopy(eager)
        for seed in range(3):
            x = normal((41 - seed, C), seed=seed)
            assert torch.equal(exported(x), other(x))
        assert dict(exported.named_buffers())["num_batches_tracked"] == other.num_batches_tracked == 3


def test_compiled_autograd() -> None:
    x, g = normal((23, C), seed=1), normal((23, C), seed=2)
    found = []
    for compiled in (False, True):
        norm, leaf = norm_of(), x.clone().requires_grad_()
        y = norm(leaf)
        if compiled:
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
                y.backward(g)
        else:
            y.backward(g)
        found.append((leaf.grad, norm.weight.grad, norm.bias.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("virtual_batch_size", [0, 6])
@pytest.mark.parametrize("shape", [(23, C), (9, C, 4), (0, C)], ids=str)
def test_operators_keep_their_contracts(shape: tuple[int, ...], virtual_batch_size: int) -> None:
    x = normal(shape)
    vectors = [normal((C,), seed=k).abs() for k in range(4)]
    forward, options = OPS.batch_norm_forward.default, {"virtual_batch_size": virtual_batch_size}
    arguments = (x, *vectors, torch.tensor(3), 0.1, EPS)
    torch.library.opcheck(forward, arguments, options | {"renorm": [3.0, 5.0, 2.0, 0.0]})
    saved = forward(*arguments, **options, renorm=[3.0, 5.0, 2.0, 0.0])[1]
    backward = (x, x, vectors[0], saved, True, [True] * 3 + [False])
    torch.library.opcheck(OPS.batch_norm_backward.default, backward, options | {"renorm": True})


def without_kernels(norm: nn.Module) -> Callable[..., Tensor]:
    class Sub(Tensor):
        pass

    def call(x: Tensor, **valid: Tensor) -> Tensor:
        return norm(x.as_subclass(Sub), **valid).as_subclass(Tensor)  # type: ignore[no-any-return]

    return call


@pytest.mark.parametrize("kind", ["plain", "lengths", "cut", "cumulative", "evaluation"])
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_without_a_kernel_it_is_the_same(device: str, dtype: torch.dtype, kind: str) -> None:
    options: dict[str, Any] = {"cut": {"virtual_batch_size": 3}, "cumulative": {"momentum": None}}.get(kind, {})
    valid = {"lengths": torch.tensor([4, 0, 3, 2, 4, 1, 4], device=device)} if kind == "lengths" else {}
    ours, other = (norm_of(device, warmup_steps=2, smooth=True, **options).train(kind != "evaluation") for _ in "ab")
    for seed in range(3):
        x, g = normal((7, C, 4), dtype, device, seed=seed), normal((7, C, 4), dtype, device, seed=9)
        found, right = step(ours, ours, x, g, **valid), step(without_kernels(other), other, x, g, **valid)
        near = max(8 * torch.finfo(dtype).eps, 1e-5)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=near, atol=near)
    for a, b in zip(ours.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_transforms(device: str) -> None:
    x, t = normal((23, C), device=device, seed=1), normal((23, C), device=device, seed=2)
    norm, plain = norm_of(device), norm_of(device)
    expected = step(plain, plain, x, t)
    gradient = torch.func.grad(lambda v: (norm(v) * t).sum())(x)
    torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-4)
    assert all(torch.allclose(a, b) for a, b in zip(norm.buffers(), plain.buffers(), strict=True))
    evaluated = norm_of(device).eval()
    torch.testing.assert_close(torch.vmap(evaluated)(torch.stack([x, t]))[1], evaluated(t))
    before = buffers(norm)
    with pytest.raises(RuntimeError, match="cannot move running statistics that are not batched"):
        torch.vmap(norm)(torch.stack([x, t]))
    assert unmoved(norm, before)

    state = {k: torch.stack([v, v]) for k, v in norm.state_dict().items()}
    both = torch.vmap(lambda s, v: torch.func.functional_call(norm, s, (v,)))(state, torch.stack([x, t]))
    torch.testing.assert_close(both[1], copy.deepcopy(norm)(t), rtol=1e-4, atol=1e-4)
    assert not torch.equal(state["running_mean"][0], state["running_mean"][1]) and unmoved(norm, before)

    _, tangent = torch.func.jvp(copy.deepcopy(norm), (x,), (t,))
    wanted = x.clone().requires_grad_()
    other = torch.ones_like(x).requires_grad_()
    (first,) = torch.autograd.grad(copy.deepcopy(norm)(wanted), wanted, other, create_graph=True)
    torch.testing.assert_close(tangent, torch.autograd.grad(first, other, t)[0], rtol=1e-4, atol=1e-4)


def test_meta_tensors_and_fake_ones() -> None:
    assert bn_ext.FusedBatchRenorm1d(C, device="meta")(torch.empty(5, C, device="meta")).shape == (5, C)
    with FakeTensorMode():
        assert bn_ext.FusedBatchRenorm1d(C)(torch.empty(5, C, 3)).shape == (5, C, 3)


@pytest.mark.parametrize("kernel", [True, False])
def test_in_a_checkpoint_statistics_move_once(kernel: bool) -> None:
    norm = norm_of()
    call = norm if kernel else without_kernels(norm)
    x = normal((23, C)).requires_grad_()
    y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=False, context_fn=bn_ext.keep_statistics)
    before = buffers(norm)
    y.sum().backward()
    assert unmoved(norm, before) and norm.num_batches_tracked == 1


def test_counts_of_other_types() -> None:
    """torch adds to them; the warm-up goes by what they say."""
    x = normal((23, C))
    for count in (torch.tensor(1.0), torch.tensor([1]), torch.tensor(1, dtype=torch.int32)):
        norm, right = norm_of(warmup_steps=2), norm_of(warmup_steps=2)
        norm.num_batches_tracked = count
        right.num_batches_tracked.fill_(1)
        for _ in range(2):
            assert torch.equal(norm(x), right(x))
        assert norm.num_batches_tracked == 3 and norm.num_batches_tracked.dtype == count.dtype
        norm.virtual_batch_size = right.virtual_batch_size = 6
        assert torch.equal(norm(x), right(x)) and norm.num_batches_tracked == 7


def test_an_empty_batch_counts_and_no_more(device: str) -> None:
    norm = norm_of(device)
    before = buffers(norm)
    for shape in ((0, C), (3, C, 0)):
        x = normal(shape, device=device).requires_grad_()
        norm(x).sum().backward()
        assert x.grad is not None and x.grad.shape == shape
    assert norm.num_batches_tracked == 2 and unmoved(norm, [*before[:2], norm.num_batches_tracked])


# ---- errors ----


@pytest.mark.parametrize("kernel", [True, False])
def test_errors_come_before_anything_changes(device: str, kernel: bool) -> None:
    norm = norm_of(device)
    before = buffers(norm)
    call = norm if kernel else without_kernels(norm)
    x = normal((9, C), device=device)
    for wrong, text in (
        (x[:1], r"Expected more than 1 value per channel when training, got input size torch.Size\(\[1, 6\]\)"),
        (x[None, None], "expected 2D or 3D input"),
        (x[0], "expected 2D or 3D input"),
        (x[:, :4], "should contain 4 elements not 6"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=text):
            call(wrong)
    for name, value, text in (
        ("max_r", 0.5, "max_r should be at least 1"),
        ("max_r", math.nan, "max_r should be at least 1"),
        ("max_d", -1.0, "max_d should be at least 0"),
        ("warmup_steps", -1, "warmup_steps should be a whole number"),
        ("warmup_steps", 2.5, "warmup_steps should be a whole number"),
        ("eps", 0.0, "eps must be positive"),
    ):
        old = getattr(norm, name)
        setattr(norm, name, value)
        with pytest.raises(ValueError, match=text):
            call(x)
        setattr(norm, name, old)
        if name != "eps":
            with pytest.raises(ValueError, match=text):
                bn_ext.FusedBatchRenorm1d(C, **{name: value})
    with pytest.raises(ValueError, match="virtual_batch_size should be at least 1"):
        bn_ext.FusedBatchRenorm1d(C, virtual_batch_size=0)
    with pytest.raises(ValueError, match="only one of them"):
        norm(normal((4, C, 5)), lengths=torch.ones(4).long(), mask=torch.ones(4, 5).bool())
    with pytest.raises(ValueError, match="num_batches_tracked, which is None"):
        batch_renorm(x, norm.running_mean, norm.running_var, training=True, warmup_steps=3)
    with pytest.raises(RuntimeError, match=r"size of tensor a|Attempting to broadcast"):
        batch_renorm(x, norm.running_mean, norm.running_var, training=True, residual=x[:4])
    norm.running_mean.data = before[0].clone()
    assert unmoved(norm, before)


def test_operators_refuse_what_is_no_renormalisation() -> None:
    x, mean, var = normal((8, C)), torch.zeros(C), torch.ones(C)
    arguments = (x, None, None, mean, var, None, 0.1, EPS)
    for numbers in ([], [3.0, 5.0, 0.0], [3.0, 5.0, 0.0, 0.5], [3.0, 5.0, 1e300, 0.0]):
        for call in (OPS.batch_norm_forward, lambda *a, **k: OPS.batch_norm(*a[:6], True, *a[6:], **k)):
            with pytest.raises(ValueError, match="should be"):
                call(*arguments, renorm=numbers)
            with FakeTensorMode() as mode, pytest.raises(ValueError, match="should be"):
                call(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in arguments), renorm=numbers)
    with pytest.raises(ValueError, match="it needs both"):
        OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, EPS, renorm=PLAIN)
    with pytest.raises(RuntimeError, match="nothing is renormalised"):
        OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, EPS, mean, var, renorm=PLAIN)
    given = OPS.batch_norm_moments(x)[None]
    with pytest.raises(ValueError, match="not a part"):
        OPS.batch_norm_forward(*arguments, moments=given, renorm=PLAIN)
    assert not mean.any()
    saved = OPS.batch_norm_forward(*arguments)[1]
    with pytest.raises(RuntimeError, match="saved should be"):
        OPS.batch_norm_backward(x, x, None, saved, True, [True] * 4, renorm=True)
    with pytest.raises(ValueError, match="in training"):
        OPS.batch_norm_backward(x, x, None, torch.ones(8, C), False, [True] * 4, renorm=True)


def under_a_mode(norm: nn.Module) -> Callable[..., Tensor]:
    class Nop(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    def call(x: Tensor, **valid: Tensor) -> Tensor:
        with Nop():
            return norm(x, **valid)  # type: ignore[no-any-return]

    return call


CALLS: dict[str, Callable[[nn.Module], Callable[..., Tensor]]] = {
    "kernels": lambda norm: norm,
    "subclass": without_kernels,
    "mode": under_a_mode,
    "vmap": lambda norm: lambda x, **valid: torch.vmap(lambda t: norm(t, **valid))(torch.stack([x, x])),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", [
    torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
], ids=name_of)  # fmt: skip
def test_inputs_that_are_no_floats(dtype: torch.dtype, call: str, training: bool) -> None:
    norm, native = norm_of().train(training), nn.BatchNorm1d(C)
    before, x = buffers(norm), torch.ones(9, C, 4).to(dtype)
    with pytest.raises(NotImplementedError) as expected:
        native(x)
    for valid in ({}, {"lengths": torch.ones(9).long()}):
        with pytest.raises(NotImplementedError) as found:
            CALLS[call](norm)(x, **valid)
        assert str(found.value) == str(expected.value)
    assert unmoved(norm, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_eps_that_is_none(call: str, training: bool) -> None:
    norm, native = norm_of().train(training), nn.BatchNorm1d(C, eps=-1.0).train(training)
    norm.eps = -1.0
    before, x = buffers(norm), normal((9, C))
    with pytest.raises(ValueError, match="batch_norm eps") as expected:
        native(x)
    with pytest.raises(ValueError, match="batch_norm eps") as found:
        CALLS[call](norm)(x)
    assert str(found.value) == str(expected.value) and unmoved(norm, before)


@pytest.mark.parametrize("call", ["kernels", "subclass", "mode"])
def test_gradients_where_nothing_counts(call: str) -> None:
    for shape, valid in (((0, C), {}), ((3, C, 4), {"lengths": torch.zeros(3).long()})):
        norm = norm_of()
        x = normal(shape).requires_grad_()
        y = CALLS[call](norm)(x, **valid)
        for found in torch.autograd.grad(y.sum(), (x, norm.weight, norm.bias)):
            assert not found.any()


# ---- what is reset and loaded as nn.BatchNorm1d's ----


def test_what_was_made_without_memory() -> None:
    norm = bn_ext.FusedBatchRenorm1d(C, device="meta").to_empty(device="cpu")
    norm.reset_parameters()
    fresh = bn_ext.FusedBatchRenorm1d(C)
    assert all(torch.equal(a, b) for a, b in zip(norm.state_dict().values(), fresh.state_dict().values(), strict=True))
    norm(normal((9, C)))
    norm.reset_running_stats()
    assert unmoved(norm, buffers(fresh))


@pytest.mark.parametrize("versioned", [True, False])
def test_a_state_without_a_count(versioned: bool) -> None:
    ours, native = norm_of(), nn.BatchNorm1d(C)
    ours.num_batches_tracked.fill_(4), native.num_batches_tracked.fill_(4)
    found = []
    for module in (ours, native):
        state = module.state_dict()
        del state["num_batches_tracked"]
        if not versioned:
            del state._metadata
        try:
            module.load_state_dict(state)
            found.append(int(module.num_batches_tracked))
        except RuntimeError as error:
            found.append("Missing key" in str(error))
    assert found[0] == found[1]
