"""Virtual batches: one call is the loop over the pieces of torch.chunk, each by its own statistics."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import bn_ext
from bn_ext.functional import batch_norm
from reference import acc_eps, assert_within, grad_input_tolerance, grad_param_tolerance, output_tolerance, reference
from support import FLOATS, LAYOUTS, name_of, normal

OPS = torch.ops.bn_ext
C, EPS, MOMENTUM = 6, 1e-5, 0.2
SHAPES = {"even": ((24, C), 8), "odd": ((23, C), 6), "small last": ((9, C, 4), 4), "long": ((5, C, 70), 2),
          "wide": ((700, C), 64), "joined": ((9, C), 4)}  # fmt: skip
ACTIVATIONS = (None, "relu", "leaky_relu", "silu", "gelu")


def pieces(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """The pieces as the issue words them: torch.chunk's, a last one of one value a channel with the one before it."""
    found = list(x.chunk(math.ceil(x.shape[0] / size)))
    if len(found) > 1 and found[-1].shape[0] * found[-1][0, 0].numel() == 1:
        last = found.pop()
        found[-1] = torch.cat([found[-1], last])
    return tuple(found)


def in_a_loop(norm: nn.Module, x: Tensor, size: int) -> Tensor:
    return torch.cat([norm(piece) for piece in pieces(x, size)])


def norm_of(size: int | None, device: str = "cpu", channels: int = C, **options: Any) -> bn_ext.FusedBatchNorm1d:
    norm = bn_ext.FusedBatchNorm1d(channels, virtual_batch_size=size, device=device, **options)
    with torch.no_grad():
        for k, t in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
            if t is not None:
                t.copy_(normal((channels,), torch.float64, device, seed=40 + k).abs() + 0.5)
    return norm


