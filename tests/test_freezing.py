"""bn_ext.freeze and bn_ext.unfreeze: batch norms that stay in evaluation, of ours and of torch's classes alike."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

import bn_ext
from drop_in import ran
from support import FLOATS, OpLog, assert_same, error_of, module_for, name_of, normal, pair, step

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Lazy modules"),
]
FUSED, NATIVE = bn_ext.FusedBatchNorm1d, nn.BatchNorm1d
Norm = nn.modules.batchnorm._BatchNorm


class Mine(nn.BatchNorm1d):
    """A subclass of somebody's."""


class MineFused(bn_ext.FusedBatchNorm1d):
    """The same of ours."""


KINDS: dict[type[Norm], tuple[int, ...]] = {  # and the shape of an input
    FUSED: (8, 5), MineFused: (8, 5), NATIVE: (8, 5), Mine: (8, 5), nn.SyncBatchNorm: (8, 5),
    nn.BatchNorm2d: (4, 5, 3, 2), nn.BatchNorm3d: (4, 5, 3, 2, 2),
}  # fmt: skip
LAZY: dict[type[Norm], tuple[int, ...]] = {
    bn_ext.LazyFusedBatchNorm1d: (8, 5), nn.LazyBatchNorm1d: (8, 5), nn.LazyBatchNorm2d: (4, 5, 3, 2),
    nn.LazyBatchNorm3d: (4, 5, 3, 2, 2),
}  # fmt: skip
any_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
any_lazy = pytest.mark.parametrize("kind", LAZY, ids=lambda kind: kind.__name__)
ours_and_native = pytest.mark.parametrize("kind", [FUSED, NATIVE], ids=["ours", "native"])


