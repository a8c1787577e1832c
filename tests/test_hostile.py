"""Arguments that no sane program passes: each operator refuses them or computes what they mean, and nothing moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bn_ext
import hostile
from hostile import SCHEMAS, Setting, bits, freed, same_bits, sane, shrunk, spoilt, welcome
from support import error_of, module_for, normal

FUSED, NATIVE, F64 = bn_ext.FusedBatchNorm1d, nn.BatchNorm1d, torch.float64
SETTINGS = {
    "plain": Setting(residual=False, activation="identity"),
    "training": Setting(),
    "evaluation": Setting(training=False, shape=(4, 5, 3), activation="silu"),
    "part": Setting(part=True, activation="silu"),
    "cut": Setting(virtual=2, activation="gelu", shape=(7, 5, 3)),
    "lengths": Setting(padded=True, activation="silu", shape=(7, 5, 3)),
    "mask": Setting(padded=True, training=False, shape=(7, 5)),
    "renorm": Setting(renorm=True, activation="leaky_relu", seed=1),
    "renorm cut": Setting(renorm=True, virtual=2, padded=True, activation="silu", shape=(7, 5, 3)),
    "narrow": Setting(dtype=torch.bfloat16, vector_dtype=torch.float32, activation="identity", layout="permuted"),
}
ARGUMENTS = [(name, a.name) for name, schema in sorted(SCHEMAS.items()) for a in schema.arguments]


def test_there_are_operators() -> None:
    assert len(SCHEMAS) == 10


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", sorted(SCHEMAS))
def test_sane_calls_compute(name: str, setting: str) -> None:
    """Without this, the refusals below could be for any reason."""
    hostile.operator(name)(**sane(name, SETTINGS[setting]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_one_argument_spoilt(name: str, argument: str, setting: str) -> None:
    for which, how, make in spoilt(name, sane(name, SETTINGS[setting])):
        if which != argument:
            continue
        given = sane(name, SETTINGS[setting])
        made = hostile.outcome(make)
        if isinstance(made, Exception):
            continue  # torch has no such tensor
        given[argument] = made
        before = bits(list(given.values()))
        result = hostile.outcome(lambda g=given: hostile.operator(name)(**g))
        where = f"{name}, {argument} {how}: {result!r:.200}"
        if isinstance(result, Exception):
            assert same_bits(before, bits(list(given.values()))), f"moved by a refused call of {where}"
            assert "INTERNAL ASSERT" not in str(result), where
        assert isinstance(result, Exception) != welcome(name, SETTINGS[setting], argument, how), where


# ---- memory that is gone ----

STATE = ("weight", "bias", "running_mean", "running_var")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("what", ["input", *STATE])
@pytest.mark.parametrize("gone", [freed, shrunk], ids=lambda f: f.__name__)
def test_module_on_memory_that_is_gone(gone: Callable[[Tensor], Tensor], what: str, training: bool) -> None:
    """Native's error where it raises; an error all the same where it reads behind the end of what there is."""
    raised = []
    for cls in (FUSED, NATIVE):
        module, x = module_for(cls, 5, dtype=F64).train(training), normal((6, 5), F64)
        if what == "input":
            x = gone(x)
        else:
            getattr(module, what).data = gone(getattr(module, what).detach())
        unused = training and what.startswith("running")  # written only, by native too
        before = bits([getattr(module, name) for name in (*STATE, "num_batches_tracked")])
        if cls is NATIVE and gone is shrunk:
            continue
        raised.append(error_of(lambda m=module, v=x: m(v)))
        if cls is FUSED:
            assert same_bits(before, bits([getattr(module, name) for name in (*STATE, "num_batches_tracked")]))
            assert raised[0] is not None and raised[0][0] is RuntimeError, (what, unused)
    if len(raised) == 2:
        assert raised[0] == raised[1]


@pytest.mark.parametrize("what", ["grad_output", "input", "weight", "saved"])
@pytest.mark.parametrize("activation", [None, "silu", "relu"])
def test_backward_on_memory_that_is_gone(activation: str | None, what: str) -> None:
    x, g = normal((6, 5), F64).requires_grad_(), normal((6, 5), F64, seed=1)
    module = module_for(FUSED, 5, dtype=F64)
    if activation is None:
        output = module(x)
    else:
        output = bn_ext.functional.batch_norm(
            x, module.running_mean, module.running_var, module.weight, module.bias, True, activation=activation
        )
    kept = {"grad_output": g, "input": x, "weight": module.weight}
    storage = kept[what].untyped_storage() if what in kept else None
    if storage is None:
        node = output.grad_fn
        saved = (
            [t for t in node.saved_tensors if t.shape[0] in (3, 6) and t.shape[1:] == (5,)]
            if hasattr(node, "saved_tensors")
            else []
        )
        if not saved or saved[-1] is x:
            pytest.skip("this torch shows no saved tensors of a C++ node")
        storage = saved[-1].untyped_storage()
    storage.resize_(0)
    with pytest.raises(RuntimeError, match="its data is not allocated yet"):
        output.backward(g)


