"""BatchNormAct1d of padded and ragged batches, where it is no single pass: torch.fx, other modules and activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bn_ext
from support import normal
from test_padding import C, assert_zero_beyond, positions_of, spoilt

ACTS: tuple[Any, ...] = ("relu", "silu", None, nn.Sigmoid(), nn.PReLU())


class Model(nn.Module):
    """A block that is called within a forward, by name or by place."""

    def __init__(self, block: nn.Module, given: str, added: bool) -> None:
        super().__init__()
        self.block, self.given, self.added = block, given, added

    def forward(self, x: Tensor, valid: Tensor, r: Tensor) -> Tensor:
        x = x + 1
        residual = r * 2 if self.added else None
        if self.given == "place":
            return self.block(x, residual, valid)  # type: ignore[no-any-return]
        return self.block(x, residual=residual, **{self.given: valid})  # type: ignore[no-any-return]


def ids(act: Any) -> str:
    return act if isinstance(act, str) else type(act).__name__


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("given", ["lengths", "mask", "place"])
@pytest.mark.parametrize("act", ACTS, ids=ids)
def test_fx_passes_on_what_counts(act: Any, given: str, added: bool, training: bool) -> None:
    shape = (5, C, 7)
    valid, where = positions_of(shape, "any" if given == "mask" else "lengths")
    x, r = (spoilt(normal(shape, seed=k), where) for k in (1, 2))
    (of,) = valid.values()
    model = Model(bn_ext.BatchNormAct1d(C, activation=act), given, added).train(training)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = model(x, of, r)
    moved = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    graph = torch.fx.symbolic_trace(model)
    assert {"block.norm", "block.act"} <= {str(node.target) for node in graph.graph.nodes}
    found = graph(x, of, r)
    torch.testing.assert_close(found, expected)
    assert_zero_beyond(found, where)
    torch.testing.assert_close(graph.state_dict(), moved)


@pytest.mark.parametrize("kind", ["lengths", "any", None])
def test_fx_of_the_block_itself(kind: str | None) -> None:
    shape = (5, C, 7)
    valid, where = positions_of(shape, kind) if kind else ({}, torch.ones(5, 7, dtype=torch.bool))
    x = spoilt(normal(shape), where)
    block = bn_ext.BatchNormAct1d(C, activation=nn.Sigmoid()).eval()
    graph = torch.fx.symbolic_trace(block, concrete_args={"residual": None})
    torch.testing.assert_close(graph(x, None, **valid), block(x, **valid))
    plain = torch.fx.symbolic_trace(bn_ext.revert(block), concrete_args={"residual": None})
    torch.testing.assert_close(plain(x.nan_to_num()), block(x.nan_to_num()))


@pytest.mark.parametrize("norm", [bn_ext.FusedBatchNorm1d, bn_ext.FusedBatchRenorm1d])
def test_fx_keeps_the_norms_whole(norm: Any) -> None:
    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm(C)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.norm(x, lengths=lengths)  # type: ignore[no-any-return]

    valid, where = positions_of((5, C, 7), "lengths")
    x = spoilt(normal((5, C, 7)), where)
    model = Call().eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x, **valid), model(x, **valid))