def network(kind: type[nn.BatchNorm1d], device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(module_for(kind, 5), nn.Dropout(0.0))
    return nn.Sequential(nn.Linear(6, 5), module_for(kind, 5), nn.ReLU(), inner).to(device)


def norms_of(model: nn.Module) -> list[Norm]:
    return [module for module in model.modules() if isinstance(module, Norm)]


def is_frozen(model: nn.Module) -> bool:
    """Whether every batch norm of model stays in evaluation through train(), which returns it, and says so."""
    norms = norms_of(model)
    kept = all(norm.train() is norm and not norm.training and "frozen=True" in repr(norm) for norm in norms)
    model.train()
    return bool(norms) and kept and not any(norm.training for norm in norms)


def is_unfrozen(model: nn.Module) -> bool:
    norms = norms_of(model)
    return bool(norms) and all(norm.train().training and "frozen" not in repr(norm) for norm in norms)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """What a copy of model that was never frozen computes in evaluation."""
    return bn_ext.unfreeze(copy.deepcopy(model)).eval()(x)


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


# ---- as nn.Module.train ----


@ours_and_native
def test_train_of_a_frozen_batch_norm_returns_it(kind: type[nn.BatchNorm1d]) -> None:
    norm = bn_ext.freeze(kind(5))
    assert norm.train() is norm and norm.train(False) is norm and norm.eval() is norm


@pytest.mark.parametrize("mode", [1, None, "yes"])
@ours_and_native
def test_a_mode_that_is_none_raises_natives_words_and_is_not_noted(kind: type[nn.BatchNorm1d], mode: Any) -> None:
    norm = bn_ext.freeze(kind(5).eval())
    norm.train()
    raised = error_of(lambda: norm.train(mode))
    assert raised is not None and raised == error_of(lambda: kind(5).train(mode))
    assert not norm.training and bn_ext.unfreeze(norm).training


@ours_and_native
def test_children_of_a_frozen_batch_norm_follow(kind: type[nn.BatchNorm1d]) -> None:
    norm = kind(5)
    norm.child = nn.Sequential(nn.Dropout())
    bn_ext.freeze(norm)
    for mode in (False, True):
        norm.train(mode)
        assert [m.training for m in norm.child.modules()] == [mode, mode]
    norm.child[0].eval()
    assert bn_ext.unfreeze(norm).training and not norm.child[0].training, "unfreeze is for batch norms alone"


class AlwaysEvaluates(nn.BatchNorm1d):
    """The old way to freeze, in a class."""

    def train(self, mode: bool = True) -> AlwaysEvaluates:
        return super().train(False)


def never_trains(self: nn.Module, mode: bool = True) -> nn.Module:
    """The old way to freeze, in an instance."""
    return self


def test_a_train_of_its_own_is_there_again_and_decides() -> None:
    in_class, in_instance = AlwaysEvaluates(5).eval(), NATIVE(5).eval()
    in_instance.train = MethodType(never_trains, in_instance)
    own = in_instance.train
    model = nn.Sequential(in_class, in_instance)
    assert is_frozen(bn_ext.freeze(model))
    bn_ext.unfreeze(model.train())
    assert in_instance.train is own and [m.training for m in model] == [False, False]
    assert not model.train()[0].training and not model[1].training
    model[0].training = model[1].training = True
    bn_ext.unfreeze(bn_ext.freeze(model))
    assert [m.training for m in model] == [True, True], "nobody has asked since"


def test_a_train_of_its_own_is_asked_when_it_is_unfrozen() -> None:
    class Counts(nn.BatchNorm1d):
        asked = 0

        def train(self, mode: bool = True) -> Counts:
            self.asked += 1
            return super().train(mode)

    norm = bn_ext.freeze(Counts(5).eval())
    norm.train()
    assert bn_ext.unfreeze(norm).training and norm.asked == 2


def test_training_is_not_true_for_a_moment_either() -> None:
    class Watched(nn.BatchNorm1d):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "training":
                written.append(value)
            super().__setattr__(name, value)

    written: list[bool] = []
    norm = bn_ext.freeze(Watched(5).train())
    written.clear()
    nn.Sequential(norm).train().eval().train()
    assert not any(written)


@ours_and_native
def test_a_training_flag_set_by_hand_holds_until_the_next_train_eval_or_freeze(kind: type[nn.BatchNorm1d]) -> None:
    norm = bn_ext.freeze(kind(5))
    for again in (norm.train, norm.eval, lambda: bn_ext.freeze(norm)):
        norm.training = True
        before = int(norm.num_batches_tracked)
        norm(normal((8, 5)))
        assert norm.num_batches_tracked == before + 1
        again()
        norm(normal((8, 5)))
        assert not norm.training and norm.num_batches_tracked == before + 1


# ---- state and text ----


@ours_and_native
def test_a_state_dict_is_the_same_and_loads_in_both_directions(kind: type[nn.BatchNorm1d]) -> None:
    plain, frozen = network(kind), network(kind)
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(2)
        plain[1].running_mean.add_(1)
    bn_ext.freeze(frozen)
    kept = state_of(frozen)
    assert list(frozen.state_dict()) == list(plain.state_dict()) and frozen.state_dict()._metadata == (
        plain.state_dict()._metadata
    )
    assert not equal(kept, state_of(plain))
    frozen.load_state_dict(plain.state_dict())
    assert equal(state_of(frozen), state_of(plain)) and is_frozen(frozen)
    plain.load_state_dict(kept)
    assert equal(state_of(plain), kept) and is_unfrozen(plain)


@any_kind
def test_it_shows_in_the_text_of_a_frozen_batch_norm(kind: type[Norm]) -> None:
    norm = kind(5)
    text = repr(norm)
    assert repr(bn_ext.freeze(norm)) == f"{text[:-1]}, frozen=True)"
    assert repr(bn_ext.unfreeze(norm)) == text


def test_it_shows_where_a_class_says_nothing_of_itself_too() -> None:
    class Silent(nn.BatchNorm1d):
        def extra_repr(self) -> str:
            return ""

    assert repr(bn_ext.freeze(Silent(5))) == "Silent(frozen=True)"


def test_a_text_of_its_own_is_kept() -> None:
    norm = NATIVE(5)
    norm.extra_repr = lambda: "mine"
    assert repr(bn_ext.freeze(norm)) == "BatchNorm1d(mine, frozen=True)"
    assert repr(bn_ext.unfreeze(norm)) == "BatchNorm1d(mine)"


@ours_and_native
def test_resetting_a_frozen_batch_norm_keeps_its_statistics(kind: type[nn.BatchNorm1d]) -> None:
    norm = bn_ext.freeze(module_for(kind, 5))
    before = [buffer.clone() for buffer in norm.buffers()]
    norm.reset_running_stats()
    norm.reset_parameters()
    assert all(map(torch.equal, norm.buffers(), before)) and torch.equal(norm.weight, torch.ones(5))
    bn_ext.unfreeze(norm).reset_running_stats()
    assert torch.equal(norm.running_mean, torch.zeros(5))


# ---- copies ----


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


copies = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, averaged])


