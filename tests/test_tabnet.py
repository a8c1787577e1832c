"""pytorch-tabnet's ghost batch norm, whose loop over chunks convert computes in one call."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import bn_ext
from support import OpLog, normal

network = pytest.importorskip(
    "pytorch_tabnet.tab_network", reason="pytorch_tabnet of requirements/third-party*.txt is not installed"
)
C = 6


def gbn(size: int = 8) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = network.GBN(C, size).double()
    return module


def calls(module: nn.Module, x: Tensor) -> int:
    with OpLog() as log:
        copy.deepcopy(module)(x)
    return sum(name.startswith("bn_ext::batch_norm_forward") for name in log.names)


def step(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    g = normal(tuple(y.shape), torch.float64, seed=9)
    return [y.detach(), *torch.autograd.grad(y, (x, *module.parameters()), g), *(b.clone() for b in module.buffers())]


def assert_same_steps(ours: nn.Module, loop: nn.Module, x: Tensor) -> None:
    for _ in range(2):
        for a, b in zip(step(ours, x), step(loop, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)  # float64, two orders of summation


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("n", [24, 23, 8, 5])
def test_the_loop_is_one_call_with_its_values(n: int, fuse: bool) -> None:
    loop = gbn()
    ours = bn_ext.convert(copy.deepcopy(loop), fuse=fuse)
    x = normal((n, C), torch.float64)
    assert_same_steps(ours, loop, x)
    assert calls(ours, x) == 1
    assert isinstance(ours, network.GBN) and type(ours).__name__ == "GBN"
    assert_same_steps(ours.eval(), loop.eval(), x)


def test_a_last_chunk_of_one_row_joins_the_one_before_it() -> None:
    x = normal((9, C), torch.float64)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        gbn(2)(x)
    ours = bn_ext.convert(gbn(2))
    assert ours(x).isfinite().all() and ours.bn.num_batches_tracked == 4


def test_whoever_hooks_the_batch_norm_sees_every_chunk() -> None:
    ours, seen = bn_ext.convert(gbn()), []
    ours.bn.register_forward_hook(lambda *call: seen.append(call[1][0].shape[0]))
    ours(normal((24, C), torch.float64))
    assert seen == [8, 8, 8]


@pytest.mark.parametrize("watch", ["hook", "func", "global hook"])
def test_a_last_chunk_of_one_row_joins_for_whoever_watches_too(watch: str) -> None:
    x = normal((9, C), torch.float64)
    ours, plain = bn_ext.convert(gbn(2)), bn_ext.convert(gbn(2))
    expected = plain(x)
    if watch == "func":
        found, handle = torch.func.vjp(ours, x)[0], None
    else:
        seen = []
        register = ours.bn.register_forward_hook if watch == "hook" else nn.modules.module.register_module_forward_hook
        handle = register(lambda module, args, output: seen.append(args[0].shape[0]) if module is ours.bn else None)
        try:
            found = ours(x)
        finally:
            handle.remove()
        assert seen == [2, 2, 2, 3]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(list(ours.buffers()), list(plain.buffers()))


def test_a_forward_that_only_looks_alike_keeps_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        chunks = x.chunk(int(np.ceil(x.shape[0] / self.virtual_batch_size)), 0)
        res = [self.bn(2 * x_) for x_ in chunks]
        return torch.cat(res, dim=0)

    np = pytest.importorskip("numpy")
    monkeypatch.setattr(network.GBN, "forward", forward)
    assert type(bn_ext.convert(gbn())) is network.GBN


def test_what_is_changed_later_counts() -> None:
    x = normal((24, C), torch.float64)
    ours, loop = bn_ext.convert(gbn()), gbn()
    ours.virtual_batch_size = loop.virtual_batch_size = 12
    assert_same_steps(ours, loop, x)
    assert calls(ours, x) == 1
    ours.virtual_batch_size = loop.virtual_batch_size = 11.5  # np.ceil takes it
    assert_same_steps(ours, loop, x)
    ours.bn = nn.Identity()
    assert torch.equal(ours(x), x)


def test_a_forward_that_is_replaced_later_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = bn_ext.convert(gbn())
    monkeypatch.setattr(network.GBN, "forward", lambda self, x: x + 1)
    x = normal((24, C), torch.float64)
    assert torch.equal(ours(x), x + 1)
    assert type(bn_ext.convert(gbn())) is network.GBN  # which is not what is known of it


def test_another_class_of_that_name_is_left_alone() -> None:
    class GBN(network.GBN):  # type: ignore[misc, name-defined]
        pass

    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.virtual_batch_size, self.bn = 8, nn.BatchNorm1d(C)

    Other.__name__ = Other.__qualname__ = "GBN"
    for module in (GBN(C, 8), Other()):
        assert type(bn_ext.convert(module)) in (GBN, Other)
        assert type(module.bn) is bn_ext.FusedBatchNorm1d


def test_it_can_be_copied_pickled_converted_again_and_reverted() -> None:
    x, loop = normal((24, C), torch.float64), gbn()
    ours = bn_ext.convert(copy.deepcopy(loop))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), bn_ext.convert(ours, fuse=True)):
        assert calls(other, x) == 1
        assert_same_steps(copy.deepcopy(other), copy.deepcopy(loop), x)
    assert [entry.converted for entry in bn_ext.fusion_report(ours)] == [True]
    assert set(ours.state_dict()) == set(loop.state_dict())
    back = bn_ext.revert(ours)
    assert type(back) is network.GBN and type(back.bn) is nn.BatchNorm1d
    assert_same_steps(back, loop, x)


def test_compiled() -> None:
    x = normal((24, C), torch.float64)
    ours, eager = (bn_ext.convert(gbn()) for _ in range(2))
    compiled = torch.compile(ours)
    torch.testing.assert_close(compiled(x), eager(x))
    torch.testing.assert_close(ours.bn.running_mean, eager.bn.running_mean)


@pytest.mark.parametrize("size", [4, 128])
def test_a_whole_network(size: int) -> None:
    torch.manual_seed(0)
    loop = network.TabNetNoEmbeddings(
        C, 2, n_d=3, n_a=4, n_steps=2, virtual_batch_size=size, group_attention_matrix=torch.eye(C)
    )
    ours, x = bn_ext.convert(copy.deepcopy(loop)), normal((23, C))
    norms = sum(isinstance(m, network.GBN) for m in ours.modules())
    # initial_bn is no ghost; shared layers are called with batch norms of their own
    assert norms > 4
    with OpLog() as log:
        found = ours(x)[0]
    assert sum(name.startswith("bn_ext::batch_norm_forward") for name in log.names) <= norms + 1
    torch.testing.assert_close(found, loop(x)[0], rtol=1e-3, atol=1e-4)
