"""A batch in parts: moments, forward by the moments of all parts, sums, backward by the sums of all parts.

With one part the stages are the whole call, to the bit where input and output lie in memory alike; with several they
are that call on the parts joined.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import bn_ext
from reference import acc_eps, assert_within, moments, output_tolerance, reference
from support import FLOATS, LAYOUTS, name_of, normal

assert bn_ext.__version__  # importing it defines the operators
OPS = torch.ops.bn_ext
C, EPS, MOMENTUM = 12, 1e-5, 0.2
SHAPES = {"rows": (70, C), "wide": (5, 700), "planes": (6, C, 40), "long": (2, 3, 3000), "joined": (900, 4)}
AFTER = {
    "plain": (None, "identity", 0.0),
    "relu": (None, "relu", 0.0),
    "gelu": (None, "gelu", 0.0),
    "residual": ("residual", "identity", 0.0),
    "masked": ("residual", "leaky_relu", 0.3),
    "kept": ("residual", "silu", 0.0),
}


class Channels(NamedTuple):
    """What a call has for each channel, and the count of batches."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    @staticmethod
    def of(x: Tensor, count: int = 4) -> Channels:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        values = [normal(x.shape[1:2], dtype, x.device.type, seed=20 + k).abs() + 0.5 for k in range(4)]
        return Channels(*values, torch.tensor(count, device=x.device))


class Data(NamedTuple):
    x: Tensor
    grad_output: Tensor
    residual: Tensor | None

    @staticmethod
    def of(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str, after: str) -> Data:
        x, g, r = (LAYOUTS[layout](normal(shape, dtype, device, seed=k)) for k in range(3))
        return Data(x, g, r if AFTER[after][0] else None)

    def part(self, begin: int, end: int) -> Data:
        return Data(*(None if t is None else t[begin:end] for t in self))  # type: ignore[arg-type]


def forward(d: Data, c: Channels, after: str, given: Tensor | None, momentum: float | None = MOMENTUM) -> Any:
    _, activation, slope = AFTER[after]
    return OPS.batch_norm_forward(d.x, *c, momentum, EPS, None, None, d.residual, activation, slope, given)


def sums(d: Data, saved: Tensor, mask: Tensor, after: str) -> Tensor:
    _, activation, slope = AFTER[after]
    return OPS.batch_norm_gradient_sums(  # type: ignore[no-any-return]
        d.grad_output, d.x, saved, d.residual, mask, activation, slope
    )


def backward(d: Data, c: Channels, saved: Tensor, mask: Tensor, after: str, given: Tensor | None) -> Any:
    _, activation, slope = AFTER[after]
    of_parameters = given is None
    wanted = [True, of_parameters, of_parameters, d.residual is not None]
    return OPS.batch_norm_backward(
        d.grad_output, d.x, c.weight, saved, True, wanted, None, d.residual, mask, activation, slope, given
    )