@copies
@ours_and_native
def test_a_copy_is_frozen_and_apart_from_its_original(
    copied: Callable[[nn.Module], nn.Module], kind: type[nn.BatchNorm1d]
) -> None:
    model = bn_ext.freeze(network(kind)).eval()
    clone: Any = copied(model)
    assert is_frozen(clone) and clone.train()[1].train() is clone[1]
    assert {m.training for m in norms_of(bn_ext.unfreeze(model))} == {False}, "its train() told the original"
    assert is_frozen(clone)
    assert {m.training for m in norms_of(bn_ext.unfreeze(clone))} == {True} and is_unfrozen(clone)


@copies
@ours_and_native
def test_a_copy_of_a_lone_batch_norm_is_frozen_and_apart(
    copied: Callable[[nn.Module], nn.Module], kind: type[nn.BatchNorm1d]
) -> None:
    norm = bn_ext.freeze(module_for(kind, 5))
    clone: Any = copied(norm)
    assert is_frozen(clone) and clone.eval() is clone and bn_ext.unfreeze(norm).training
    assert not bn_ext.unfreeze(clone).training


@ours_and_native
def test_a_shallow_copy_is_frozen_and_apart_once_it_is_given_to_freeze(kind: type[nn.BatchNorm1d]) -> None:
    """Before that it has the original's train(), which cannot know for whom it is called: as the docstring says."""
    norm = bn_ext.freeze(module_for(kind, 5))
    clone = copy.copy(norm)
    assert clone.train() is norm and not clone.training and "frozen=True" in repr(clone)
    bn_ext.freeze(clone)
    assert is_frozen(clone) and clone.eval() is clone and repr(clone).count("frozen=True") == 1
    assert bn_ext.unfreeze(norm).training and is_frozen(clone)
    assert is_unfrozen(bn_ext.unfreeze(clone))


@ours_and_native
def test_a_shallow_copy_can_be_unfrozen_alone(kind: type[nn.BatchNorm1d]) -> None:
    norm = bn_ext.freeze(kind(5))
    clone = bn_ext.unfreeze(copy.copy(norm))
    assert clone.training and is_unfrozen(clone) and is_frozen(norm)


@ours_and_native
def test_replicas_of_data_parallel_are_frozen(kind: type[nn.BatchNorm1d]) -> None:
    """What torch.nn.parallel.replicate makes of each module; all of it needs two GPUs."""
    norm = bn_ext.freeze(module_for(kind, 5)).train()
    replica = norm._replicate_for_data_parallel()
    replica.weight, replica.bias = norm.weight, norm.bias
    x, before = normal((8, 5)), state_of(norm)
    assert torch.equal(replica(x), norm(x)) and not replica.training and equal(state_of(norm), before)


# ---- convert, revert, fusing ----

WAYS = [
    pytest.param(bn_ext.convert, NATIVE, FUSED, id="convert"),
    pytest.param(lambda model: bn_ext.convert(model, fuse=True), NATIVE, FUSED, id="fuse"),
    pytest.param(bn_ext.revert, FUSED, NATIVE, id="revert"),
    pytest.param(lambda model: bn_ext.revert(bn_ext.convert(model, fuse=True)), FUSED, NATIVE, id="unfuse"),
]


@pytest.mark.parametrize(("swap", "source", "target"), WAYS)
def test_frozen_batch_norms_stay_frozen_through_convert_and_revert(
    swap: Callable[[Any], Any], source: type[Norm], target: type[Norm]
) -> None:
    model = bn_ext.freeze(network(source))
    x = normal((8, 6))
    expected = model.train()(x)
    swap(model)
    assert {type(norm) for norm in norms_of(model)} == {target} and is_frozen(model)
    before = state_of(model)
    torch.testing.assert_close(model(x), expected)
    assert equal(state_of(model), before)
    bn_ext.unfreeze(model)
    assert {norm.training for norm in norms_of(model)} == {True} and is_unfrozen(model)