def step(norm: nn.Module, x: Tensor, g: Tensor, call: Any = None) -> tuple[Tensor, ...]:
    """Output, gradients and statistics of one step; call: in the place of norm's."""
    x = x.detach().requires_grad_()
    y = (norm if call is None else call)(x)
    found = torch.autograd.grad(y, (x, *norm.parameters()), g)
    return (y.detach(), *found, *(b.clone() for b in norm.buffers()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("name", SHAPES)
def test_every_piece_is_normalised_by_its_own_statistics(
    device: str, name: str, dtype: torch.dtype, layout: str
) -> None:
    shape, size = SHAPES[name]
    x = LAYOUTS[layout](normal(shape, dtype, device, mean=3.0, seed=1))
    g = normal(shape, dtype, device, seed=2)
    norm = norm_of(size, device, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    weight, bias = norm.weight.detach().clone(), norm.bias.detach().clone()
    y, dx, dw, db, *_ = step(norm, x, g)
    of_weight, of_bias, allowed = 0, 0, [0, 0]
    for one, of_y, of_dx, of_g in zip(*(pieces(t, size) for t in (x, y, dx, g)), strict=True):
        ref = reference(one, weight, bias, of_g, eps=EPS)
        assert_within(of_y, ref.output, output_tolerance(ref, dtype), "output")
        assert_within(of_dx, ref.grad_input, grad_input_tolerance(ref, dtype), "grad_input")
        of_weight, of_bias = of_weight + ref.grad_weight, of_bias + ref.grad_bias
        for k, which in enumerate(("weight", "bias")):
            allowed[k] = allowed[k] + grad_param_tolerance(ref, which, dtype, weight.dtype)
    assert_within(dw, of_weight, allowed[0], "grad_weight")
    assert_within(db, of_bias, allowed[1], "grad_bias")


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("name", SHAPES)
def test_one_call_is_the_loop_to_the_bit(device: str, name: str, momentum: float | None) -> None:
    shape, size = SHAPES[name]
    x, g = normal(shape, device=device, seed=1), normal(shape, device=device, seed=2)
    ours, loop = norm_of(size, device, momentum=momentum), norm_of(None, device, momentum=momentum)
    for _ in range(3):
        y, dx, *_, mean, var, count = step(ours, x, g)
        expected = step(loop, x, g, lambda t: in_a_loop(loop, t, size))
        assert torch.equal(y, expected[0])
        assert torch.equal(dx, expected[1])
        assert torch.equal(mean, expected[-3]) and torch.equal(var, expected[-2])
        assert count == expected[-1]
    assert count == 3 * len(pieces(x, size))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_residual_and_activation_follow_in_the_same_pass(
    device: str, dtype: torch.dtype, activation: str | None
) -> None:
    shape, size = (23, C, 5), 6
    x, r, g = (normal(shape, dtype, device, seed=k) for k in (1, 2, 3))
    weight, bias = (normal((C,), device=device, seed=k).abs() for k in (4, 5))

    def run(virtual: int | None) -> list[Tensor]:
        inputs = [t.detach().clone().requires_grad_() for t in (x, r, weight, bias)]
        parts = [inputs[:2]] if virtual else list(zip(*(pieces(t, size) for t in inputs[:2]), strict=True))
        ys = [
            batch_norm(
                one, None, None, *inputs[2:], True, eps=EPS, residual=other, activation=activation,
                virtual_batch_size=virtual,
            )
            for one, other in parts
        ]  # fmt: skip
        y = torch.cat(ys)
        return [y.detach(), *torch.autograd.grad(y, inputs, g)]

    for which, (found, expected) in enumerate(zip(run(size), run(None), strict=True)):
        if which in (0, 1, 2):
            assert torch.equal(found, expected)
        else:  # sums of pieces in double, or of rounded gradients
            torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(torch.float32).eps, atol=1e-5)


def test_a_last_piece_of_one_value_joins_the_one_before_it(device: str) -> None:
    x = normal((9, C), device=device)
    norm = norm_of(4, device)  # torch.chunk makes 3 pieces of 3
    assert norm(x).isfinite().all() and norm.num_batches_tracked == 3
    norm = norm_of(8, device)  # 5 and 4
    assert torch.equal(norm(x), in_a_loop(norm_of(None, device), x, 8)) and norm.num_batches_tracked == 2
    norm = norm_of(2, device)  # 2, 2, 2, 2, 1: the last three
    assert torch.equal(norm(x), in_a_loop(norm_of(None, device), x, 2)) and norm.num_batches_tracked == 4
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        for piece in x.chunk(5):
            norm_of(None, device)(piece)


@pytest.mark.parametrize(("shape", "printed"), [((3, C), r"\[1, 6\]"), ((3, C, 1), r"\[1, 6, 1\]")])
def test_pieces_of_one_value_raise_natives_error_and_change_nothing(
    device: str, shape: tuple[int, ...], printed: str
) -> None:
    norm = norm_of(1, device)
    before = [b.clone() for b in norm.buffers()]
    with pytest.raises(
        ValueError, match="Expected more than 1 value per channel when training, got input size.*" + printed
    ):
        norm(normal(shape, device=device))
    assert all(torch.equal(b, old) for b, old in zip(norm.buffers(), before, strict=True))
    assert norm(normal((3, C, 2), device=device)).isfinite().all()  # two values in each


def test_evaluation_is_as_always(device: str) -> None:
    x = normal((23, C), device=device)
    assert torch.equal(norm_of(4, device).eval()(x), norm_of(None, device).eval()(x))


def test_without_running_statistics_evaluation_is_cut_like_training() -> None:
    """Then it goes by the batch, and TabNet's loop cuts that in evaluation too."""
    x = normal((23, C))
    norm = norm_of(4, track_running_stats=False).eval()
    assert torch.equal(norm(x), in_a_loop(norm_of(None, track_running_stats=False).eval(), x, 4))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("added", [False, True])
def test_second_derivatives(activation: str | None, added: bool) -> None:
    shape, size = (7, 2, 2), 3
    x, r = (normal(shape, torch.float64, seed=k).requires_grad_() for k in (1, 2))
    weight, bias = (normal((2,), torch.float64, seed=k).requires_grad_() for k in (3, 4))

    def call(x: Tensor, r: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(
            x, None, None, weight, bias, True, residual=r if added else None, activation=activation,
            virtual_batch_size=size,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (x, r, weight, bias))
    assert torch.autograd.gradgradcheck(call, (x, r, weight, bias))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_gradients_of_a_graph_are_those_without_one(device: str, dtype: torch.dtype) -> None:
    x = normal((23, C), dtype, device, seed=1).requires_grad_()
    r, g = (normal((23, C), dtype, device, seed=k) for k in (2, 3))
    found = []
    for create_graph in (False, True):
        y = batch_norm(x, None, None, None, None, True, residual=r, activation="relu", virtual_batch_size=6)
        found.append(torch.autograd.grad(y, x, g, create_graph=create_graph)[0])
    # A GPU takes the pieces side by side or one by one, whose blocks share sums in other ways.
    roundings = 0 if device == "cpu" else max(4 * torch.finfo(dtype).eps, 64 * acc_eps(dtype))
    torch.testing.assert_close(*found, rtol=roundings, atol=roundings)


@pytest.mark.parametrize("shape", [(23, C), (6000, C), (64, C, 300)])
def test_bits_do_not_depend_on_threads(shape: tuple[int, ...]) -> None:
    x, g = normal(shape, seed=1), normal(shape, seed=2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(step(norm_of(7), x, g))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 40), size=st.integers(1, 45), length=st.sampled_from([None, 1, 2, 5]), permuted=st.booleans())
def test_any_cut_is_the_loop(n: int, size: int, length: int | None, permuted: bool) -> None:
    x = normal((n, C) if length is None else (n, C, length), seed=n)
    if permuted:
        x = LAYOUTS["permuted"](x)
    ours, loop = norm_of(size), norm_of(None)
    try:
        expected = in_a_loop(loop, x, size)
    except ValueError as error:
        with pytest.raises(ValueError) as caught:
            ours(x)
        assert str(caught.value) == str(error)
        return
    if permuted:  # pieces of such memory are walked in another order than a copy
        torch.testing.assert_close(ours(x), expected)
        torch.testing.assert_close(list(ours.buffers()), list(loop.buffers()))
    else:
        assert torch.equal(ours(x), expected)
        assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), loop.buffers(), strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(dynamic: bool, training: bool) -> None:
    ours, eager = (norm_of(6).train(training) for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic)
    for n in (23, 23, 17) if dynamic else (23, 23):
        x, g = normal((n, C), seed=n), normal((n, C), seed=2)
        for a, b in zip(step(ours, x, g, compiled), step(eager, x, g), strict=True):
            assert torch.equal(a, b)


def test_exported_with_any_batch_size() -> None:
    norm, eager = norm_of(6), norm_of(6)
    n = torch.export.Dim("n", min=8, max=512)
    program = torch.export.export(norm, (normal((23, C)),), dynamic_shapes=({0: n},)).module()
    x = normal((41, C), seed=3)
    assert torch.equal(program(x), eager(x))
    assert dict(program.named_buffers())["num_batches_tracked"] == eager.num_batches_tracked == 7


@pytest.mark.parametrize("shape", [(23, C), (9, C, 4), (0, C)])
def test_operators_keep_their_contracts(shape: tuple[int, ...]) -> None:
    x = normal(shape)
    vectors = [normal((C,), seed=k).abs() for k in range(4)]
    count = torch.tensor(3)
    forward = OPS.batch_norm_forward.default
    torch.library.opcheck(forward, (x, *vectors, count, 0.1, EPS), {"virtual_batch_size": 6})
    saved = forward(x, *vectors, count, 0.1, EPS, virtual_batch_size=6)[1]
    arguments = (x, x, vectors[0], saved, True, [True] * 3 + [False])
    torch.library.opcheck(OPS.batch_norm_backward.default, arguments, {"virtual_batch_size": 6})


def test_torch_func_and_vmap() -> None:
    x, g = normal((23, C), seed=1), normal((23, C), seed=2)
    ours, loop = norm_of(6), norm_of(None)

    def loss(t: Tensor) -> Tensor:
        return (ours(t) * g).sum()

    expected = step(loop, x, g, lambda t: in_a_loop(loop, t, 6))[1]
    assert torch.equal(torch.func.grad(loss)(x), expected)
    assert torch.equal(ours.running_mean, loop.running_mean)
    free = norm_of(6, track_running_stats=False)
    found = torch.vmap(free)(torch.stack([x, g]))
    torch.testing.assert_close(found[1], free(g))
    _, tangent = torch.func.jvp(free, (x,), (g,))
    _, by_double_backward = torch.autograd.functional.jvp(free, (x,), (g,))
    torch.testing.assert_close(tangent, by_double_backward)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.SiLU()])
