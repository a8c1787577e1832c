"""Second derivatives: the operators against float64, the nodes that lead to them, and third derivatives."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import bn_ext
from reference import GRAD_INPUT_BOUND, GRAD_PARAM_BOUND, assert_within, second_reference
from support import FLOATS, LAYOUTS, OpLog, error_of, module_for, name_of, normal, pair

ops = torch.ops.bn_ext
F64 = torch.float64
ALL = (True, True, True)
MASKS = [m for m in itertools.product((True, False), repeat=3) if any(m)]
trainings = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


@dataclass(frozen=True)
class Call:
    """The arguments of one call; running statistics (evaluation) or none (training)."""

    arriving: tuple[Tensor | None, Tensor | None, Tensor | None]  # at grad_input, grad_weight, grad_bias
    grad_output: Tensor
    x: Tensor
    weight: Tensor | None
    running: tuple[Tensor, Tensor] | None = None
    eps: float = 1e-5

    def run(self, mask: Sequence[bool] = ALL) -> tuple[Tensor, Tensor, Tensor]:
        first = (*self.arriving, self.grad_output, self.x, self.weight)
        fixed = self.running or ()
        _, saved, _ = ops.batch_norm_forward(self.x, self.weight, None, None, None, None, 0.1, self.eps, *fixed)
        return ops.batch_norm_double_backward(*first, saved, self.running is None, mask)

    def check(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hold a call to the float64 reference, within its error model."""
        mean, var = self.running or (None, None)
        right = second_reference(self.x, self.weight, self.grad_output, self.arriving,
                                 running_mean=mean, running_var=var, eps=self.eps)  # fmt: skip
        found = self.run()
        names = ("grad_grad_output", "grad_input", "grad_weight")
        for name, mine, tolerance in zip(names, found, right.tolerances, strict=True):
            assert_within(mine, getattr(right, name), tolerance, name)
        assert found[0].dtype == found[1].dtype == self.x.dtype
        return found


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layouts: tuple[str, str, str] = ("contiguous",) * 3,
    *,
    training: bool = True,
    mean: float = 0.5,
    std: float = 1.0,
) -> Call:
    """Tensors with means, in a layout each for x, grad_output and what arrives at grad_input; no sum vanishes."""
    plain = normal(shape, dtype, device, mean=mean, std=std)
    sign = 0.25 - 0.5 * (plain < mean).to(dtype)
    g = normal(shape, dtype, device, mean=0.25, seed=1) + sign
    gg = normal(shape, dtype, device, mean=-0.5, seed=2) - sign + 0.25 * g
    x, g, gg = (LAYOUTS[layout](t) for layout, t in zip(layouts, (plain, g, gg), strict=True))
    vectors = F64 if dtype == F64 else torch.float32
    line = torch.linspace(-1, 1, shape[1], dtype=F64, device=device)
    weight, a, b, m, v = (t.to(vectors) for t in (1.25 + 0.5 * line, line + 0.4, 0.6 - line, 0.2 * line + mean,
                                                   (1.5 + 0.4 * line) * std**2))  # fmt: skip
    return Call((gg, a, b), g, x, weight, None if training else (m, v))


# ---- values ----


@pytest.mark.isa
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    "shape",
    [
        *((6, 5), (2, 1), (37, 19), (1001, 3), (300, 64), (70, 1300)),
        *((4, 5, 3), (3, 17, 70), (9, 8, 16), (5, 3, 4001), (2, 2, 40_000)),
    ],
    ids=str,
)  # fmt: skip
@trainings
def test_shapes_and_types(device: str, shape: tuple[int, ...], dtype: torch.dtype, training: bool) -> None:
    make(shape, dtype, device, training=training).check()


@pytest.mark.isa
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_layouts(device: str, layout: str, dtype: torch.dtype) -> None:
    """Of the input, of each gradient, and of all three."""
    other = "contiguous"
    places = (layout, other, other), (other, layout, other), (other, other, layout), (layout,) * 3
    for shape, layouts in itertools.product(((37, 19), (4, 5, 3), (3, 17, 70)), places):
        for training in (True, False):
            make(shape, dtype, device, layouts, training=training).check()