# ---- in place, over memory that is read too ----

OVERLAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "itself": lambda x: x,
    "view": lambda x: x.view_as(x),
    "first_row": lambda x: x[:1].expand_as(x),
    "one_channel": lambda x: x[:, :1].expand_as(x),
    "one_value": lambda x: x.flatten()[0].expand_as(x),
    "transposed": lambda x: x.t(),
    "reversed_rows": lambda x: x.as_strided(x.shape, (x.stride(0), x.stride(1)), x.storage_offset()),
    "windows": lambda x: x.flatten().as_strided(x.shape, (1, 2)),
    "other_row": lambda x: x[1:2].expand_as(x),
}


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "padded"])
@pytest.mark.parametrize("overlap", OVERLAPS)
def test_in_place_over_a_residual_that_overlaps(overlap: str, dense: bool, act: str) -> None:
    """Right, or refused in torch's words for it: never something else."""
    memory = normal((6, 6) if dense else (6, 9), F64)
    x = memory[:, :6]
    vectors = [normal((6,), F64, seed=k).abs() + 0.5 for k in range(4)]
    residual = OVERLAPS[overlap](x)
    expected = act_of(act, F.batch_norm(x.clone(), *vectors[:2], *vectors[2:]) + residual.clone())
    before = memory.clone()
    try:
        result = bn_ext.functional.batch_norm(
            x, *vectors[:2], *vectors[2:], activation=act, residual=residual, inplace=True
        )
    except RuntimeError as error:
        assert "overlap" in str(error) or "single memory location" in str(error)
        assert torch.equal(memory, before)
        return
    assert result is x
    torch.testing.assert_close(x, expected)
    assert dense or torch.equal(memory[:, 6:], before[:, 6:])


def act_of(name: str, x: Tensor) -> Tensor:
    return F.relu(x) if name == "relu" else F.gelu(x)


@pytest.mark.parametrize("which", STATE)
def test_in_place_over_its_own_statistics(which: str) -> None:
    """A vector that is a row or a column of the input that is written."""
    for take in (lambda x: x[0], lambda x: x[:, 0], lambda x: x.flatten()[::6]):
        x = normal((5, 5), F64).abs() + 0.5
        given = {k: normal((5,), F64, seed=i).abs() + 0.5 for i, k in enumerate(STATE)}
        given[which] = take(x)
        copies = {k: v.clone() for k, v in given.items()}
        expected = F.relu(F.batch_norm(x.clone(), **copies))
        result = bn_ext.functional.batch_norm(x, **given, activation="relu", inplace=True)
        torch.testing.assert_close(result, expected)


# ---- a batch without elements, and views of negatives ----


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_what_an_empty_batch_keeps_is_not_what_memory_held(training: bool, shape: tuple[int, ...]) -> None:
    name = "batch_norm_forward"
    for _ in range(3):
        torch.full((6, 5), torch.nan, dtype=F64)  # what the allocator may hand out again
        _, saved, _ = hostile.operator(name)(**sane(name, Setting(shape=shape, training=training)))
        assert saved.numel() and not saved.any()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("negated", ["input", *STATE])
def test_views_of_negatives(negated: str, training: bool) -> None:
    """As of the same numbers in memory; torch's own forgets what it has made of such statistics."""
    results: list[Any] = []
    for view in (lambda t: t, lambda t: torch._neg_view(-t)):
        module, x = module_for(FUSED, 5, dtype=F64).train(training), normal((6, 5), F64)
        if negated == "input":
            x = view(x)
        elif negated in ("weight", "bias"):
            setattr(module, negated, nn.Parameter(view(getattr(module, negated).detach())))
        else:
            setattr(module, negated, view(getattr(module, negated)))
        x = x.detach().requires_grad_()
        output = module(x)
        grads = torch.autograd.grad(output, (x, module.weight, module.bias), normal((6, 5), F64, seed=1))
        results.append([output, *grads, *(b.resolve_neg() for b in module.buffers())])
    assert all(torch.equal(plain, of_view) for plain, of_view in zip(*results, strict=True))
