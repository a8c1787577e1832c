"""allow_single_value: one value a channel in training is normalised by the running statistics, and nothing moves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bn_ext
from reference import assert_within, grad_input_tolerance, grad_param_tolerance, output_tolerance, reference
from support import FLOATS, name_of, normal

C = 6
SHAPES = ((1, C), (1, C, 1))


def norm_of(device: str = "cpu", cls: Any = bn_ext.FusedBatchNorm1d, **options: Any) -> bn_ext.FusedBatchNorm1d:
    norm: bn_ext.FusedBatchNorm1d = cls(C, device=device, **{"allow_single_value": True} | options)
    with torch.no_grad():
        for k, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            if t is not None:
                t.copy_(normal((C,), torch.float64, device, seed=40 + k).abs() + 0.5)
    return norm


def buffers(norm: nn.Module) -> list[Tensor]:
    return [b.clone() for b in norm.buffers()]


def unmoved(norm: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(b, old) for b, old in zip(norm.buffers(), before, strict=True))


def step(call: Any, norm: nn.Module, x: Tensor, g: Tensor, **valid: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = call(x, **valid)
    return [y.detach(), *torch.autograd.grad(y, (x, *norm.parameters()), g)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_it_is_evaluation(device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, g = (normal(shape, dtype, device, seed=k) for k in (1, 2))
    norm = norm_of(device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    before = buffers(norm)
    y, dx, dw, db = step(norm, norm, x, g)
    assert unmoved(norm, before)
    mean, var = norm.running_mean, norm.running_var
    ref = reference(x, norm.weight, norm.bias, g, running_mean=mean, running_var=var, training=False)
    assert_within(y, ref.output, output_tolerance(ref, dtype), "output")
    assert_within(dx, ref.grad_input, grad_input_tolerance(ref, dtype), "grad_input")
    for which, found, expected in (("weight", dw, ref.grad_weight), ("bias", db, ref.grad_bias)):
        assert_within(found, expected, grad_param_tolerance(ref, which, dtype, norm.weight.dtype), f"grad_{which}")
    assert norm.training
    for a, b in zip((y, dx, dw, db), step(norm.eval(), norm, x, g), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_more_values_are_training_as_ever(device: str, momentum: float | None) -> None:
    for shape in ((2, C), (1, C, 2), (0, C)):
        x = normal(shape, device=device)
        ours, plain = (norm_of(device, allow_single_value=allow, momentum=momentum) for allow in (True, False))
        assert torch.equal(ours(x), plain(x))
        assert unmoved(ours, buffers(plain)) and ours.num_batches_tracked == 1


def test_without_it_torchs_error_is_raised(device: str) -> None:
    norm = norm_of(device, allow_single_value=False)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        norm(normal((1, C), device=device))


@pytest.mark.parametrize("kind", ["lengths", "mask"])
def test_a_padded_batch_of_which_one_value_counts(kind: str) -> None:
    lengths = torch.tensor([0, 1, 0])
    where = torch.arange(5) < lengths[:, None]
    valid = {"lengths": lengths} if kind == "lengths" else {"mask": where}
    x = torch.where(where[:, None], normal((3, C, 5)), torch.nan)
    norm = norm_of()
    before = buffers(norm)
    found = step(norm, norm, x, torch.ones(3, C, 5), **valid)
    assert unmoved(norm, before)
    for a, b in zip(found, step(norm.eval(), norm, x, torch.ones(3, C, 5), **valid), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="from 0 to 5"):
        norm.train()(x, lengths=torch.tensor([0, -5, 6]))  # one in all


def test_virtual_batches() -> None:
    """A batch of one value is not cut; a piece of one value among others has still no statistics."""
    x, norm = normal((1, C)), norm_of(virtual_batch_size=4)
    before = buffers(norm)
    assert torch.equal(norm(x), norm_of().eval()(x)) and unmoved(norm, before)
    norm.virtual_batch_size = 1
    assert torch.equal(norm(x), norm_of().eval()(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        norm(normal((3, C)))
    assert unmoved(norm, before)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "silu", "gelu", None])
@pytest.mark.parametrize("added", [False, True])
def test_batch_norm_act(device: str, activation: str | None, added: bool) -> None:
    x, r, g = (normal((1, C, 1), device=device, seed=k) for k in (1, 2, 3))
    block = bn_ext.BatchNormAct1d(C, activation=activation, allow_single_value=True, device=device)
    assert block.norm.allow_single_value
    before = buffers(block)
    residual = r if added else None
    found = step(lambda x: block(x, residual), block, x, g)
    assert unmoved(block, before)
    block.eval()
    for a, b in zip(found, step(lambda x: block(x, residual), block, x, g), strict=True):
        assert torch.equal(a, b)
    block.train()
    wider = block(x, residual=torch.ones(4, C, 1, device=device))  # what the kernels do not add
    assert wider.shape == (4, C, 1) and unmoved(block, before)


def test_second_derivatives() -> None:
    norm = norm_of(dtype=torch.float64)
    x = normal((1, C), torch.float64).requires_grad_()
    vectors = [t.detach().clone().requires_grad_() for t in norm.parameters()]

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(norm, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(call, (x, *vectors)) and torch.autograd.gradgradcheck(call, (x, *vectors))


@pytest.mark.parametrize("dynamic", [None, False, True])
def test_compiled_in_one_graph(dynamic: bool | None) -> None:
    ours, eager = norm_of(), norm_of()
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic)
    for n in (5, 1, 7, 1):
        x, g = normal((n, C), seed=n), normal((n, C), seed=2)
        for a, b in zip(step(compiled, ours, x, g), step(eager, eager, x, g), strict=True):
            torch.testing.assert_close(a, b)
        assert unmoved(ours, buffers(eager))
    assert ours.num_batches_tracked == 2


@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_with_any_batch_size(decomposed: bool) -> None:
    """The operator looks when it runs; a program of the kernels' own operators is for more than one value."""
    norm, eager = norm_of(), norm_of()
    n = torch.export.Dim("n", min=1, max=64)
    program = torch.export.export(norm, (normal((5, C)),), dynamic_shapes={"input": {0: n}})
    exported: Any = (program.run_decompositions() if decomposed else program).module()
    x = normal((9, C), seed=9)
    torch.testing.assert_close(exported(x), eager(x))
    before, single = buffers(exported), normal((1, C))
    if decomposed:
        with pytest.raises((ValueError, AssertionError, RuntimeError)):
            exported(single)
    else:
        assert torch.equal(exported(single), eager(single))
    assert unmoved(exported, before) and unmoved(exported, buffers(eager))