@pytest.mark.parametrize("shape", [(9000, 33), (4, 3, 20_011), (600, 5, 21)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, F64], ids=name_of)
def test_several_chunks(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for layout in ("contiguous", "permuted"):
        make(shape, dtype, device, (layout,) * 3).check()


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(3001, 8), (7, 3, 999)], ids=str)
@trainings
def test_mean_far_from_zero(device: str, shape: tuple[int, ...], ratio: float, training: bool) -> None:
    for dtype in (torch.float32, F64):
        make(shape, dtype, device, mean=ratio, training=training).check()
        make(shape, dtype, device, mean=ratio * 1e-6, std=1e-6, training=training).check()


@pytest.mark.parametrize("ratio", [0.0, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(3001, 8), (70, 1300), (7, 3, 999)], ids=str)
@trainings
def test_relative_errors(device: str, shape: tuple[int, ...], ratio: float, training: bool) -> None:
    """In the norm, the promises that first gradients are held to."""
    call = make(shape, device=device, mean=ratio, training=training)
    mean, var = call.running or (None, None)
    right = second_reference(call.x, call.weight, call.grad_output, call.arriving, running_mean=mean, running_var=var)
    bounds = {"grad_grad_output": GRAD_INPUT_BOUND, "grad_input": GRAD_INPUT_BOUND, "grad_weight": GRAD_PARAM_BOUND}
    for (name, bound), mine in zip(bounds.items(), call.run(), strict=True):
        exact = getattr(right, name)
        assert float((mine.double() - exact).norm() / exact.norm()) <= bound, name


@pytest.mark.parametrize("arrives", MASKS, ids=str)
@trainings
def test_what_arrives(device: str, arrives: tuple[bool, bool, bool], training: bool) -> None:
    """Any of the three may be absent, which is the same as its being zero: on the CPU, where one kernel does both, to
    the bit."""
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16, F64), ((300, 7), (3, 17, 70))):
        call = make(shape, dtype, device, training=training)
        some = tuple(t if there else None for t, there in zip(call.arriving, arrives, strict=True))
        found = replace(call, arriving=some).check()
        if device != "cpu":
            continue
        zeros = tuple(torch.zeros_like(t) if s is None else s for t, s in zip(call.arriving, some, strict=True))
        assert all(map(torch.equal, found, replace(call, arriving=zeros).run()))


@pytest.mark.parametrize("mask", MASKS, ids=str)
@trainings
def test_masks(device: str, mask: tuple[bool, bool, bool], training: bool) -> None:
    """What is asked for is the same bits whatever else is asked for; what is not comes back empty."""
    for shape, arrives in itertools.product(((300, 7), (3, 17, 70)), MASKS):
        call = make(shape, device=device, training=training)
        call = replace(call, arriving=tuple(t if w else None for t, w in zip(call.arriving, arrives, strict=True)))
        for part, full, wanted in zip(call.run(mask), call.run(), mask, strict=True):
            assert torch.equal(part, full) and part.dtype == full.dtype if wanted else part.shape == (0,)


def test_what_has_no_part_in_a_result_is_not_read(device: str) -> None:
    """NaN in a tensor shows in every result that is made of it."""
    train, evaluate = make((70, 12), device=device), make((70, 12), device=device, training=False)
    nan = torch.full_like(train.x, torch.nan)
    gg, a, b = train.arriving
    unread = {
        "grad_output, for its own derivative": (replace(train, grad_output=nan), (True, False, False)),
        "evaluation: grad_output, for its own": (replace(evaluate, grad_output=nan), (True, False, False)),
        "evaluation: x without gg_weight": (replace(evaluate, x=nan, arriving=(gg, None, b)), ALL),
        "evaluation: x for the derivative by x": (replace(evaluate, x=nan), (False, True, True)),
        "evaluation: what arrives, for the derivative by x": (
            replace(evaluate, arriving=(nan, a, b)),
            (False, True, False),
        ),
        "both, for the bias alone": (replace(evaluate, x=nan, grad_output=nan, arriving=(None, None, b)), ALL),
    }  # fmt: skip
    for name, (call, mask) in unread.items():
        assert all(t.isfinite().all() for t in call.run(mask)), name
    for call in (replace(train, x=nan), replace(train, arriving=(nan, a, b)), replace(evaluate, grad_output=nan)):
        assert not all(t.isfinite().all() for t in call.run())


