"""What people do to models with torch's other tools: torch.fx, fusion, quantisation, averaging, pruning, sharing."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bn_ext
from support import OpLog, error_of, module_for, normal, pair

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),  # torch's own parts
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per"),
]
FUSED = bn_ext.FusedBatchNorm1d
F64 = torch.float64
CLASSES = (FUSED, nn.BatchNorm1d)


def network(cls: type[nn.BatchNorm1d], device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), module_for(cls, 5), nn.ReLU(), nn.Sequential(module_for(cls, 5), nn.Linear(5, 3))]
    return nn.Sequential(*layers).to(device, dtype)


# ---- torch.fx ----


def targets(graph: torch.fx.GraphModule) -> list[tuple[str, Any]]:
    return [(node.op, node.target) for node in graph.graph.nodes]


@pytest.mark.parametrize("how", ["built", "converted", "copied", "lazy", "subclass"])
def test_fx_keeps_the_module_whole(device: str, how: str) -> None:
    """A leaf of the graph, as nn.BatchNorm1d is, so that graph rewriters find a module and not its inside."""

    class Doubled(FUSED):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = network(FUSED, device)
    if how == "converted":
        model = bn_ext.convert(network(nn.BatchNorm1d, device))
    elif how == "copied":
        model = copy.deepcopy(model)
    elif how == "lazy":
        model[1] = bn_ext.LazyFusedBatchNorm1d(device=device)
        model(normal((9, 6), device=device))
    elif how == "subclass":
        model[1] = module_for(Doubled, 5, device)
    graph = torch.fx.symbolic_trace(model)
    assert targets(graph) == targets(torch.fx.symbolic_trace(network(nn.BatchNorm1d, device)))
    assert graph.get_submodule("1") is model[1]
    x = normal((7, 6), device=device)
    for training in (True, False):
        assert torch.equal(graph.train(training)(x), copy.deepcopy(model).train(training)(x))
    assert targets(torch.fx.symbolic_trace(graph)) == targets(graph)


def test_fx_leaves_hooks_to_the_run(device: str) -> None:
    model = network(FUSED, device)
    calls: list[type] = []
    model[1].register_forward_hook(lambda module, args, output: (calls.append(type(output)), output * 2)[1])
    graph = torch.fx.symbolic_trace(model)
    assert calls == []
    graph(normal((7, 6), device=device))
    assert calls == [Tensor]


def test_fx_of_the_module_itself_and_of_the_function() -> None:
    ours, native = (error_of(lambda m=m: torch.fx.symbolic_trace(m)) for m in pair(4))
    assert ours == native and ours is not None
    graph = torch.fx.symbolic_trace(lambda x: bn_ext.functional.batch_norm(x, None, None, training=True))
    assert ("call_function", bn_ext.functional.batch_norm) in targets(graph)
    x = normal((6, 4))
    assert torch.equal(graph(x), bn_ext.functional.batch_norm(x, None, None, training=True))


def test_the_mark_for_fx_stays_inside() -> None:
    """Where the class lives, and what is saved and shown of a module, is as it was."""
    module = FUSED(4)
    assert FUSED.__module__ == type(module).__module__ == "bn_ext.modules"
    assert "__module__" not in vars(bn_ext.revert(bn_ext.convert(nn.BatchNorm1d(4))))
    assert list(module.state_dict()) == list(nn.BatchNorm1d(4).state_dict())


# ---- fusion and quantisation ----


def test_fusion_into_a_convolution(device: str) -> None:
    """fuse_conv_bn_eval, next to the two modules one after the other. (fuse_linear_bn_eval: test_modules.py)"""
    conv = nn.Conv1d(3, 4, 3, device=device, dtype=F64).eval()
    norm = module_for(FUSED, 4, device, dtype=F64).eval()
    x = normal((2, 3, 9), F64, device)
    torch.testing.assert_close(nn.utils.fusion.fuse_conv_bn_eval(conv, norm)(x), norm(conv(x)))


def test_fx_fusion_takes_the_reverted_model() -> None:
    """The rewriter goes by exact types: ours stays in the graph, and right; torch's own is folded."""
    from torch.fx.experimental.optimization import fuse

    model = nn.Sequential(nn.Conv1d(3, 5, 3), module_for(FUSED, 5), nn.ReLU()).eval().double()
    x = normal((2, 3, 9), F64)
    expected = model(x)
    kept = fuse(model)
    assert any(type(m) is FUSED for m in kept.modules())
    folded = fuse(bn_ext.revert(copy.deepcopy(model)))
    assert not any(isinstance(m, nn.BatchNorm1d) for m in folded.modules())
    for fused in (kept, folded):
        torch.testing.assert_close(fused(x), expected)


def quantised_close(quantised: Tensor, exact: Tensor) -> None:
    """8 bits over the range of every layer: a few hundredths of the output's range, and not another network's."""
    quantised, exact = quantised.detach(), exact.detach()
    assert float((quantised - exact).abs().max()) <= 0.05 * float(exact.max() - exact.min())


needs_quantised_kernels = pytest.mark.skipif(
    not torch.backends.quantized.supported_engines or torch.backends.quantized.engine == "none",
    reason="this torch has no quantised kernels",
)


