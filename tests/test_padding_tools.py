"""Padded and ragged batches beside what else PyTorch has: packed sequences, nested tensors, compilers, transforms."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import bn_ext
from bn_ext.functional import batch_norm
from support import normal
from test_padding import EPS, KINDS, C, assert_zero_beyond, norm_of, on, positions_of, rows_of, spoilt

OPS = torch.ops.bn_ext


# ---- batches without padding ----


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_a_packed_sequence_is_normalised_through_its_values(device: str, enforce_sorted: bool) -> None:
    lengths = torch.tensor([7, 4, 4, 1] if enforce_sorted else [4, 7, 1, 4])
    x = normal((4, 7, C), device=device).requires_grad_()
    norm, padded = norm_of(device), norm_of(device)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    y = norm(packed)
    assert type(y) is PackedSequence and y.batch_sizes is packed.batch_sizes
    assert y.unsorted_indices is packed.unsorted_indices
    back, of_back = pad_packed_sequence(y, batch_first=True)
    expected = padded(x.transpose(1, 2), lengths=lengths.to(device)).transpose(1, 2)
    torch.testing.assert_close(back, expected)
    assert torch.equal(of_back, lengths)
    for a, b in zip(norm.buffers(), padded.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    g = normal((4, 7, C), device=device, seed=2)
    torch.testing.assert_close(torch.autograd.grad(back, x, g)[0], torch.autograd.grad(expected, x, g)[0])
    torch.testing.assert_close(norm.eval()(packed).data, norm(packed.data))
    with pytest.raises(ValueError, match="a PackedSequence has lengths of its own"):
        norm(packed, lengths=lengths)


def jagged(rows: list[Tensor]) -> Tensor:
    """(B, C, j) of tensors (j, C)."""
    return torch.nested.nested_tensor(rows, layout=torch.jagged).transpose(1, 2)


def test_a_jagged_tensor_is_normalised_through_its_values(device: str) -> None:
    rows = [normal((n, C), device=device, seed=n) for n in (7, 1, 4)]
    nested = jagged(rows).detach().requires_grad_()
    norm, alone = norm_of(device), norm_of(device)
    y = norm(nested)
    assert y.is_nested and y.layout == torch.jagged and y.shape == nested.shape  # the same ragged size
    expected = alone(torch.cat(rows))
    torch.testing.assert_close(torch.cat([piece.transpose(0, 1) for piece in y.unbind()]), expected)
    torch.testing.assert_close((y + nested).values(), y.values() + nested.values())
    (found,) = torch.autograd.grad(y.values().square().sum(), nested)
    inputs = torch.cat(rows).requires_grad_()
    (of_alone,) = torch.autograd.grad(norm_of(device)(inputs).square().sum(), inputs)
    torch.testing.assert_close(found.values().transpose(0, 1), of_alone, rtol=1e-4, atol=1e-4)
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, alone.running_mean)
    with pytest.raises(ValueError, match="has lengths of its own"):
        norm(nested, lengths=torch.ones(3))


def test_what_is_ragged_elsewhere_is_natives_matter() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, C), torch.randn(2, C)], layout=torch.jagged)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)) as expected:
        nn.BatchNorm1d(C)(nested)
    with pytest.raises(expected.type):
        bn_ext.FusedBatchNorm1d(C)(nested)


# ---- compilers ----


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["lengths", "any"])
def test_compiled_in_one_graph(kind: str, training: bool, dynamic: bool) -> None:
    compiled_norm, eager = norm_of().train(training), norm_of().train(training)
    compiled = torch.compile(lambda x, **valid: torch.relu(compiled_norm(x, **valid)), fullgraph=True, dynamic=dynamic)
    for n in (5, 5, 7) if dynamic else (5, 5):
        valid, where = positions_of((n, C, 11), kind, seed=n)
        x = spoilt(normal((n, C, 11), seed=n), where)
        g = normal((n, C, 11), seed=2)
        found = []
        for call in (compiled, lambda x, **valid: torch.relu(eager(x, **valid))):
            leaf = x.clone().requires_grad_()
            y = call(leaf, **valid)
            found.append((y.detach(), *torch.autograd.grad(y, leaf, g)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
            assert_zero_beyond(a, where)
    torch.testing.assert_close(list(compiled_norm.buffers()), list(eager.buffers()))


def test_exported_with_lengths() -> None:
    norm, eager = norm_of(), norm_of()
    x, lengths = normal((5, C, 11)), torch.tensor([11, 3, 0, 5, 7])
    n = torch.export.Dim("n", min=2, max=64)
    program = torch.export.export(
        norm, (x,), {"lengths": lengths}, dynamic_shapes={"input": {0: n}, "lengths": {0: n}}
    ).module()
    other, more = normal((3, C, 11), seed=4), torch.tensor([2, 9, 4])
    torch.testing.assert_close(program(other, lengths=more), eager(other, lengths=more))
    assert dict(program.named_buffers())["num_batches_tracked"] == eager.num_batches_tracked == 1


def test_traced_with_a_mask() -> None:
    norm = norm_of().eval()
    valid, where = positions_of((5, C, 11), "any")
    x = normal((5, C, 11))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.norm(x, mask=mask)  # type: ignore[no-any-return]

    traced = torch.jit.trace(Model(), (x, where))
    valid, where = positions_of((5, C, 11), "any", seed=5)
    assert torch.equal(traced(x, where), norm(x, **valid))


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripts_are_torchs_own() -> None:
    scripted = torch.jit.script(norm_of())
    x = normal((5, C, 11))
    torch.testing.assert_close(scripted(x), norm_of()(x))
    act = torch.jit.script(bn_ext.BatchNormAct1d(C))
    assert act(x).shape == x.shape
    with pytest.raises(torch.jit.Error, match="TorchScript has no padded batches"):
        act(x, mask=torch.ones(5, 11, dtype=torch.bool))


@pytest.mark.parametrize("kind", KINDS)
def test_operators_keep_their_contracts(kind: str) -> None:
    shape = (5, C, 7)
    valid, _ = positions_of(shape, kind)
    of = next(iter(valid.values()))
    x, vectors, count = normal(shape), [normal((C,), seed=k).abs() for k in range(4)], torch.tensor(3)
    torch.library.opcheck(OPS.batch_norm_forward.default, (x, *vectors, count, 0.1, EPS), {"valid": of})
    torch.library.opcheck(OPS.batch_norm_inference.default, (x, *vectors, EPS), {"valid": of})
    saved = OPS.batch_norm_forward(x, *vectors, count, 0.1, EPS, valid=of)[1]
    arguments = (x, x, vectors[0], saved, True, [True] * 3 + [False])
    torch.library.opcheck(OPS.batch_norm_backward.default, arguments, {"valid": of})


def test_operators_without_padded_batches_say_so() -> None:
    x, lengths = normal((5, C, 7)), torch.tensor([1, 2, 3, 4, 5])
    moments = OPS.batch_norm_moments(x)[None]
    with pytest.raises(ValueError, match="not a part with moments"):
        OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, EPS, moments=moments, valid=lengths)
    saved = OPS.batch_norm_forward(x, None, None, None, None, None, 0.1, EPS)[1]
    sums = OPS.batch_norm_gradient_sums(x, x, saved)[None]
    with pytest.raises(ValueError, match="not a part with sums"):
        OPS.batch_norm_backward(x, x, None, saved, True, [True, False, False, False], sums=sums, valid=lengths)


def test_in_place() -> None:
    valid, where = positions_of((5, C, 7), "lengths")
    x = spoilt(normal((5, C, 7)), where)
    mean, var = normal((C,), seed=1), normal((C,), seed=2).abs()
    expected = batch_norm(x, mean, var, activation="silu", **valid)
    with torch.no_grad():
        y = batch_norm(x, mean, var, activation="silu", inplace=True, **valid)
    assert y is x and torch.equal(x, expected)


# ---- transforms, modes, and what there is no kernel for ----


@pytest.mark.parametrize("kind", ["lengths", "any"])
def test_torch_func(kind: str) -> None:
    shape = (5, C, 7)
    valid, where = positions_of(shape, kind)
    x, g = spoilt(normal(shape, torch.float64, seed=1), where), normal(shape, torch.float64, seed=2)
    ours, eager = norm_of(dtype=torch.float64), norm_of(dtype=torch.float64)

    def loss(norm: nn.Module, t: Tensor) -> Tensor:
        return (norm(t, **valid) ** 2 * g).sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(eager, leaf), leaf, create_graph=True)
    torch.testing.assert_close(torch.func.grad(lambda t: loss(ours, t))(x), expected.detach())
    assert torch.equal(ours.running_mean, eager.running_mean) and ours.num_batches_tracked == 1
    (second,) = torch.autograd.grad(expected, leaf, g)
    found = torch.func.grad(lambda t: (torch.func.grad(lambda u: loss(ours, u))(t) * g).sum())(x)
    torch.testing.assert_close(found, second)
    assert_zero_beyond(found, where)


@pytest.mark.parametrize("kind", ["lengths", "any"])
def test_vmap_and_forward_mode(kind: str) -> None:
    shape = (5, C, 7)
    valid, where = positions_of(shape, kind)
    x, t = normal(shape, torch.float64, seed=1), normal(shape, torch.float64, seed=2)
    norm = norm_of(dtype=torch.float64, track_running_stats=False)
    found = torch.vmap(lambda one: norm(one, **valid))(torch.stack([x, t]))
    torch.testing.assert_close(found[1], norm(t, **valid))
    y, tangent = torch.func.jvp(lambda one: norm(one, **valid), (x,), (t,))
    torch.testing.assert_close(y, norm(x, **valid))
    _, expected = torch.autograd.functional.jvp(lambda one: norm(one, **valid), (x,), (t,))
    torch.testing.assert_close(tangent, expected)
    assert_zero_beyond(tangent, where)


def test_whoever_watches_sees_torchs_function_called() -> None:
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    valid, where = positions_of((5, C, 7), "lengths")
    x = spoilt(normal((5, C, 7)), where)
    norm, expected = norm_of(), norm_of()
    with Watch():
        y = norm(x, **valid)
    assert nn.functional.batch_norm in seen
    torch.testing.assert_close(y, expected(x, **valid))
    torch.testing.assert_close(list(norm.buffers()), list(expected.buffers()))


def test_a_subclass_of_tensor() -> None:
    class Mine(Tensor):
        pass

    valid, where = positions_of((5, C, 7), "any")
    x = spoilt(normal((5, C, 7)), where)
    y = norm_of()(x.as_subclass(Mine), **valid)
    torch.testing.assert_close(y.as_subclass(Tensor), norm_of()(x, **valid))


def test_the_signature_says_what_it_takes() -> None:
    for norm in (bn_ext.FusedBatchNorm1d(C), bn_ext.FusedBatchRenorm1d(C)):
        assert list(inspect.signature(norm.forward).parameters) == ["input", "lengths", "mask"]
        x = normal((5, C, 7))
        valid, _ = positions_of(x.shape, "lengths")
        # By place nothing but what exporters and tracers fill in.
        assert torch.equal(norm.eval()(x, None, None, **valid), norm(x, **valid))
        for more in ((valid["lengths"],), (None, valid["lengths"]), (None, None, None)):
            with pytest.raises(TypeError, match=f"takes 2 positional arguments but {len(more) + 2} were given"):
                norm(x, *more)


def test_traced_by_the_names_of_its_arguments() -> None:
    norm, x = norm_of().eval(), normal((5, C, 7))
    valid, _ = positions_of(x.shape, "lengths")
    traced = torch.jit.trace(norm, example_kwarg_inputs={"input": x, **valid})
    assert torch.equal(traced(x, **valid), norm(x, **valid))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_sees_the_operators(mode: str) -> None:
    """And makes a graph for all lengths, not for those that it saw."""
    norm, x = norm_of(track_running_stats=False, affine=False), normal((5, C, 7))

    def gradient(t: Tensor, lengths: Tensor) -> Tensor:
        t = t.detach().requires_grad_()
        return torch.autograd.grad(norm(t, lengths=lengths).pow(3).sum(), t)[0]

    graph = make_fx(gradient, tracing_mode=mode)(x, torch.tensor([7, 6, 5, 4, 3]))
    called = {str(node.target) for node in graph.graph.nodes}
    assert {"bn_ext.batch_norm_forward.default", "bn_ext.batch_norm_backward.default"} <= called
    other = torch.tensor([1, 0, 7, 2, 2])
    torch.testing.assert_close(graph(x, other), gradient(x, other))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_compiled_for_any_number_of_samples(activation: str) -> None:
    act = bn_ext.BatchNormAct1d(C, activation)

    def pick(x: Tensor, keep: Tensor, lengths: Tensor) -> Tensor:
        return act(x[keep], x[keep], lengths=lengths[keep])  # type: ignore[no-any-return]

    x, lengths = normal((9, C, 7)), torch.arange(9) % 8
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(pick, fullgraph=True, backend="aot_eager")
        for keep in (torch.arange(9) % 2 == 0, torch.arange(9) > 0):
            torch.testing.assert_close(compiled(x, keep, lengths), pick(x, keep, lengths))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensor_hooks_copies_and_pickles(device: str, kind: str) -> None:
    shape = (5, C, 7)
    valid, where = positions_of(shape, kind)
    x = spoilt(normal(shape, device=device), where).requires_grad_()
    norm = norm_of(device)
    (expected,) = torch.autograd.grad(norm(x, **on(device, valid)).square().sum(), x)
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        with torch.autograd.graph.save_on_cpu():
            y = other(x, **on(device, valid))
        assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_frozen_and_lazy(device: str) -> None:
    valid, where = positions_of((5, C, 7), "lengths")
    x = spoilt(normal((5, C, 7), device=device), where)
    norm = bn_ext.freeze(norm_of(device)).train()
    rows = norm(rows_of(x, where))
    torch.testing.assert_close(rows_of(norm(x, **on(device, valid)), where), rows)
    lazy = bn_ext.LazyFusedBatchNorm1d(device=device)
    assert lazy(x, **on(device, valid)).isfinite().all() and lazy.num_features == C
    lazy = bn_ext.LazyFusedBatchNorm1d(device=device)
    packed = pack_padded_sequence(normal((5, 7, C), device=device), torch.tensor([7, 5, 3, 2, 1]), batch_first=True)
    assert lazy(packed).data.shape == (18, C) and type(lazy) is bn_ext.FusedBatchNorm1d
