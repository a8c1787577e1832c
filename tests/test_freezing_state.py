"""What a frozen batch norm is beside its results: its train, its state, its text, and copies of it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bn_ext
from freezing import (
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
from support import error_of, module_for, normal

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Lazy modules"),
]


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
    assert all(map(torch.equal, norm.buffers(), before))
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


@any_kind
def test_reset_parameters_begins_anew(kind: type[Norm]) -> None:
    """Asked for by name, as tools do that give memory to a model of the meta device."""
    norm = bn_ext.freeze(module_for(kind, 5))
    state = state_of(norm)
    norm.to_empty(device="cpu").reset_parameters()
    assert norm.running_mean.eq(0).all() and norm.running_var.eq(1).all() and norm.weight.eq(1).all()
    assert norm.num_batches_tracked == 0 and is_frozen(norm)
    norm.load_state_dict(state)
    norm.reset_running_stats()
    assert equal(state_of(norm), state)


def test_what_cannot_be_frozen_is_named() -> None:
    model = nn.Sequential(nn.Linear(5, 4), torch.jit.script(nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="cannot freeze a batch norm of TorchScript: 1"):
        bn_ext.freeze(model)
    model[1] = nn.BatchNorm1d(4)
    del model[1].running_mean
    with pytest.raises(ValueError, match="cannot freeze a batch norm without running statistics: 1"):
        bn_ext.freeze(model)