@needs_quantised_kernels
def test_quantisation_by_fx_leaves_batch_norm_in_float() -> None:
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = normal((64, 6))
    model = network(FUSED).eval()
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(torch.backends.quantized.engine), (x,))
    prepared(x)
    converted = convert_fx(prepared)
    assert type(converted.get_submodule("1")) is FUSED
    with OpLog() as log:
        quantised_close(converted(x), model(x))
    assert set(log.names) == {"bn_ext::batch_norm_forward"}


@needs_quantised_kernels
def test_dynamic_quantisation() -> None:
    model = network(FUSED).eval()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    x = normal((64, 6))
    assert type(quantised[1]) is FUSED
    quantised_close(quantised(x), model(x))


def test_fuse_modules_takes_the_reverted_model_or_a_mapping() -> None:
    """Like any class that it does not know, ours is refused; both ways round it give the fused layer."""
    from torch.ao.quantization import fuse_modules, fuser_method_mappings

    pairs = [["0", "1"]]
    model = network(FUSED).double().eval()
    with pytest.raises(AssertionError, match=r"did not find fuser method for.*FusedBatchNorm1d"):
        fuse_modules(model, pairs)
    mapping = {(nn.Linear, FUSED): fuser_method_mappings.fuse_linear_bn}
    mapped = fuse_modules(model, pairs, fuse_custom_config_dict={"additional_fuser_method_mapping": mapping})
    reverted = fuse_modules(bn_ext.revert(copy.deepcopy(model)), pairs)
    x = normal((9, 6), F64)
    for fused in (mapped, reverted):
        assert type(fused[1]) is nn.Identity
        torch.testing.assert_close(fused(x), model(x))


# ---- averaging, pruning, construction, profiling ----


@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_models(device: str, buffers: bool) -> None:
    """Exponential averages of weights, and of buffers where asked for. (update_bn: test_modules.py)"""
    results = []
    for cls in CLASSES:
        model = network(cls, device, F64)
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            model(normal((8, 6), F64, device, seed=seed)).square().mean().backward()
            optimizer.step()
            averaged.update_parameters(model)
        results.append(dict(averaged.state_dict()) | {"out": averaged.eval()(normal((8, 6), F64, device))})
    torch.testing.assert_close(*results)


def test_pruning(device: str) -> None:
    results = []
    for module in pair(6, device, dtype=F64):
        prune.l1_unstructured(module, "weight", amount=2)
        x = normal((7, 6), F64, device).requires_grad_()
        out = module(x)
        out.square().sum().backward()
        assert int((module.weight == 0).sum()) == 2
        prune.remove(module, "weight")
        results.append((out, x.grad, module(x.detach())))
    torch.testing.assert_close(*results)


def test_parametrizations_can_be_removed(device: str) -> None:
    module = module_for(FUSED, 4, device, dtype=F64).eval()
    x = normal((7, 4), F64, device)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Softplus())
    expected = module(x)
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert type(module) is FUSED and torch.equal(module(x), expected)


def test_skip_init_and_vectors(device: str) -> None:
    module = nn.utils.skip_init(FUSED, 4, device=device, dtype=F64)
    module.reset_parameters()
    vector = nn.utils.parameters_to_vector(module.parameters())
    nn.utils.vector_to_parameters(vector + 1, module.parameters())
    assert torch.equal(module.weight, torch.full_like(module.weight, 2)) and bool((module.bias == 1).all())
    assert bool(module(normal((6, 4), F64, device)).isfinite().all())


def test_data_parallel_on_one_device(device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("DataParallel takes the GPUs that are there")
    model = network(FUSED, device)
    x = normal((8, 6), device=device)
    assert torch.equal(nn.DataParallel(model.eval(), device_ids=[0])(x), model(x))


def test_profiler_names_the_operators(device: str) -> None:
    module = module_for(FUSED, 4, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        module(normal((6, 4), device=device).requires_grad_()).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"bn_ext::batch_norm", "bn_ext::batch_norm_forward", "bn_ext::batch_norm_backward"} <= names


# ---- one model, many threads and processes ----


def _train_shared(model: nn.Module, seed: int) -> None:
    torch.set_num_threads(1)
    model(normal((6, 4), seed=seed))


def test_statistics_in_shared_memory() -> None:
    """share_memory() and a second process: it writes where the first one reads."""
    model = module_for(FUSED, 4).share_memory()
    right = copy.deepcopy(model)
    process = mp.get_context("spawn").Process(target=_train_shared, args=(model, 3))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    right(normal((6, 4), seed=3))
    for mine, theirs in zip(model.buffers(), right.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_evaluation_in_many_threads(device: str) -> None:
    """One model that serves several threads, each with a grad mode of its own."""
    model = network(FUSED, device).eval()
    batches = [normal((5 + k, 6), device=device, seed=k) for k in range(6)]
    expected = [model(x).detach() for x in batches]
    found: dict[int, Tensor] = {}

    def serve(k: int) -> None:
        with torch.set_grad_enabled(k % 2 == 0):
            for _ in range(20):
                found[k] = model(batches[k])

    threads = [threading.Thread(target=serve, args=(k,)) for k in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k, right in enumerate(expected):
        assert torch.equal(found[k], right) and found[k].requires_grad == (k % 2 == 0)
