"""bn_ext.freeze and bn_ext.unfreeze: batch norms that stay in evaluation, of ours and of torch's classes alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import bn_ext
from freezing import (
    FUSED,
    KINDS,
    NATIVE,
    Norm,
    any_kind,
    equal,
    is_frozen,
    is_unfrozen,
    network,
    norms_of,
    ours_and_native,
    state_of,
)
from support import FLOATS, module_for, name_of, normal, step

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Lazy modules"),
]


# ---- freeze ----


@any_kind
def test_a_frozen_batch_norm_goes_by_its_running_statistics_in_training_mode(device: str, kind: type[Norm]) -> None:
    norm = kind(5).to(device)
    norm.running_mean.uniform_(-1, 1), norm.running_var.uniform_(1, 2)
    x = normal(KINDS[kind], device=device, mean=3.0)
    expected = copy.deepcopy(norm).eval()(x)
    assert not torch.allclose(copy.deepcopy(norm).train()(x), expected)
    before = state_of(norm)
    for mode in (True, False, True):
        assert bn_ext.freeze(norm).train(mode)(x).equal(expected)
    assert equal(state_of(norm), before)


@any_kind
def test_training_stays_false(kind: type[Norm]) -> None:
    model = nn.Sequential(nn.Linear(5, 5), kind(5))
    assert not bn_ext.freeze(model)[1].training and model.training and model[0].training
    for ask in (model.train, model.eval, model[1].train, lambda: model.train(True), lambda: model[1].train(mode=True)):
        ask()
        assert not model[1].training
    assert [m.training for m in model.train().modules()] == [True, True, False]


@ours_and_native
def test_the_rest_of_the_model_trains(device: str, kind: type[nn.BatchNorm1d]) -> None:
    model = bn_ext.freeze(network(kind, device)).train()
    before = state_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(normal((8, 6), device=device, seed=seed)).square().sum().backward()
        optimizer.step()
    after = state_of(model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)], ids=str)
@ours_and_native
def test_requires_grad_is_left_as_it_is(kind: type[nn.BatchNorm1d], wanted: tuple[bool, bool]) -> None:
    norm = kind(5)
    norm.weight.requires_grad_(wanted[0]), norm.bias.requires_grad_(wanted[1])
    for change in (bn_ext.freeze, bn_ext.unfreeze):
        assert (change(norm).weight.requires_grad, norm.bias.requires_grad) == wanted
    bn_ext.freeze(norm)(normal((8, 5)).requires_grad_()).sum().backward()
    assert (norm.weight.grad is not None, norm.bias.grad is not None) == wanted


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 3)], ids=str)
@ours_and_native
def test_gradients_are_bitwise_those_of_evaluation(
    device: str, kind: type[nn.BatchNorm1d], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    frozen, plain = (module_for(kind, 5, device).to(dtype) for _ in range(2))
    bn_ext.freeze(frozen).train()
    x, g = normal(shape, dtype, device), normal(shape, dtype, device, seed=1)
    one, other = step(frozen, x, g), step(plain.eval(), x, g)
    for name, value in vars(other).items():
        assert value is not None and torch.equal(getattr(one, name), value), name


@ours_and_native
def test_freeze_and_unfreeze_return_the_model(kind: type[nn.BatchNorm1d]) -> None:
    for model in (network(kind), kind(5), nn.Linear(2, 2), nn.Sequential()):
        assert bn_ext.freeze(model) is model and bn_ext.unfreeze(model) is model


@any_kind
def test_the_class_and_what_else_it_holds_stay(kind: type[Norm]) -> None:
    norm = kind(5)
    before = dict(vars(norm))
    assert type(bn_ext.freeze(norm)) is kind and {**before, "training": False}.items() <= vars(norm).items()
    assert vars(bn_ext.unfreeze(norm)) == before


def test_no_other_norm_and_no_module_around_is_touched() -> None:
    model = nn.Sequential(
        nn.InstanceNorm1d(5, track_running_stats=True), nn.LayerNorm(5), nn.GroupNorm(1, 5), nn.ReLU()
    )
    model.append(FUSED(5))
    bn_ext.freeze(model).train()
    assert [m.training for m in model] == [True, True, True, True, False]
    assert all("train" not in vars(m) for m in (model, *list(model)[:4]))


@ours_and_native
def test_freezing_twice_is_freezing_once(kind: type[nn.BatchNorm1d]) -> None:
    model = bn_ext.freeze(network(kind))
    model.train()
    before = [dict(vars(norm)) for norm in norms_of(model)]
    assert [vars(norm) for norm in norms_of(bn_ext.freeze(model))] == before
    assert repr(model[1]).count("frozen=True") == 1
    bn_ext.unfreeze(model)
    assert [m.training for m in norms_of(model)] == [True, True] and is_unfrozen(model)


@ours_and_native
def test_a_shared_batch_norm_is_frozen_and_unfrozen_once(kind: type[nn.BatchNorm1d]) -> None:
    norm = kind(5)
    model = bn_ext.freeze(nn.Sequential(norm, nn.Sequential(norm, norm)))
    assert repr(norm).count("frozen=True") == 1 and is_frozen(model)
    assert is_unfrozen(bn_ext.unfreeze(model))


# ---- what cannot be frozen ----


@pytest.mark.parametrize(
    "bad",
    [
        lambda: FUSED(5, track_running_stats=False), lambda: NATIVE(5, track_running_stats=False),
        lambda: nn.LazyBatchNorm1d(track_running_stats=False), lambda: nn.BatchNorm2d(5, track_running_stats=False),
    ],
    ids=["ours", "native", "lazy", "2d"],
)  # fmt: skip
def test_without_running_statistics_it_raises_and_nothing_has_changed(bad: Callable[[], Norm]) -> None:
    model = nn.Sequential(FUSED(5), nn.Sequential(nn.ReLU(), bad()), NATIVE(5))
    before = [dict(vars(module)) for module in model.modules()]
    with pytest.raises(ValueError, match=r"without running statistics: 1\.1$"):
        bn_ext.freeze(model)
    assert [vars(module) for module in model.modules()] == before


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@ours_and_native
def test_statistics_that_were_taken_away_are_missed(kind: type[nn.BatchNorm1d], name: str) -> None:
    norm = kind(5)
    setattr(norm, name, None)
    with pytest.raises(ValueError, match=r"without running statistics: model itself$"):
        bn_ext.freeze(norm)
    assert norm.training and "train" not in vars(norm)


def test_every_path_without_statistics_is_named() -> None:
    model = nn.ModuleDict({name: FUSED(5, track_running_stats=False) for name in ("first", "second")})
    with pytest.raises(ValueError, match="first, second"):
        bn_ext.freeze(model)


@pytest.mark.parametrize("function", [bn_ext.freeze, bn_ext.unfreeze])
def test_what_is_no_module_is_refused(function: Callable[[Any], Any]) -> None:
    with pytest.raises(AttributeError):
        function(torch.ones(3))


# ---- unfreeze ----


@pytest.mark.parametrize("asked", [None, True, False], ids=["nothing", "train", "eval"])
@pytest.mark.parametrize("before", [True, False], ids=["train", "eval"])
@ours_and_native
def test_unfreeze_gives_the_mode_last_asked_for_or_the_one_before(
    kind: type[nn.BatchNorm1d], before: bool, asked: bool | None
) -> None:
    model = bn_ext.freeze(network(kind).train(before))
    for mode in () if asked is None else (not asked, asked):
        model.train(mode)
    bn_ext.unfreeze(model)
    assert {m.training for m in model.modules()} == {before if asked is None else asked}


@ours_and_native
def test_each_batch_norm_gets_its_own_mode_back(kind: type[nn.BatchNorm1d]) -> None:
    model = network(kind)
    model[1].eval()
    bn_ext.unfreeze(bn_ext.freeze(model))
    assert [m.training for m in norms_of(model)] == [False, True]
    bn_ext.freeze(model)[1].train()
    model[3].eval()
    bn_ext.unfreeze(model)
    assert [m.training for m in norms_of(model)] == [True, False]


@any_kind
def test_an_unfrozen_batch_norm_trains_as_ever(device: str, kind: type[Norm]) -> None:
    frozen, other = kind(5).to(device), kind(5).to(device)
    bn_ext.unfreeze(bn_ext.freeze(frozen))
    x = normal(KINDS[kind], device=device)
    if kind is nn.SyncBatchNorm:
        frozen, other = frozen.cpu(), other.cpu()
        x = x.cpu()
    assert torch.equal(frozen(x), other(x)) and equal(state_of(frozen), state_of(other))
    assert frozen.num_batches_tracked == 1


def test_unfreezing_what_is_not_frozen_changes_nothing() -> None:
    model = nn.Sequential(FUSED(5), NATIVE(5).eval(), nn.ReLU())
    before = [dict(vars(module)) for module in model.modules()]
    bn_ext.unfreeze(model)
    assert [vars(module) for module in model.modules()] == before


@ours_and_native
def test_a_part_of_a_model_can_be_unfrozen(kind: type[nn.BatchNorm1d]) -> None:
    model = bn_ext.freeze(network(kind))
    bn_ext.unfreeze(model[3])
    assert is_unfrozen(model[3]) and is_frozen(model[1])
