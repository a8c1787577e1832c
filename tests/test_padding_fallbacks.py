"""Padded batches where no kernel computes them, or not all of them: the same values, gradients and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as fwAD
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

import bn_ext
from support import normal
from test_padding import C, assert_zero_beyond, positions_of, spoilt

SHAPE = (5, C, 7)


class Nop(TorchFunctionMode):
    """Listens, and passes on what it hears."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


MAKES: dict[str, Callable[[], nn.Module]] = {
    "norm": lambda: bn_ext.FusedBatchNorm1d(C),
    "cut": lambda: bn_ext.FusedBatchNorm1d(C, virtual_batch_size=3),
    "no bias": lambda: without_bias(),
    "act": lambda: bn_ext.BatchNormAct1d(C),
    "cut act": lambda: bn_ext.BatchNormAct1d(C, "silu", virtual_batch_size=3),
    "renorm": lambda: bn_ext.FusedBatchRenorm1d(C, warmup_steps=0),
}


def without_bias() -> nn.Module:
    norm = bn_ext.FusedBatchNorm1d(C)
    norm.bias = None
    return norm


# ---- torch.func ----


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["lengths", "any"])
@pytest.mark.parametrize("made", MAKES)
def test_gradients_of_parameters_alone(made: str, kind: str, training: bool) -> None:
    valid, where = positions_of(SHAPE, kind)
    x = spoilt(normal(SHAPE, seed=1), where)
    module = MAKES[made]().train(training)
    parameters = dict(module.named_parameters())

    def outputs(p: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
        return functional_call(module, (p, state), (x,), valid)

    def state() -> dict[str, Tensor]:
        return {name: b.clone() for name, b in module.named_buffers()}

    def loss(p: dict[str, Tensor]) -> Tensor:
        return (outputs(p, state()) + 0.5).pow(3).sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    found = torch.func.grad(loss)(parameters)
    torch.testing.assert_close(list(found.values()), list(expected), rtol=1e-4, atol=1e-4)
    _, pull = torch.func.vjp(lambda p: outputs(p, state()), parameters)
    torch.testing.assert_close(
        list(pull(3 * (outputs(parameters, state()) + 0.5).detach() ** 2)[0].values()), list(expected),
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    rows = torch.func.jacrev(lambda p: outputs(p, state()).sum((0, 2)))(parameters)
    for name, of in rows.items():
        (first,) = torch.autograd.grad(outputs(parameters, state())[:, 0].sum(), parameters[name])
        torch.testing.assert_close(of[0], first, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_second_gradients_of_parameters_alone(training: bool) -> None:
    valid, where = positions_of(SHAPE, "lengths")
    x = spoilt(normal(SHAPE, torch.float64, seed=1), where)
    norm = bn_ext.FusedBatchNorm1d(C, track_running_stats=False, dtype=torch.float64).train(training)
    weight = norm.weight.detach()

    def loss(w: Tensor) -> Tensor:
        return functional_call(norm, {"weight": w}, (x,), valid).pow(3).sum()

    torch.testing.assert_close(
        torch.func.jacrev(torch.func.grad(loss))(weight), torch.autograd.functional.hessian(loss, weight)
    )


# ---- what lies in the padding of a residual ----

ACTS: dict[str, Callable[[], nn.Module]] = {
    "PReLU": nn.PReLU, "Tanh": nn.Tanh, "Sigmoid": nn.Sigmoid, "Softplus": nn.Softplus, "Hardswish": nn.Hardswish,
    "ELU": nn.ELU, "GELU tanh": lambda: nn.GELU("tanh"), "Mish": nn.Mish, "ReLU": nn.ReLU, "SiLU": nn.SiLU,
    "GELU": nn.GELU, "LeakyReLU": nn.LeakyReLU, "Identity": nn.Identity,
}  # fmt: skip
MODES = ("kernels", "mode", "residual of another type", "wider residual", "subclass")


def gradients_with(what: float, act: nn.Module, mode: str, function: Any, where: Tensor, valid: Any) -> list[Tensor]:
    """Every gradient, with what in the padding of input, residual and grad_output."""

    def filled(t: Tensor) -> Tensor:
        return torch.where(where[:, None], t, what)

    class Sub(Tensor):
        pass

    block = bn_ext.BatchNormAct1d(C, act).train()
    x, r, g = (filled(normal(SHAPE, seed=k)) for k in (1, 2, 3))
    if mode == "residual of another type":
        x = x.bfloat16()
    x.requires_grad_()
    r = (r[None] if mode == "wider residual" else r).requires_grad_()
    of_x = x.as_subclass(Sub) if mode == "subclass" else x
    parameters = [p for p in block.parameters() if p.requires_grad]
    call: Any = block if function is None else function
    with Nop() if mode == "mode" else torch.enable_grad():
        y = call(of_x, residual=r, **valid)
    y = y.as_subclass(Tensor)
    assert_zero_beyond(y.detach().reshape(SHAPE), where)
    wanted = [x, r, *parameters] if function is None else [x, r]
    return list(torch.autograd.grad(y, wanted, g.to(y.dtype).reshape(y.shape)))


def assert_untouched(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@pytest.mark.parametrize("what", [math.nan, math.inf])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("act", ACTS)
def test_a_residual_may_hold_anything_in_its_padding(act: str, mode: str, what: float) -> None:
    valid, where = positions_of(SHAPE, "any")
    assert_untouched(*(gradients_with(fill, ACTS[act](), mode, None, where, valid) for fill in (what, 0.0)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu", "gelu"])
@pytest.mark.parametrize("function", [bn_ext.functional.batch_norm, bn_ext.functional.batch_renorm])
def test_so_may_one_of_the_functions(function: Any, activation: str | None, mode: str, training: bool) -> None:
    valid, where = positions_of(SHAPE, "lengths")

    def call(x: Tensor, **options: Any) -> Tensor:
        return function(x, torch.zeros(C), torch.ones(C), training=training, activation=activation, **options)

    assert_untouched(*(gradients_with(fill, nn.ReLU(), mode, call, where, valid) for fill in (math.nan, 0.0)))


# ---- errors come before anything changes ----


def by_dual(call: Callable[[], Any]) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return call()


def by_mode(call: Callable[[], Any]) -> Any:
    with Nop():
        return call()


# How a call is made where torch's operations compute: (x, module, arguments) -> a call.
PLACES: dict[str, Callable[[nn.Module, Tensor, dict[str, Any]], Any]] = {
    "kernels": lambda m, x, v: m(x, **v),
    "mode": lambda m, x, v: by_mode(lambda: m(x, **v)),
    "dual level": lambda m, x, v: by_dual(lambda: m(x, **v)),
    "jvp": lambda m, x, v: torch.func.jvp(lambda t: m(t, **v), (x,), (x,)),
    "grad": lambda m, x, v: torch.func.grad(lambda t: m(t, **v).sum())(x),
    "vmap": lambda m, x, v: torch.vmap(lambda t: m(t, **v))(torch.stack([x, x])),
    "vmap of lengths": lambda m, x, v: torch.vmap(lambda t, n: m(t, **{next(iter(v)): n}))(
        torch.stack([x, x]), torch.stack([*v.values()] * 2)
    ),
    "subclass": lambda m, x, v: m(x.as_subclass(type("Sub", (Tensor,), {})), **v),
}  # fmt: skip
WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "too long": ({"lengths": torch.tensor([1, 2, 8, 3, 4])}, "lengths should be from 0 to 7, but there is 8"),
    "negative": ({"lengths": torch.tensor([1, -1, 7, 3, 4])}, "lengths should be from 0 to 7, but there is -1"),
    "both, one in all": ({"lengths": torch.tensor([0, -7, 8, 0, 0])}, "lengths should be from 0 to 7"),
    "unsigned": ({"lengths": torch.tensor([1, 2, 8, 3, 4], dtype=torch.uint16)}, "lengths should be from 0 to 7"),
    "few": ({"lengths": torch.tensor([1, 2, 7])}, r"lengths should be of size \[5\], but are of \[3\]"),
    "2-D": ({"lengths": torch.ones(5, 7, dtype=torch.int64)}, r"lengths should be of size \[5\]"),
    "narrow mask": ({"mask": torch.ones(5, 6, dtype=torch.bool)}, "mask should have the size of input"),
    "few masks": ({"mask": torch.ones(4, 7, dtype=torch.bool)}, "mask should have the size of input"),
    "sparse lengths": ({"lengths": torch.tensor([1, 2, 7, 3, 4]).to_sparse()}, "lengths should be dense"),
    "sparse mask": ({"mask": torch.ones(5, 7, dtype=torch.bool).to_sparse()}, "mask should be dense"),
}


# vmap takes no module in training, and torch stacks neither what is sparse nor what is unsigned.
PLACES_AND_MODES = [(place, mode) for place in PLACES for mode in (True, False) if not (mode and "vmap" in place)]
CASES = [
    (wrong, place, training)
    for wrong in WRONG for place, training in PLACES_AND_MODES
    if not (place == "vmap of lengths" and ("sparse" in wrong or wrong == "unsigned"))
]  # fmt: skip


@pytest.mark.parametrize(("wrong", "place", "training"), CASES)
@pytest.mark.parametrize("made", [*MAKES, "single"])
def test_wrong_lengths_and_masks_raise_everywhere(made: str, wrong: str, place: str, training: bool) -> None:
    valid, text = WRONG[wrong]
    make = MAKES.get(made, lambda: bn_ext.FusedBatchNorm1d(C, allow_single_value=True))
    module = make().train(training)
    before = [b.clone() for b in module.buffers()]
    with pytest.raises(ValueError, match=text):
        PLACES[place](module, normal(SHAPE), valid)
    assert all(torch.equal(b, old) for b, old in zip(module.buffers(), before, strict=True))


class AnyRank(bn_ext.FusedBatchNorm1d):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


@pytest.mark.parametrize("place", ["kernels", "mode", "dual level", "subclass", "grad"])
@pytest.mark.parametrize("size", [None, 3])
def test_inputs_of_other_ranks_have_no_padding(place: str, size: int | None) -> None:
    x, mean, var = normal((5, C, 7, 2)), torch.zeros(C), torch.ones(C)

    class Function(nn.Module):
        def forward(self, x: Tensor, **valid: Tensor) -> Tensor:
            return bn_ext.functional.batch_norm(x, mean, var, training=True, virtual_batch_size=size, **valid)

    for module in (AnyRank(C, virtual_batch_size=size), Function()):
        for valid in ({"lengths": torch.ones(5).long()}, {"mask": torch.ones(5, 7).bool()}):
            with pytest.raises(ValueError, match=r"expected 2D or 3D input \(got 4D input\)"):
                PLACES[place](module, x, valid)
        if isinstance(module, AnyRank):
            assert module.num_batches_tracked == 0
    assert not mean.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
@pytest.mark.parametrize("made", MAKES)
def test_lengths_of_any_integers(made: str, dtype: torch.dtype) -> None:
    valid, where = positions_of(SHAPE, "lengths")
    lengths = valid["lengths"].to(dtype)
    x = spoilt(normal(SHAPE, seed=1), where).requires_grad_()
    found = []
    for of in (lengths, valid["lengths"]):
        module = MAKES[made]()
        y = module(x, lengths=of)
        (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x)
        of_func = torch.func.grad(lambda t, of=of, module=module: module(t, lengths=of).sum())(x.detach())
        found.append([y, first, second, of_func, by_mode(lambda of=of, module=module: module(x, lengths=of))])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize(("place", "training"), PLACES_AND_MODES)
def test_rows_longer_than_the_lengths_type_counts(place: str, training: bool, dtype: torch.dtype) -> None:
    x, lengths = normal((3, C, 300)), torch.tensor([100, 0, 120])
    module = bn_ext.FusedBatchNorm1d(C, track_running_stats=place != "jvp").train(training)
    PLACES[place](module, x, {"lengths": lengths.to(dtype)})


@pytest.mark.parametrize("kind", ["lengths", "any"])
@pytest.mark.parametrize(("place", "training"), [one for one in PLACES_AND_MODES if one[0] != "vmap"])
def test_the_output_lies_as_the_input(place: str, kind: str, training: bool) -> None:
    valid, _ = positions_of(SHAPE, kind)
    found: list[tuple[int, ...]] = []

    class Watched(bn_ext.FusedBatchNorm1d):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            output = super().forward(*args, **kwargs)
            found.append(output.stride())
            return output

    PLACES[place](Watched(C, track_running_stats=place != "jvp").train(training), normal(SHAPE), valid)
    assert {*found} == {normal(SHAPE).stride()}


@pytest.mark.parametrize("place", [place for place, training in PLACES_AND_MODES if training])
def test_one_value_a_channel_raises_whatever_counts_of_it(place: str) -> None:
    for shape, valid in (((1, C), (1,)), ((1, C, 1), (1, 1))):
        norm = bn_ext.FusedBatchNorm1d(C)
        with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training"):
            PLACES[place](norm, normal(shape), {"mask": torch.zeros(valid, dtype=torch.bool)})
        assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("kind", ["lengths", "any"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parameters", ["as input", torch.float32], ids=str)
def test_forward_mode_in_16_bits(parameters: Any, dtype: torch.dtype, kind: str) -> None:
    valid, where = positions_of(SHAPE, kind)
    x, t = (spoilt(normal(SHAPE, dtype, seed=k), where) for k in (1, 2))
    norm = bn_ext.FusedBatchNorm1d(C, dtype=dtype if parameters == "as input" else parameters)
    with fwAD.dual_level():
        y, tangent = fwAD.unpack_dual(norm(fwAD.make_dual(x, t), **valid))
    wide = bn_ext.FusedBatchNorm1d(C, dtype=torch.float64)
    with fwAD.dual_level():
        expected = fwAD.unpack_dual(wide(fwAD.make_dual(x.double(), t.double()), **valid))
    # Of the results' rounding, and of the tangent's terms before they are added: some eight units of each.
    bound = 8 * torch.finfo(dtype).eps * expected.tangent.abs().max().item()
    assert tangent is not None and y.dtype == dtype
    assert (tangent.double() - expected.tangent).abs().max() <= bound
    assert_zero_beyond(tangent, where)


# ---- evaluation takes nothing out ----


@pytest.mark.parametrize("kind", ["lengths", "any"])
@pytest.mark.parametrize("made", MAKES)
def test_vmap_over_what_counts(made: str, kind: str) -> None:
    given = [positions_of(SHAPE, kind, seed=k)[0] for k in range(3)]
    (name,) = given[0]
    x = torch.stack([normal(SHAPE, seed=k) for k in range(3)])
    x[:, -1] = math.nan
    stacked = torch.stack([valid[name] for valid in given])
    if kind == "any":
        stacked[:, -1] = False
    module = MAKES[made]().eval()
    for batch, dims in ((x, (0, 0)), (x[0], (None, 0))):
        found = torch.vmap(lambda t, of: module(t, **{name: of}), dims)(batch, stacked)
        for k in range(3):
            expected = module(batch if dims[0] is None else batch[k], **{name: stacked[k]})
            torch.testing.assert_close(found[k], expected)


def onnx_session(model: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(model, arguments, dynamo=True, verbose=False)
    return runtime.InferenceSession(program.model_proto.SerializeToString())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lengths", "any"])
@pytest.mark.parametrize("made", ["norm", "act", "renorm"])
def test_onnx(made: str, kind: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = MAKES[made]()

        def forward(self, x: Tensor, of: Tensor) -> Tensor:
            return self.norm(x, **{name: of})  # type: ignore[no-any-return]

    valid, where = positions_of(SHAPE, kind)
    ((name, of),) = valid.items()
    x = spoilt(normal(SHAPE), where)
    model = Model().eval()
    session = onnx_session(model, (x, of))
    given = dict(zip([i.name for i in session.get_inputs()], (x.numpy(), of.numpy()), strict=True))
    found = torch.from_numpy(session.run(None, given)[0])
    torch.testing.assert_close(found, model(x, of).detach(), rtol=1e-4, atol=1e-5)