def test_fused_pairs_are_cut_too(activation: nn.Module) -> None:
    x, g = normal((23, C), seed=1), normal((23, C), seed=2)
    plain = nn.Sequential(norm_of(6), copy.deepcopy(activation))
    fused = bn_ext.convert(copy.deepcopy(plain), fuse=True)
    assert any(entry.computes != "batch norm" for entry in bn_ext.fusion_report(fused))
    for a, b in zip(step(fused, x, g), step(plain, x, g), strict=True):
        torch.testing.assert_close(a, b)
    block = bn_ext.BatchNormAct1d(C, activation="relu", virtual_batch_size=6)
    assert block.norm.virtual_batch_size == 6
    expected = torch.relu(in_a_loop(bn_ext.FusedBatchNorm1d(C), x, 6) + g)
    torch.testing.assert_close(block(x, residual=g), expected)
    wider = block(x[:1].expand(23, C), residual=g.double())  # what the kernels do not add
    assert wider.dtype == torch.float64


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_module_is_torchs_whole_batch() -> None:
    x = normal((23, C))
    scripted, whole = torch.jit.script(norm_of(6)), norm_of(None)
    torch.testing.assert_close(scripted(x), whole(x))
    assert scripted.num_batches_tracked == 1
    torch.testing.assert_close(scripted.eval()(x), whole.eval()(x))


