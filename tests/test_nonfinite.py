"""inf and NaN in input, parameters, statistics and gradients: they spread as in native, and to no other channel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bn_ext
from support import Step, module_for, normal, pair, step

INF, NAN = float("inf"), float("nan")


def kinds(tensor: Tensor | None) -> Tensor | None:
    """Finite entries become 0: only the pattern of inf, -inf and NaN is left."""
    return None if tensor is None else torch.where(tensor.isfinite(), torch.zeros_like(tensor), tensor)


def assert_kinds(ours: Tensor | None, right: Tensor | None, name: str) -> None:
    torch.testing.assert_close(
        kinds(ours), kinds(right), rtol=0, atol=0, equal_nan=True, check_dtype=False, msg=lambda m: f"{name}: {m}"
    )


def assert_same_kinds(ours: Step, native: Step) -> None:
    """Output and buffers hold the same inf, -inf and NaN. A gradient is a difference of several terms, and which of inf
    and NaN it ends as depends on their order, in native from one of its kernels to the next: it must be non-finite in
    the same places."""
    for name, theirs in vars(native).items():
        mine = getattr(ours, name)
        if name.startswith("grad"):
            assert torch.equal(mine.isfinite(), theirs.isfinite()), f"{name}: {mine} where native has {theirs}"
        else:
            assert_kinds(mine, theirs, name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("where", ["first", "middle", "last", "all"])
@pytest.mark.parametrize("shape", [(9, 3), (300, 3), (4, 3, 5), (2, 3, 700)], ids=str)
def test_non_finite_input_as_native(
    device: str, shape: tuple[int, ...], where: str, value: float, training: bool
) -> None:
    x, g = normal(shape, device=device), normal(shape, device=device, seed=1)
    channel = x.transpose(0, 1)[1]
    index = {"first": 0, "middle": channel.numel() // 2, "last": channel.numel() - 1}
    spots = range(channel.numel()) if where == "all" else [index[where]]
    for spot in spots:
        channel[tuple(int(i) for i in torch.unravel_index(torch.tensor(spot), channel.shape))] = value
    ours, native = pair(3, device)
    ours.train(training), native.train(training)
    assert_same_kinds(step(ours, x, g), step(native, x, g))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("value", [INF, -INF, NAN])
@pytest.mark.parametrize("which", ["weight", "bias", "running_mean", "running_var", "grad_output"])
def test_non_finite_parameters_and_gradients(device: str, which: str, value: float, training: bool) -> None:
    """An infinite weight makes native's output inf on one device and NaN on the other; non-finite is what counts."""
    results = []
    for module in pair(3, device):
        module.train(training)
        x, g = normal((9, 3), device=device), normal((9, 3), device=device, seed=1)
        with torch.no_grad():
            if which == "grad_output":
                g[4, 1] = value
            else:
                getattr(module, which)[1] = value
        results.append(step(module, x, g))
    if which == "weight":
        assert torch.equal(results[0].output.isfinite(), results[1].output.isfinite())
        results[0].output = results[1].output
    assert_same_kinds(*results)


def test_opposite_infinities_and_zero_variance(device: str) -> None:
    for x in (
        torch.tensor([[INF, 1.0], [-INF, 1.0], [0.0, 1.0]], device=device),
        torch.zeros(4, 2, device=device),
        torch.full((4, 2), 3e38, device=device),
    ):
        g = torch.arange(x.numel(), device=device, dtype=torch.float32).view_as(x)
        if bool((x == 3e38).all()):
            # Native's own sum overflows here; ours must stay finite.
            result = step(module_for(bn_ext.FusedBatchNorm1d, 2, device), x, g)
            assert result.output is not None and result.output.isfinite().all()
            continue
        ours, native = pair(2, device)
        assert_same_kinds(step(ours, x, g), step(native, x, g))
