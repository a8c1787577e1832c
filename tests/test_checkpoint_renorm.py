"""A renormalised batch in a checkpoint goes by forward's running statistics, where keep_statistics notes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts, set_checkpoint_early_stop

import bn_ext
from checkpoints import Both, kept
from support import normal

C = 6
# After how many batches, and of which kind.
STATES: dict[str, tuple[int, dict[str, Any]]] = {
    "first": (0, {"warmup_steps": 0}),
    "later": (9, {"warmup_steps": 0, "momentum": 0.3}),
    "the warm-up ends": (5, {"warmup_steps": 6}),
    "smooth": (3, {"warmup_steps": 6, "smooth": True}),
    "cut": (4, {"warmup_steps": 0, "momentum": 0.3, "virtual_batch_size": 3}),
    "the warm-up ends in a cut": (2, {"warmup_steps": 8, "virtual_batch_size": 3}),
    "cumulative": (4, {"warmup_steps": 0, "momentum": None}),
}


def network(state: str, device: str = "cpu") -> nn.Module:
    """Two renormalised layers, the second of which is called twice."""
    batches, options = STATES[state]
    torch.manual_seed(0)
    again = bn_ext.FusedBatchRenorm1d(C, **options)
    layers = (
        nn.Linear(C, C),
        bn_ext.FusedBatchRenorm1d(C, **options),
        nn.Tanh(),
        again,
        nn.Linear(C, C),
        again,
        nn.Tanh(),
    )
    model = nn.Sequential(*layers).to(device)
    for k in range(batches):
        model(normal((8, C), device=device, mean=1.0, std=3.0, seed=k))
    return model


def found_by(call: Callable[..., Tensor], model: nn.Module, batches: int = 1) -> list[Tensor]:
    """Gradients and buffers after the forwards, then the backwards, of some batches."""
    device = next(model.parameters()).device
    xs = [normal((8, C), device=str(device), mean=1.0, std=3.0, seed=100 + k).requires_grad_() for k in range(batches)]
    torch.stack([call(model, x).pow(3).sum() for x in xs]).sum().backward()
    return [*(x.grad for x in xs), *(p.grad for p in model.parameters()), *model.buffers()]  # type: ignore[misc]


def assert_as_without(call: Callable[..., Tensor], state: str, device: str = "cpu", batches: int = 1) -> None:
    model = network(state, device)
    twin = copy.deepcopy(model)
    expected = found_by(lambda m, x: m(x), twin, batches)
    for a, b in zip(found_by(call, model, batches), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("batches", [1, 3])
def test_gradients_are_those_of_forward(device: str, state: str, batches: int) -> None:
    assert_as_without(kept, state, device, batches)


class Nop(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def by_mode(model: nn.Module, x: Tensor) -> Tensor:
    """Where torch's operations compute, in both runs."""

    def call(t: Tensor) -> Tensor:
        with Nop():
            return model(t)  # type: ignore[no-any-return]

    return kept(call, x)  # type: ignore[no-any-return]


def within_another(model: nn.Module, x: Tensor) -> Tensor:
    """The inner one's forward runs again, where nothing may move, and its own recomputation goes by that."""
    return kept(lambda t: kept(model, t), x)  # type: ignore[no-any-return]


def layer_by_layer(model: nn.Module, x: Tensor) -> Tensor:
    for layer in model:  # type: ignore[attr-defined]
        x = kept(layer, x)
    return x


def to_the_end(model: nn.Module, x: Tensor) -> Tensor:
    with set_checkpoint_early_stop(False):
        return kept(model, x)  # type: ignore[no-any-return]


def offloaded(model: nn.Module, x: Tensor) -> Tensor:
    with save_on_cpu():
        return kept(model, x)  # type: ignore[no-any-return]


CALLS = [by_mode, within_another, layer_by_layer, to_the_end, offloaded]


@pytest.mark.parametrize("state", ["later", "the warm-up ends", "the warm-up ends in a cut"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_however_the_checkpoint_is_made(call: Callable[..., Tensor], state: str) -> None:
    assert_as_without(call, state, batches=2)


@pytest.mark.parametrize("state", STATES)
def test_compiled(state: str) -> None:
    """What the operator gives is kept in the graph: by then the statistics have moved."""
    assert_as_without(lambda m, x: torch.compile(lambda t: kept(m, t), backend="aot_eager")(x), state)


def test_backward_twice() -> None:
    model = network("the warm-up ends in a cut")
    x = normal((8, C), seed=1).requires_grad_()
    y = kept(model, x).pow(2).sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nothing_is_noted_of_other_batch_norms_or_later() -> None:
    model = nn.Sequential(bn_ext.FusedBatchNorm1d(C), bn_ext.FusedBatchRenorm1d(C))
    forward, again = bn_ext.keep_statistics()
    model(normal((8, C)))
    with forward:
        model(normal((8, C)))
    model(normal((8, C)))
    assert [len(noted) for noted in forward.noted.values()] == [1]  # type: ignore[attr-defined]
    before = [b.clone() for b in model.buffers()]
    with again:  # twice as many calls as forward made: the second finds nothing, and moves nothing
        model(normal((8, C)))
        model(normal((8, C)))
    assert all(torch.equal(b, old) for b, old in zip(model.buffers(), before, strict=True))


def test_in_evaluation_nothing_is_noted() -> None:
    model = network("later").eval()
    forward, _ = bn_ext.keep_statistics()
    with forward:
        model(normal((8, C)))
    assert not forward.noted  # type: ignore[attr-defined]


def test_an_error_leaves_the_flag_as_it_was() -> None:
    norm = bn_ext.FusedBatchRenorm1d(C)
    forward, again = bn_ext.keep_statistics()
    with forward:
        norm(normal((8, C)))
    with again:
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            norm(normal((1, C)))
        norm(normal((8, C)))
    assert norm.num_batches_tracked == 1
    norm(normal((8, C)))
    assert norm.num_batches_tracked == 2


def test_a_selective_checkpoint() -> None:
    def contexts() -> Any:
        selective = create_selective_checkpoint_contexts([torch.ops.aten.mm.default])
        return tuple(map(Both, bn_ext.keep_statistics(), selective))

    assert_as_without(lambda m, x: kept(m, x, context_fn=contexts), "the warm-up ends")