def test_a_conversion_that_fails_leaves_frozen_batch_norms_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bn_ext.freeze(network(NATIVE))
    monkeypatch.setattr(sys.modules["bn_ext.convert"], "_fuse", lambda *_: 1 / 0)  # bn_ext.convert is the function
    with pytest.raises(ZeroDivisionError):
        bn_ext.convert(model, fuse=True)
    assert type(model[1]) is NATIVE and is_frozen(model)


def test_frozen_batch_norms_fuse_and_give_what_evaluation_gives(device: str) -> None:
    model = bn_ext.convert(network(NATIVE, device), fuse=True)
    evaluated = copy.deepcopy(model).eval()
    bn_ext.freeze(model).train()
    assert bn_ext.fusion_report(model)[0].fused
    x, before = normal((8, 6), device=device), state_of(model)
    with OpLog() as log:
        result = ran(model, x.clone().requires_grad_())
    assert log.fused == 1 and equal(state_of(model), before)
    expected = ran(evaluated, x.clone().requires_grad_())
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    bn_ext.unfreeze(model)(x)
    assert [int(norm.num_batches_tracked) for norm in norms_of(model)] == [1, 1]
    with OpLog() as log:
        model(x)
    assert log.fused == 1


def test_the_batch_norm_of_batch_norm_act_is_frozen_and_fuses(device: str) -> None:
    block = bn_ext.freeze(bn_ext.BatchNormAct1d(5, device=device)).train()
    x, before = normal((8, 5), device=device), state_of(block)
    with OpLog() as log:
        y = block(x, x)
    assert log.fused == 1 and block.training and block.act.training and not block.norm.training
    assert torch.equal(y, copy.deepcopy(block).eval()(x, x))
    assert equal(state_of(block), before) and is_unfrozen(bn_ext.unfreeze(block))


# ---- lazy batch norms ----


@any_lazy
def test_a_lazy_batch_norm_stays_frozen_when_its_first_input_changes_its_class(kind: type[Norm]) -> None:
    norm = bn_ext.freeze(kind()).train()
    x = normal(LAZY[kind], mean=3.0)
    y = norm(x)
    assert type(norm) is kind.cls_to_become and is_frozen(norm)
    torch.testing.assert_close(y, x / (1 + norm.eps) ** 0.5)  # statistics of 0 and 1, made and not moved
    assert torch.equal(norm.running_mean, torch.zeros(5)) and torch.equal(norm.running_var, torch.ones(5))
    assert norm.num_batches_tracked == 0
    norm.running_mean.fill_(2)
    norm.reset_running_stats()
    assert norm.running_mean.eq(2).all()
    assert is_unfrozen(bn_ext.unfreeze(norm))


@any_lazy
def test_a_lazy_batch_norm_keeps_statistics_that_it_has_loaded(kind: type[Norm]) -> None:
    source = kind.cls_to_become(5)
    source.running_mean.fill_(2), source.running_var.fill_(4)
    norm = bn_ext.freeze(kind())
    norm.load_state_dict(source.state_dict())
    norm.reset_running_stats()
    x = normal(LAZY[kind])
    assert torch.equal(norm(x), source.eval()(x)) and is_frozen(norm)


# ---- torch's tools ----


@ours_and_native
def test_update_bn_leaves_frozen_statistics_and_renews_the_others(kind: type[nn.BatchNorm1d]) -> None:
    model = network(kind)
    bn_ext.freeze(model[1])
    before, other = state_of(model[1]), state_of(model[3])
    update_bn([normal((8, 6), seed=seed) for seed in range(3)], model)
    assert equal(state_of(model[1]), before) and model[1].momentum == 0.1 and is_frozen(model[1])
    assert not equal(state_of(model[3]), other) and model[3][0].num_batches_tracked == 3


@ours_and_native
def test_a_scripted_program_evaluates(kind: type[nn.BatchNorm1d]) -> None:
    model = bn_ext.freeze(network(kind)).train()
    scripted, x = torch.jit.script(model), normal((8, 6))
    before = state_of(model)
    assert torch.equal(scripted(x), copy.deepcopy(bn_ext.revert(model))(x)) and equal(state_of(model), before)
    assert not getattr(scripted, "1").training


@ours_and_native
def test_a_traced_program_evaluates_for_good(kind: type[nn.BatchNorm1d]) -> None:
    model = bn_ext.freeze(network(kind)).train()
    x, before = normal((8, 6)), state_of(model)
    traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced.train()(x), model(x))
    assert equal(state_of(model), before)