@pytest.mark.parametrize("shape", [(70, 12), (5, 3, 701)], ids=str)
def test_products_beyond_the_range_of_float(shape: tuple[int, ...]) -> None:
    """gg * dy overflows float32, no result does: on the CPU such sums are done again in double."""
    call = make(shape, mean=0.5e30, std=1e30)
    gg, a, b = call.arriving
    call = replace(call, grad_output=call.grad_output * 1e25, arriving=(gg * 1e25, a, b))
    assert not (call.grad_output * call.arriving[0]).isfinite().all()
    assert all(t.isfinite().all() for t in call.check())


def test_constant_channel(device: str) -> None:
    call = make((64, 4), device=device)
    x = call.x.clone()
    x[:, 1] = 3.25
    replace(call, x=x).check()


@trainings
def test_types_of_parameters(device: str, training: bool) -> None:
    """Parameters and what arrives at them in any type and stride; tensors of another type are converted."""
    call = make((70, 12), torch.bfloat16, device, training=training)
    for kind in (torch.bfloat16, torch.float32, F64):
        _, a, b = call.arriving
        wide = torch.stack([a.to(kind), b.to(kind)], 1)
        arriving = call.arriving[0], wide[:, 0], b[:1].to(kind).expand(12)
        found = replace(call, arriving=arriving, weight=call.weight.to(kind)).check()
        assert found[2].dtype == kind
    found = replace(call, weight=None).check()
    assert found[2].dtype == torch.float32
    converted = replace(call, grad_output=call.grad_output.float(), arriving=tuple(t.double() for t in call.arriving))
    assert all(map(torch.equal, converted.run(), call.run()))


@pytest.mark.parametrize("shape", [(0, 4), (2, 4, 0), (0, 0)], ids=str)
@trainings
def test_empty_input(device: str, shape: tuple[int, ...], training: bool) -> None:
    x, vector = torch.empty(shape, device=device), torch.ones(shape[1], device=device)
    running = None if training else (vector, vector)
    found = Call((x, vector, vector), x, x, vector, running).run()
    assert found[0].shape == found[1].shape == x.shape and torch.equal(found[2], torch.zeros_like(vector))


def test_shapes_that_do_not_fit_are_refused(device: str) -> None:
    call = make((6, 4), device=device)
    gg, a, b = call.arriving
    assert error_of(call.run) is None
    wrong = {
        "grad_grad_input should have the size of input, [6, 4], but has [5, 4]": replace(call, arriving=(gg[:5], a, b)),
        "grad_grad_weight should contain 4 elements not 3": replace(call, arriving=(gg, a[:3], b)),
        "grad_grad_bias should contain 4 elements not 3": replace(call, arriving=(gg, a, b[:3])),
        "grad_output should have the size of input, [6, 4], but has [5, 4]": replace(call, grad_output=gg[:5]),
    }
    for text, bad in wrong.items():
        assert error_of(bad.run) == (RuntimeError, text)
    saved = torch.ones(6, 5, device=device)
    error = error_of(lambda: ops.batch_norm_double_backward(gg, a, b, gg, call.x, None, saved, True, ALL))
    assert error is not None and error[1].startswith("saved should be batch_norm_forward's contiguous (6, 4) tensor")


# ---- autograd ----


def functional(training: bool, device: str, channels: int = 3) -> Callable[..., Tensor]:
    """A pure function of (x, weight, bias)."""
    mean = torch.linspace(-0.5, 0.5, channels, dtype=F64, device=device)
    var = torch.linspace(0.5, 1.5, channels, dtype=F64, device=device)

    def run(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        return bn_ext.functional.batch_norm(x, mean.clone(), var.clone(), weight, bias, training, 0.1, 1e-3)

    return run


@pytest.mark.parametrize("layout", ["contiguous", "permuted", "channels_first", "sliced_channels", "strided_last"])
@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 4)], ids=str)
@trainings
def test_finite_differences(device: str, shape: tuple[int, ...], layout: str, training: bool) -> None:
    x = LAYOUTS[layout](normal(shape, F64, device)).requires_grad_()
    g = LAYOUTS[layout](normal(shape, F64, device, seed=1)).requires_grad_()
    vectors = [normal((3,), F64, device, seed=k).requires_grad_() for k in (2, 3)]
    assert gradgradcheck(functional(training, device), (x, *vectors), (g,))