def padded(counts: list[int], kind: str, seed: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """(4, C, 5), of which so many values a sample count, and NaN elsewhere."""
    lengths = torch.tensor(counts)
    where = torch.arange(5) < lengths[:, None]
    x = torch.where(where[:, None], normal((4, C, 5), seed=seed), torch.nan)
    return x, {"lengths": lengths} if kind == "lengths" else {"mask": where}


MODULES: dict[str, Any] = {
    "norm": norm_of,
    "cut": lambda: norm_of(virtual_batch_size=4),
    "cumulative": lambda: norm_of(momentum=None),
    "no bias": lambda: norm_of(affine=False),
    "relu": lambda: act_of("relu"),
    "silu": lambda: act_of("silu"),
    "sigmoid": lambda: act_of(nn.Sigmoid()),
}


def act_of(activation: Any) -> nn.Module:
    block = bn_ext.BatchNormAct1d(C, activation, allow_single_value=True)
    block.norm = norm_of()
    return block


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "mask"])
@pytest.mark.parametrize("made", MODULES)
def test_compiled_of_a_padded_batch_of_which_one_value_counts(made: str, kind: str, dynamic: bool) -> None:
    """The graph is the same whatever counts."""
    ours, eager = MODULES[made](), MODULES[made]()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for seed, counts in enumerate(([3, 0, 5, 2], [0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [2, 2, 2, 2])):
        x, valid = padded(counts, kind, seed)
        g = normal((4, C, 5), seed=9)
        for a, b in zip(step(compiled, ours, x, g, **valid), step(eager, eager, x, g, **valid), strict=True):
            torch.testing.assert_close(a, b)
        assert unmoved(ours, buffers(eager))


@pytest.mark.parametrize("added", ["same", "wider type"])
def test_compiled_with_a_residual(added: str) -> None:
    ours, eager = act_of("silu"), act_of("silu")
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    for counts in ([0, 1, 0, 0], [3, 1, 0, 0]):
        x, valid = padded(counts, "lengths")
        r = normal((4, C, 5), torch.float64 if added != "same" else torch.float32, seed=3)
        r = torch.where(x.isnan(), torch.nan, r)
        found = [call(x, residual=r, **valid) for call in (compiled, eager)]
        torch.testing.assert_close(*found)
        assert unmoved(ours, buffers(eager))


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("kind", ["lengths", "mask"])
def test_exported_with_what_counts(kind: str, decomposed: bool) -> None:
    norm, eager = norm_of(), norm_of()
    x, valid = padded([3, 0, 5, 2], kind)
    program = torch.export.export(norm, (x,), valid)
    exported: Any = (program.run_decompositions() if decomposed else program).module()
    for counts in ([0, 1, 0, 0], [3, 1, 0, 0]):
        x, valid = padded(counts, kind)
        torch.testing.assert_close(exported(x, **valid), eager(x, **valid))
        assert unmoved(exported, buffers(eager))


def test_exported_of_one_value() -> None:
    norm = norm_of()
    exported: Any = torch.export.export(norm, (normal((1, C)),)).module()
    before, x = buffers(exported), normal((1, C), seed=3)
    assert torch.equal(exported(x), norm(x)) and unmoved(exported, before)


def test_torch_func_vmap_and_fallbacks() -> None:
    x, norm = normal((1, C)), norm_of()
    before = buffers(norm)
    expected = torch.autograd.grad(norm_of().eval()(x.requires_grad_()).square().sum(), x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.grad(lambda t: norm(t).square().sum())(x), expected)
    torch.testing.assert_close(torch.vmap(norm)(torch.stack([x, 2 * x]))[1], norm_of().eval()(2 * x))
    _, tangent = torch.func.jvp(norm, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, (norm.weight * (norm.running_var + norm.eps).rsqrt())[None])

    class Sub(Tensor):
        pass

    other = x.as_subclass(Sub)
    torch.testing.assert_close(norm(other).as_subclass(Tensor), norm(x))
    assert unmoved(norm, before)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_traced_for_any_batch_size() -> None:
    norm = norm_of()
    traced = torch.jit.trace(norm, normal((5, C)), check_trace=False)
    before, x = buffers(traced), normal((1, C))
    assert torch.equal(traced(x), norm.eval()(x)) and unmoved(traced, before)


def test_fused_pairs() -> None:
    x = normal((1, C))
    model = bn_ext.convert(nn.Sequential(norm_of(), nn.ReLU()), fuse=True)
    before = buffers(model)
    assert torch.equal(model(x), torch.relu(norm_of().eval()(x))) and unmoved(model, before)


def test_a_module_keeps_it() -> None:
    norm = norm_of()
    assert repr(norm).endswith(", allow_single_value=True)")
    plain = norm_of(allow_single_value=False)
    assert "single" not in repr(plain) and "_allow_single_value" not in vars(plain) and not plain.allow_single_value
    for other in (
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
        bn_ext.convert(bn_ext.revert(copy.copy(norm))),
    ):
        assert other.allow_single_value is True
    assert set(norm.state_dict()) == set(nn.BatchNorm1d(C).state_dict())
    lazy = bn_ext.LazyFusedBatchNorm1d(allow_single_value=True)
    x = normal((1, C))
    assert torch.equal(lazy(x), bn_ext.FusedBatchNorm1d(C).eval()(x))
    assert type(lazy) is bn_ext.FusedBatchNorm1d and lazy.num_batches_tracked == 0
    norm.allow_single_value = False
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(x)


@pytest.mark.parametrize("cls", [bn_ext.FusedBatchNorm1d, bn_ext.LazyFusedBatchNorm1d])
def test_what_is_refused(cls: Any) -> None:
    arguments = () if cls is bn_ext.LazyFusedBatchNorm1d else (C,)
    with pytest.raises(ValueError, match="running statistics, which track_running_stats=False lacks"):
        cls(*arguments, track_running_stats=False, allow_single_value=True)
    for wrong in (None, 1, "yes"):
        with pytest.raises(TypeError, match="allow_single_value should be a bool"):
            cls(*arguments, allow_single_value=wrong)


@pytest.mark.parametrize("kind", ["whole", "lengths", "compiled"])
def test_statistics_that_are_not_tracked_any_more(kind: str) -> None:
    """It goes by the batch's own then, which one value has none of."""
    norm = norm_of()
    norm.track_running_stats = False
    x, valid = (normal((1, C)), {}) if kind == "whole" else padded([0, 1, 0, 0], "lengths")
    call = torch.compile(norm, backend="aot_eager") if kind == "compiled" else norm
    before = buffers(norm)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        call(x, **valid)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="Expected more than 1 value"):
        norm(x, **valid)
    assert unmoved(norm, before)


@pytest.mark.parametrize("counts", [[0, 1, 0, 0], [3, 1, 0, 0]])
def test_compiled_in_a_checkpoint(counts: list[int]) -> None:
    ours, eager = norm_of(), norm_of()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x, valid = padded(counts, "lengths")
    leaf = x.requires_grad_()
    y = torch.utils.checkpoint.checkpoint(
        compiled, leaf, use_reentrant=False, context_fn=bn_ext.keep_statistics, **valid
    )
    y.square().sum().backward()
    eager(x, **valid)
    assert unmoved(ours, buffers(eager))


def test_statistics_that_were_taken_away() -> None:
    norm = norm_of()
    norm.running_mean = norm.running_var = None
    with pytest.raises(RuntimeError, match="running_mean must be defined"):
        norm(normal((1, C)))