def test_a_module_keeps_its_size() -> None:
    norm = norm_of(6)
    assert repr(norm).endswith("virtual_batch_size=6)")
    assert "virtual" not in repr(norm_of(None)) and "_virtual_batch_size" not in vars(norm_of(None))
    for other in (
        copy.deepcopy(norm),
        pickle.loads(pickle.dumps(norm)),
        bn_ext.convert(bn_ext.revert(copy.copy(norm))),
    ):
        assert other.virtual_batch_size == 6
    assert set(norm.state_dict()) == set(nn.BatchNorm1d(C).state_dict())
    lazy = bn_ext.LazyFusedBatchNorm1d(virtual_batch_size=6)
    x = normal((23, C))
    assert torch.equal(lazy(x), bn_ext.FusedBatchNorm1d(C, virtual_batch_size=6)(x))
    assert type(lazy) is bn_ext.FusedBatchNorm1d and lazy.num_batches_tracked == 4


@pytest.mark.parametrize("size", [0, -3, 2.5, "8", True])
def test_a_size_that_is_none_is_refused(size: Any) -> None:
    kind = ValueError if type(size) is int else TypeError
    with pytest.raises(kind, match="virtual_batch_size should be"):
        bn_ext.FusedBatchNorm1d(C, virtual_batch_size=size)
    with pytest.raises(kind, match="virtual_batch_size should be"):
        bn_ext.LazyFusedBatchNorm1d(virtual_batch_size=size)
    mean = torch.zeros(C)
    with pytest.raises(kind, match="virtual_batch_size should be"):
        batch_norm(normal((8, C)), mean, torch.ones(C), training=True, virtual_batch_size=size)
    assert not mean.any()


def test_operators_refuse_what_has_no_virtual_batches() -> None:
    x, weight = normal((8, C)), torch.ones(C)
    plain = (x, weight, None, None, None, None, 0.1, EPS)
    with pytest.raises(ValueError, match="at least 1, but is -1"):
        OPS.batch_norm_forward(*plain, virtual_batch_size=-1)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="at least 1, but is -1"):
        OPS.batch_norm_forward(
            *(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in plain), virtual_batch_size=-1
        )
    with pytest.raises(RuntimeError, match="no virtual batches"):
        OPS.batch_norm_forward(*plain, torch.zeros(C), torch.ones(C), virtual_batch_size=4)
    moments = OPS.batch_norm_moments(x)[None]
    with pytest.raises(ValueError, match="not parts"):
        OPS.batch_norm_forward(*plain, moments=moments, virtual_batch_size=4)
    saved = OPS.batch_norm_forward(*plain)[1]
    with pytest.raises(RuntimeError, match="saved should be"):
        OPS.batch_norm_backward(x, x, weight, saved, True, [True] * 4, virtual_batch_size=4)


def test_a_count_that_kernels_do_not_keep() -> None:
    """A count of another type is torch's to add to; with momentum=None each piece would need its own share."""
    x = normal((23, C))
    norm = norm_of(6)
    norm.num_batches_tracked = torch.tensor(2.0)
    norm(x)
    assert norm.num_batches_tracked == 6
    norm.momentum = None
    loop = copy.deepcopy(norm)
    assert torch.equal(norm(x), in_a_loop(loop, x, 6))
    torch.testing.assert_close(norm.running_mean, loop.running_mean)
    assert norm.num_batches_tracked == loop.num_batches_tracked == 10
