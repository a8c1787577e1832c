"""PyTorch's own inputs for BatchNorm1d (its ModuleInfo) run through FusedBatchNorm1d.

The bodies of PyTorch's test_modules.py are not in the wheel; these are the same checks written for one module. The
inputs come from torch.testing._internal, which is private and needs expecttest: without either the file is skipped.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import bn_ext
from support import no_cuda_reason

pytest.importorskip("expecttest")
common = pytest.importorskip("torch.testing._internal.common_modules")
for _name in ("ModuleInfo", "module_inputs_torch_nn_BatchNorm1d", "module_error_inputs_torch_nn_BatchNorm1d_2d_3d"):
    if not hasattr(common, _name):
        pytest.skip(f"this torch has no {_name}", allow_module_level=True)

FUSED = bn_ext.FusedBatchNorm1d
INFO = common.ModuleInfo(
    FUSED, train_and_eval_differ=True, module_inputs_func=common.module_inputs_torch_nn_BatchNorm1d
)
COUNT = len(INFO.module_inputs_func(INFO, "cpu", torch.float32, False, True))
DTYPES = [torch.float32, torch.float64]


def sample(index: int, device: str, dtype: torch.dtype, training: bool, requires_grad: bool = False) -> Any:
    torch.manual_seed(index)
    return INFO.module_inputs_func(INFO, device, dtype, requires_grad, training)[index]


def build(cls: type[nn.BatchNorm1d], given: Any, device: str, dtype: torch.dtype, training: bool) -> nn.BatchNorm1d:
    module = cls(*given.constructor_input.args, **given.constructor_input.kwargs).to(device, dtype)
    with torch.no_grad():
        for k, tensor in enumerate(module.parameters()):
            tensor.copy_(torch.linspace(0.5, 1.5 + k, tensor.numel()))
    return module.train(training)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


@pytest.fixture(params=range(COUNT), ids=lambda k: sample(k, "cpu", torch.float32, True).desc or str(k))
def index(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def test_the_inputs_are_the_ones_expected() -> None:
    described = {sample(k, "cpu", torch.float32, True).desc for k in range(COUNT)}
    assert {
        "affine",
        "3d_input",
        "affine_simple_average",
        "not_affine",
        "not_tracking_stats",
        "zero_batch",
    } <= described


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(device: str, index: int, dtype: torch.dtype, training: bool) -> None:
    given = sample(index, device, dtype, training)
    x = given.forward_input.args[0]
    ours, native = (build(cls, given, device, dtype, training) for cls in (FUSED, nn.BatchNorm1d))
    for _ in range(2):
        torch.testing.assert_close(ours(x), native(x))
        for mine, theirs in zip(ours.buffers(), native.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_factory_arguments(device: str, index: int) -> None:
    for dtype in DTYPES:
        given = sample(index, device, dtype, True)
        arguments = given.constructor_input
        module = FUSED(*arguments.args, **arguments.kwargs, device=device, dtype=dtype)
        for tensor in (*module.parameters(), *module.buffers()):
            assert tensor.device == torch.device(device)
            assert tensor.dtype in (dtype, torch.long)
        module(given.forward_input.args[0])


def test_multiple_device_transfer(index: int, training: bool) -> None:
    if no_cuda_reason():
        pytest.skip(no_cuda_reason())
    given = sample(index, "cpu", torch.float64, training)
    x = given.forward_input.args[0]
    ours = build(FUSED, given, "cpu", torch.float64, training)
    expected = copy.deepcopy(ours)(x)
    for device in ("cuda:0", "cpu"):
        torch.testing.assert_close(copy.deepcopy(ours).to(device)(x.to(device)).cpu(), expected)


def test_repr(index: int) -> None:
    given = sample(index, "cpu", torch.float32, True)
    arguments = given.constructor_input
    ours, native = (cls(*arguments.args, **arguments.kwargs) for cls in (FUSED, nn.BatchNorm1d))
    assert repr(ours) == "Fused" + repr(native) and str(ours)


def test_pickle_and_state_dict(device: str, index: int, training: bool) -> None:
    given = sample(index, device, torch.float32, training)
    x = given.forward_input.args[0]
    module = build(FUSED, given, device, torch.float32, training)
    module(x)
    clone = pickle.loads(pickle.dumps(module))
    loaded = build(FUSED, given, device, torch.float32, training)
    loaded.load_state_dict(module.state_dict())
    expected = module(x)
    assert torch.equal(clone(x), expected) and torch.equal(loaded(x), expected)


def test_train_and_eval_differ_as_declared(index: int) -> None:
    given = sample(index, "cpu", torch.float64, True)
    x = given.forward_input.args[0]
    module = build(FUSED, given, "cpu", torch.float64, True)
    if x.numel():
        same = torch.allclose(module(x), copy.deepcopy(module).eval()(x))
        assert same == (not module.track_running_stats)


def test_not_contiguous(device: str, index: int, training: bool) -> None:
    given = sample(index, device, torch.float64, training)
    x = given.forward_input.args[0]
    results = []
    for strided in (False, True):
        module = build(FUSED, given, device, torch.float64, training)
        leaf_x = leaf(x)
        value = leaf_x.repeat_interleave(2, dim=-1)[..., ::2] if strided else leaf_x
        assert not strided or not value.is_contiguous() or value.numel() == 0
        out = module(value)
        grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=device).view(out.shape)
        grad = grad.repeat_interleave(2, dim=-1)[..., ::2] if strided else grad
        out.backward(grad)
        results.append((out, leaf_x.grad, *(p.grad for p in module.parameters())))
    for plain, other in zip(*results, strict=True):
        torch.testing.assert_close(plain, other)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck], ids=["grad", "gradgrad"])
def test_finite_differences(device: str, index: int, training: bool, check: Any) -> None:
    given = sample(index, device, torch.float64, training, requires_grad=True)
    module = build(FUSED, given, device, torch.float64, training)
    params = dict(module.named_parameters())
    buffers = {k: v.clone() for k, v in module.named_buffers()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        fresh = {k: v.clone() for k, v in buffers.items()}
        return torch.func.functional_call(module, (dict(zip(params, values, strict=True)), fresh), (x,))

    x = given.forward_input.args[0]
    if x.numel() == 0 and check is gradgradcheck:
        pytest.skip("gradgradcheck has nothing to perturb in an empty batch")
    assert check(run, (x, *(leaf(p) for p in params.values())))


def test_error_inputs(device: str, training: bool) -> None:
    # The generator compares the class with ==, so a subclass would be given 5-D inputs: hand it the parent.
    with mock.patch.object(INFO, "module_cls", nn.BatchNorm1d):
        cases = common.module_error_inputs_torch_nn_BatchNorm1d_2d_3d(INFO, device, torch.float32, False, training)
    for case in cases:
        given = case.module_error_input
        module = FUSED(*given.constructor_input.args, **given.constructor_input.kwargs).to(device)
        assert given.forward_input.args[0].dim() == 2
        with pytest.raises(case.error_type, match=case.error_regex):
            module(*given.forward_input.args)