@pytest.mark.parametrize("affine", [True, False])
@trainings
def test_third_derivatives(device: str, affine: bool, training: bool) -> None:
    """The second derivatives' own, by finite differences and once more differentiated."""
    batch_norm = functional(training, device)

    def gradients(g: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(batch_norm(*inputs), inputs, g, create_graph=True)

    x, g = (normal((4, 3), F64, device, seed=k).requires_grad_() for k in (0, 1))
    vectors = [normal((3,), F64, device, seed=k).requires_grad_() for k in (2, 3)] if affine else []
    assert gradcheck(gradients, (g, x, *vectors))
    assert gradgradcheck(gradients, (g, x, *vectors))


def operators_of(log: OpLog) -> list[str]:
    return [name.removeprefix("bn_ext::batch_norm_").split(".")[0] for name in log.names if name.startswith("bn_ext")]


@trainings
def test_which_operators_run(device: str, training: bool) -> None:
    """A graph of the gradients changes nothing before it is asked for; a second derivative is one more operator."""
    for create_graph in (False, True):
        module = module_for(bn_ext.FusedBatchNorm1d, 4, device).train(training)
        x = normal((6, 4), device=device).requires_grad_()
        with OpLog() as log:
            (gx,) = torch.autograd.grad(module(x).pow(2).sum(), x, create_graph=create_graph)
        assert operators_of(log) == ["forward", "backward"]
        assert (gx.grad_fn is not None) == create_graph
    with OpLog() as log:
        gx.square().sum().backward()
    assert operators_of(log) == ["double_backward", "backward"]


@trainings
def test_only_what_needs_a_gradient_is_computed(device: str, training: bool) -> None:
    for frozen in (True, False):
        module = module_for(bn_ext.FusedBatchNorm1d, 4, device).train(training)
        module.weight.requires_grad_(not frozen)
        x, g = (normal((6, 4), device=device, seed=k).requires_grad_() for k in (0, 1))
        (gx,) = torch.autograd.grad(module(x), x, g, create_graph=True)
        with OpLog() as log:
            torch.autograd.grad(gx.square().sum(), g)
        assert log.calls[-1][1][-1] == [True, False, False]
        (gx,) = torch.autograd.grad(module(x), x, g.detach(), create_graph=True)
        if training:
            with OpLog() as log:
                gx.square().sum().backward()
            assert log.calls[-1][1][-1] == [False, True, not frozen]
            assert (module.weight.grad is None) == frozen


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"bias": False}, {"momentum": None}], ids=str)
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5)], ids=str)
@trainings
def test_as_native(device: str, shape: tuple[int, ...], options: dict, training: bool) -> None:
    """All gradients at once, of a function of all first gradients, twice through one graph."""
    results = []
    for module in pair(4, device, dtype=F64, **options):
        module.train(training)
        x = normal(shape, F64, device).requires_grad_()
        parameters = [p for p in (module.weight, module.bias) if p is not None]
        first = torch.autograd.grad(module(x).pow(3).sum(), [x, *parameters], create_graph=True)
        penalty = sum((f.square() * (1 + k)).sum() for k, f in enumerate(first))
        again = [torch.autograd.grad(penalty, [x, *parameters], retain_graph=True, allow_unused=True) for _ in range(2)]
        assert all(a is b or torch.equal(a, b) for a, b in zip(*again, strict=True))
        results.append([g for g in again[0] if g is not None])
    torch.testing.assert_close(*results)


# ---- a gradient penalty ----


def critic(cls: type[nn.BatchNorm1d], device: str, dtype: torch.dtype) -> nn.Sequential:
    layers = [nn.Linear(8, 16), module_for(cls, 16), nn.Tanh(), nn.Linear(16, 12), module_for(cls, 12), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(12, 1))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.constant_(layer.bias, 0.1)
    return model.to(device, dtype)