def assert_equal(found: Any, expected: Any, coarsest: bool = False) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def assert_nearly_equal(found: Any, expected: Any, coarsest: bool = False) -> None:
    """Sums in another order: some roundings of the statistics, and of what the results are rounded to.

    coarsest: to all of them, as sums are of what an activation keeps in the type of the input.
    """
    of_type = {t.dtype: max(torch.finfo(t.dtype).eps, acc_eps(t.dtype)) for t in found if t.is_floating_point()}
    for a, b in zip(found, expected, strict=True):
        if a.is_floating_point():
            eps = max(of_type.values()) if coarsest else of_type[a.dtype]
            allowed = (4 if eps > 1e-4 else 64) * eps  # what is rounded to 16 bits may fall on the other side
            torch.testing.assert_close(a, b, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_part_is_the_whole_call(device: str, shape: str, layout: str, dtype: torch.dtype, after: str) -> None:
    # A GPU's blocks share a sum as it suits what the pass moves, and a stage moves less.
    same = assert_nearly_equal if layout == "sliced_last" or device != "cpu" else assert_equal
    d = Data.of(SHAPES[shape], dtype, device, layout, after)
    whole, staged = Channels.of(d.x), Channels.of(d.x)
    for momentum in (MOMENTUM, None):
        expected = forward(d, whole, after, None, momentum)
        found = forward(d, staged, after, OPS.batch_norm_moments(d.x)[None], momentum)
        same(found[:2], expected[:2])
        same(staged, whole)
    _, saved, mask = expected
    own = sums(d, saved, mask, after)
    dx, dw, db, dr = backward(d, whole, saved, mask, after, None)
    found = backward(d, staged, found[1], found[2], after, own[None])
    of_parameters = ((own[2] * saved[2].double()).to(dw.dtype), own[1].to(db.dtype))
    same((found[0], found[3], *of_parameters), (dx, dr, dw, db), coarsest=device != "cpu" and after == "kept")


def test_moments_are_those_of_float64(device: str) -> None:
    x = normal((300, C), torch.float32, device) * 0.01 + 1e4
    count, high, low, m2 = OPS.batch_norm_moments(x)
    _, mean, rest, variance = moments(x)
    assert (count == 300).all()
    assert_within((high - mean) + low, rest, 2 * acc_eps(x.dtype) * variance.sqrt(), "mean")
    assert_within(m2 / count, variance, 16 * acc_eps(x.dtype) * variance, "variance")


PARTS = {"two": (3, 67), "uneven, one empty": (7, 1, 0, 62), "single values": (1, 1, 1, 67)}


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("shape", [(70, C), (70, C, 9)], ids=["rows", "planes"])
def test_parts_are_the_batch(device: str, shape: tuple[int, ...], parts: str, dtype: torch.dtype, after: str) -> None:
    """To the roundings that sums in another order differ by; every part has the same statistics, to the bit."""
    d = Data.of(shape, dtype, device, "contiguous", after)
    ends = torch.tensor(PARTS[parts]).cumsum(0).tolist()
    pieces = [d.part(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
    channels = [Channels.of(d.x) for _ in pieces]
    merged = torch.stack([OPS.batch_norm_moments(p.x) for p in pieces])
    results = [forward(p, c, after, merged) for p, c in zip(pieces, channels, strict=True)]
    for c, (_, saved, _) in zip(channels[1:], results[1:], strict=True):
        assert_equal(c, channels[0])
        assert torch.equal(saved, results[0][1])

    whole = Channels.of(d.x)
    expected = forward(d, whole, after, None)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    rounding = torch.finfo(dtype).eps
    assert_within(channels[0].running_mean, whole.running_mean, 8 * eps * whole.running_mean.abs() + eps, "mean")
    assert_within(channels[0].running_var, whole.running_var, 8 * eps * whole.running_var, "var")
    assert channels[0].num_batches_tracked == whole.num_batches_tracked
    y = torch.cat([output for output, *_ in results])
    # Where the derivative jumps, an argument within rounding of zero may fall on either side.
    assert_within(y, expected[0], (4 * rounding + 64 * eps) * (1 + expected[0].abs().double()), "output")

    given = torch.stack([sums(p, *r[1:], after) for p, r in zip(pieces, results, strict=True)])
    gradients = [backward(p, c, *r[1:], after, given) for p, c, r in zip(pieces, channels, results, strict=True)]
    dx, dw, db, dr = backward(d, whole, *expected[1:], after, None)
    away = expected[0].abs() > 64 * (rounding + eps) if after in ("relu", "masked") else torch.ones_like(y).bool()
    scale = 1 + dx.abs().double().amax()
    found = torch.cat([g[0] for g in gradients])
    bound = (4 * rounding + 512 * eps) * scale * torch.ones_like(dx).double()
    assert_within(found[away], dx[away], bound[away], "grad_input")
    if d.residual is not None:
        assert_within(torch.cat([g[3] for g in gradients])[away], dr[away], bound[away], "grad_residual")
    total = given.sum(0)
    root = torch.tensor(float(d.x.numel() / shape[1])).sqrt().item()
    worst = 64 * eps * root * (1 + d.grad_output.abs().double().amax() * d.x.abs().double().amax()).item() * 8
    for found, right in ((total[1], db), (total[2] * results[0][1][2].double(), dw)):
        assert_within(found, right.double(), worst * torch.ones_like(right).double(), "gradients of parameters")


def test_float64_of_parts_against_the_reference(device: str) -> None:
    x = normal((32, C), torch.float64, device) * 1e-2 + 100
    channels = [Channels.of(x) for _ in range(3)]
    pieces = (x[:7], x[7:8], x[8:])
    merged = torch.stack([OPS.batch_norm_moments(p) for p in pieces])
    nothing = [Data(p, p, None) for p in pieces]
    y = torch.cat([forward(d, c, "plain", merged)[0] for d, c in zip(nothing, channels, strict=True)])
    c = channels[0]
    start = Channels.of(x)
    moving = {"running_mean": start.running_mean, "running_var": start.running_var}
    ref = reference(x, c.weight, c.bias, **moving, eps=EPS, momentum=MOMENTUM)
    assert ref.running_var is not None
    torch.testing.assert_close(c.running_var, ref.running_var, rtol=1e-13, atol=0)
    assert_within(y, ref.output, output_tolerance(ref, torch.float64), "output")


def test_an_empty_part_of_a_batch_moves_the_statistics(device: str) -> None:
    full = Data.of((9, C), torch.float32, device, "contiguous", "plain")
    merged = torch.stack([OPS.batch_norm_moments(full.x), OPS.batch_norm_moments(full.x[:0])])
    assert (merged[1] == 0).all()
    ours, whole = Channels.of(full.x), Channels.of(full.x)
    output, saved, _ = forward(full.part(0, 0), ours, "plain", merged, None)
    _, expected, _ = forward(full, whole, "plain", None, None)
    assert output.shape == (0, C)
    assert torch.equal(saved, expected)
    assert_equal(ours, whole)
    none = sums(full.part(0, 0), saved, saved.new_empty(0, dtype=torch.uint8), "plain")
    assert none.shape == (3, C)
    assert (none == 0).all()


def test_no_channels(device: str) -> None:
    x = torch.empty(4, 0, device=device)
    merged = OPS.batch_norm_moments(x)
    assert merged.shape == (4, 0)
    d, c = Data(x, x, None), Channels.of(x)
    assert forward(d, c, "plain", merged[None])[0].shape == (4, 0)
    assert c.num_batches_tracked == 5


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    d = Data.of((40, 33, 90), torch.float32, "cpu", "contiguous", "kept")
    before = torch.get_num_threads()
    results = []
    try:
        for number in (threads, 3):
            torch.set_num_threads(number)
            c = Channels.of(d.x)
            merged = torch.stack([OPS.batch_norm_moments(d.x), OPS.batch_norm_moments(d.x[:3])])
            _, saved, mask = kept = forward(d, c, "kept", merged)
            given = torch.stack([sums(d, saved, mask, "kept")] * 2)
            results.append([merged, *kept, *c, given, *backward(d, c, saved, mask, "kept", given)])
    finally:
        torch.set_num_threads(before)
    assert_equal(*results)


def test_values_of_other_parts_are_counted_by_their_number(device: str) -> None:
    """A part's mean weighs as its values are many: by hand, in float64."""
    x = normal((5, C), torch.float64, device)
    other = torch.stack([torch.full((C,), v, device=device, dtype=torch.float64) for v in (20.0, 3.0, 0.0, 7.0)])
    merged = torch.stack([OPS.batch_norm_moments(x), other])
    _, saved, _ = forward(Data(x, x, None), Channels.of(x), "plain", merged)
    mean = (x.sum(0) + 60) / 25
    m2 = (x - mean).square().sum(0) + 7 + 20 * (3 - mean).square()
    torch.testing.assert_close(saved[0], mean, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(saved[2], (m2 / 25 + EPS).rsqrt(), rtol=1e-13, atol=0)


WRONG = {
    "no parts": lambda t: t[:0],
    "one part, no dimension for it": lambda t: t[0],
    "other rows": lambda t: t[:, :2],
    "other channels": lambda t: t[..., 1:],
    "float32": lambda t: t.float(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_given_must_fit(device: str, wrong: str) -> None:
    d = Data.of((6, C), torch.float32, device, "contiguous", "plain")
    ours, before = Channels.of(d.x), Channels.of(d.x)
    with pytest.raises(RuntimeError, match=r"moments should be a float64 tensor of size \(parts, 4, 12\)"):
        forward(d, ours, "plain", WRONG[wrong](OPS.batch_norm_moments(d.x)[None]))
    assert_equal(ours, before)
    _, saved, mask = forward(d, ours, "plain", None)
    with pytest.raises(RuntimeError, match=r"sums should be a float64 tensor of size \(parts, 3, 12\)"):
        backward(d, ours, saved, mask, "plain", WRONG[wrong](sums(d, saved, mask, "plain")[None]))


def test_not_both_kinds_of_statistics(device: str) -> None:
    x = normal((6, C), torch.float32, device)
    mean, var = x.mean(0), x.var(0)
    with pytest.raises(RuntimeError, match="either mean and var or those of moments"):
        OPS.batch_norm_forward(
            x, None, None, None, None, None, 0.1, EPS, mean, var, None, "identity", 0.0,
            OPS.batch_norm_moments(x)[None],
        )  # fmt: skip


@pytest.mark.parametrize(("training", "wanted"), [(False, [True, False, False, False]), (True, [True] * 4)])
def test_sums_are_for_the_input_of_training(device: str, training: bool, wanted: list[bool]) -> None:
    d = Data.of((6, C), torch.float32, device, "contiguous", "plain")
    _, saved, mask = forward(d, Channels.of(d.x), "plain", None)
    with pytest.raises(ValueError, match="sums are those of a batch in training"):
        OPS.batch_norm_backward(
            d.grad_output, d.x, None, saved, training, wanted, None, None, None, "identity", 0.0,
            sums(d, saved, mask, "plain")[None],
        )  # fmt: skip


def test_strided_results_of_a_gather(device: str) -> None:
    """What comes of a collective need not be contiguous."""
    d = Data.of((8, C), torch.float32, device, "contiguous", "plain")
    merged = torch.stack([OPS.batch_norm_moments(d.x)] * 2)
    strided = merged.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    found = [forward(d, Channels.of(d.x), "plain", given) for given in (merged, strided)]
    assert_equal(*found)
