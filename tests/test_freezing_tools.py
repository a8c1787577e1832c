"""Frozen batch norms in convert and revert, lazy ones, and under torch's tools."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.swa_utils import update_bn

import bn_ext
from drop_in import ran
from freezing import (
    FUSED,
    LAZY,
    NATIVE,
    Norm,
    any_lazy,
    equal,
    evaluated,
    is_frozen,
    is_unfrozen,
    network,
    norms_of,
    ours_and_native,
    state_of,
)
from support import OpLog, assert_same, module_for, normal, pair, step

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit"),
    pytest.mark.filterwarnings("ignore:Lazy modules"),
]


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
