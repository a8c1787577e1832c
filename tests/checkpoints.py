"""What the tests of keep_statistics share: a checkpoint, next to the same forward without one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bn_ext
from freezing import equal, state_of


def kept(run: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """A checkpoint that keeps statistics where it runs `run` again."""
    options = {"context_fn": bn_ext.keep_statistics, **options}
    return checkpoint(run, *inputs, use_reentrant=False, **options)


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]  # type: ignore[list-item]


def moved_once(
    model: nn.Module,
    x: Tensor,
    run: Callable[[nn.Module, Tensor], Any] = lambda model, x: model(x),
    around: Callable[..., Any] = kept,
) -> int:
    """Hold a step through a checkpoint to one without, to the bit. How often the model ran in the checkpoint.

    Statistics are the plain step's after forward already, and the same after backward.
    """
    model.zero_grad()
    plain, runs = copy.deepcopy(model), 0
    xs = [x.detach().clone().requires_grad_() for _ in range(2)]
    expected = run(plain, xs[0])
    expected.square().sum().backward()

    def counted(x: Tensor) -> Any:
        nonlocal runs
        runs += 1
        return run(model, x)

    output = around(counted, xs[1])
    assert output.equal(expected) and equal(state_of(model), state_of(plain)), "after forward"
    output.square().sum().backward()
    assert equal(state_of(model), state_of(plain)), "after backward"
    for mine, theirs in zip(gradients(model, xs[1]), gradients(plain, xs[0]), strict=True):
        assert mine.equal(theirs)
    return runs


class Both:
    """Two contexts as one, as often as it is entered."""

    def __init__(self, *contexts: Any) -> None:
        self.contexts = contexts

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)