def penalty_step(model: nn.Sequential, real: Tensor, fake: Tensor) -> list[Tensor]:
    """One critic step of a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017); its parameter gradients."""
    mixed = (0.3 * real + 0.7 * fake).requires_grad_()
    (slope,) = torch.autograd.grad(model(mixed).sum(), mixed, create_graph=True)
    loss = model(fake).mean() - model(real).mean() + 10 * (slope.norm(dim=1) - 1).square().mean()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@trainings
def test_gradient_penalty(device: str, training: bool) -> None:
    """As native in float64; in float32 no further from that than twice native's own float32 step, plus roundings."""
    real, fake = normal((64, 8), F64, device), normal((64, 8), F64, device, seed=1, mean=0.5)
    steps = {}
    for dtype, cls in itertools.product((F64, torch.float32), (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d)):
        model = critic(cls, device, dtype).train(training)
        steps[dtype, cls is nn.BatchNorm1d] = penalty_step(model, real.to(dtype), fake.to(dtype))
    torch.testing.assert_close(steps[F64, False], steps[F64, True])
    # A bias before a batch norm has no gradient but rounding: the size of all gradients is what errors are held to.
    size = max(float(g.abs().max()) for g in steps[F64, True])
    for mine, theirs, right in zip(
        steps[torch.float32, False], steps[torch.float32, True], steps[F64, True], strict=True
    ):
        native = float((theirs - right).abs().max())
        assert float((mine - right).abs().max()) <= 2 * native + 64 * torch.finfo(torch.float32).eps * size


# ---- transforms ----


@trainings
def test_torch_func(device: str, training: bool) -> None:
    """grad of grad by every input, and batches of it."""
    x, v = normal((5, 3), F64, device), normal((5, 3), F64, device, seed=1)
    weight, bias = (normal((3,), F64, device, seed=k) for k in (2, 3))
    mean, var = normal((3,), F64, device, seed=4), normal((3,), F64, device, seed=5).abs() + 0.5
    results = []
    for batch_norm in (bn_ext.functional.batch_norm, F.batch_norm):

        def loss(x: Tensor, w: Tensor, b: Tensor, f: Callable[..., Tensor] = batch_norm) -> Tensor:
            return f(x, None if training else mean, None if training else var, w, b, training).pow(3).sum()

        def penalty(x: Tensor, w: Tensor, b: Tensor, loss: Callable[..., Tensor] = loss) -> Tensor:
            dx, dw = torch.func.grad(loss, (0, 1))(x, w, b)
            return (dx * v).sum() + dw.square().sum()

        second = torch.func.grad(penalty, (0, 1, 2))
        batched = torch.func.vmap(second, (0, None, None))(torch.stack([x, x.square()]), weight, bias)
        rows = torch.func.jacrev(lambda w, p=penalty: torch.func.grad(p, 1)(x, w, bias))(weight)
        results.append((*second(x, weight, bias), *batched, rows))
    torch.testing.assert_close(*results)


@trainings
def test_third_derivative_of_torch_func(device: str, training: bool) -> None:
    """As torch.autograd's own, which finite differences check above; native's takes the statistics for constants."""
    batch_norm = functional(training, device)

    def loss(x: Tensor) -> Tensor:
        return batch_norm(x).exp().sum()

    x = normal((5, 3), F64, device)
    first = torch.func.grad(loss)
    second = torch.func.grad(lambda x: first(x).square().sum())
    third = torch.func.grad(lambda x: second(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    value = loss(leaf)
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        value = gradient.square().sum()
    torch.testing.assert_close(third, gradient.detach())


def test_torch_func_takes_the_kernel_for_a_gradient(device: str) -> None:
    x = normal((6, 4), device=device)
    with OpLog() as log:
        torch.func.grad(lambda x: bn_ext.functional.batch_norm(x, None, None, training=True).pow(2).sum())(x)
    assert "bn_ext::batch_norm_backward" in log.names


@trainings
def test_batched_second_gradients(device: str, training: bool) -> None:
    v = normal((3, 6, 4), F64, device, seed=1)
    results = []
    for module in pair(4, device, dtype=F64, track_running_stats=not training):
        x = normal((6, 4), F64, device).requires_grad_()
        (gx,) = torch.autograd.grad(module.train(training)(x).exp().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(gx, (x, module.weight), v, is_grads_batched=True))
    torch.testing.assert_close(*results)