@pytest.mark.parametrize("late", [False, True], ids=["frozen_before", "frozen_after"])
@ours_and_native
def test_a_compiled_model_evaluates_in_one_graph(kind: type[nn.BatchNorm1d], late: bool) -> None:
    torch._dynamo.reset()
    model, x = network(kind), normal((8, 6))
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    if late:
        compiled(x)
    bn_ext.freeze(compiled)
    before = state_of(model)
    torch.testing.assert_close(compiled.train()(x), evaluated(model, x))
    assert equal(state_of(model), before) and is_frozen(compiled)
    bn_ext.unfreeze(compiled)(x)
    assert not equal(state_of(model), before)


@ours_and_native
def test_a_lone_batch_norm_that_is_compiled_stays_frozen(kind: type[nn.BatchNorm1d]) -> None:
    """torch.compile's wrapper writes training past train()."""
    compiled: Any = torch.compile(bn_ext.freeze(kind(5)), backend="eager")
    assert not compiled.train().training
    compiled(normal((8, 5)))
    assert compiled.num_batches_tracked == 0 and bn_ext.unfreeze(compiled).training


@pytest.mark.parametrize("strict", [False, True], ids=["plain", "strict"])
@ours_and_native
def test_an_exported_program_evaluates(kind: type[nn.BatchNorm1d], strict: bool) -> None:
    model = bn_ext.freeze(network(kind)).train()
    x, before = normal((8, 6)), state_of(model)
    program = torch.export.export(model, (x,), strict=strict)
    assert not program.graph_signature.buffers_to_mutate
    torch.testing.assert_close(program.module()(x), model(x))
    assert equal(state_of(model), before)


@ours_and_native
def test_a_graph_of_torch_fx_calls_the_frozen_batch_norm(kind: type[nn.BatchNorm1d]) -> None:
    traced = torch.fx.symbolic_trace(bn_ext.freeze(network(kind)))
    assert is_frozen(traced) and is_frozen(copy.deepcopy(traced))


class Double(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return raw * 2


@pytest.mark.parametrize("late", [False, True], ids=["frozen_before", "frozen_after"])
@ours_and_native
def test_parametrizations_go_on_and_off(kind: type[nn.BatchNorm1d], late: bool) -> None:
    norm = module_for(kind, 5)
    if not late:
        bn_ext.freeze(norm)
    parametrize.register_parametrization(norm, "weight", Double())
    bn_ext.freeze(norm)
    x = normal((8, 5))
    assert is_frozen(norm) and is_frozen(copy.deepcopy(norm)) and torch.equal(norm(x), evaluated(norm, x))
    assert not norm.eval().parametrizations.training and norm.train().parametrizations.weight[0].training
    parametrize.remove_parametrizations(norm, "weight")
    assert type(norm) is kind and is_frozen(norm) and is_unfrozen(bn_ext.unfreeze(norm))


@ours_and_native
def test_apply_and_to_leave_it_frozen(kind: type[nn.BatchNorm1d]) -> None:
    model = bn_ext.freeze(network(kind)).double().apply(lambda module: module.train())
    assert is_frozen(model) and model[1].running_mean.dtype == torch.float64
    model.apply(lambda module: setattr(module, "momentum", 0.5)).requires_grad_(False)
    assert is_frozen(model)


@ours_and_native
def test_hooks_run_as_ever(kind: type[nn.BatchNorm1d]) -> None:
    norm, seen = kind(5), []
    norm.register_forward_hook(lambda module, args, output: seen.append(module))
    bn_ext.freeze(norm)(normal((8, 5)))
    assert seen == [norm]


def test_what_conversion_to_sync_batch_norm_makes_is_new_and_not_frozen() -> None:
    """A promise of the docstring: freeze behind it."""
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(bn_ext.freeze(nn.Sequential(FUSED(5))))
    assert not synced[0].training and is_unfrozen(synced) and is_frozen(bn_ext.freeze(synced))


def test_ours_and_native_learn_alike_while_frozen(device: str) -> None:
    ours, native = (bn_ext.freeze(norm.double()).train() for norm in pair(5, device))
    x, g = normal((8, 5), torch.float64, device), normal((8, 5), torch.float64, device, seed=1)
    assert_same(step(ours, x, g), step(native, x, g))
