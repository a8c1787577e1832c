"""Several processes: DistributedDataParallel, FSDP2, SyncBatchNorm and DTensor, next to nn.BatchNorm1d in one group.

Two processes with the gloo backend run all scenarios of a device once, and each test looks at one of them.
"""

from __future__ import annotations

import functools
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import bn_ext
import fusion_models
from support import OpLog, module_for, normal

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

F64 = torch.float64
WORLD = 2
KINDS: tuple[type[nn.BatchNorm1d], ...] = (bn_ext.FusedBatchNorm1d, nn.BatchNorm1d)


def network(cls: type[nn.BatchNorm1d], device: str) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), module_for(cls, 5), nn.ReLU(), module_for(cls, 5, affine=False), nn.Linear(5, 3)]
    return nn.Sequential(*layers).to(device, F64)


def batch(device: str, seed: int) -> Tensor:
    """Another batch on every rank."""
    return normal((8, 6), F64, device, seed=WORLD * seed + dist.get_rank())


def train(model: nn.Module, device: str) -> dict[str, Tensor]:
    """Three steps of SGD; everything that the model then holds, and the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        optimizer.zero_grad()
        loss = model(batch(device, seed)).square().mean()
        loss.backward()
        optimizer.step()
    state = {k: getattr(v, "full_tensor", v.clone)() for k, v in model.state_dict().items()}
    return {"loss": loss.detach()} | state


def both(prepare: Callable[[nn.Sequential], nn.Module], device: str) -> list[dict[str, Tensor]]:
    return [train(prepare(network(cls, device)), device) for cls in KINDS]


def data_parallel(device: str) -> Any:
    """Buffers of rank 0 are sent to all before every forward: the operators write where they are."""
    return both(nn.parallel.DistributedDataParallel, device)


def data_parallel_own_buffers(device: str) -> Any:
    wrap = functools.partial(nn.parallel.DistributedDataParallel, broadcast_buffers=False, static_graph=True)
    return both(wrap, device)


def data_parallel_compiled(device: str) -> Any:
    def wrap(model: nn.Sequential) -> nn.Module:
        return torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")

    found = [train(wrap(network(KINDS[0], device)), device), train(network_parallel(device), device)]
    return [{k.removeprefix("_orig_mod."): v for k, v in one.items()} for one in found]


def network_parallel(device: str) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network(KINDS[0], device))


def fully_sharded(device: str) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(torch.device(device).type, (WORLD,))

    def wrap(model: nn.Sequential) -> nn.Module:
        for layer in (model[1], model[4]):
            fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    with OpLog() as log:
        found = both(wrap, device)
    return found, log.names


def fully_sharded_mixed(device: str) -> Any:
    """bfloat16 parameters and inputs beside float32 statistics, which native refuses on a CPU: next to its float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(torch.device(device).type, (WORLD,))
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = []
    for cls, policy in zip(KINDS, (mixed, MixedPrecisionPolicy()), strict=True):
        model = fully_shard(network(cls, device).float(), mesh=mesh, mp_policy=policy)
        out = model(batch(device, 0).float())
        out.float().square().mean().backward()
        results = {"output": out.detach().float()} | {n: p.grad.full_tensor() for n, p in model.named_parameters()}
        found.append(results | {"statistics": model[1].running_var})
    return found


def synchronised(device: str) -> Any:
    """SyncBatchNorm replaces ours as it replaces torch's own; in evaluation it runs on every device."""
    found = []
    for cls in KINDS:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(network(cls, device))
        assert [type(layer) for layer in model[1:4:2]] == [nn.SyncBatchNorm] * 2
        found.append({"output": model.eval()(batch(device, 0)).detach()})
    return found


def distributed_tensors(device: str) -> Any:
    """A DTensor input has no kernel of ours: torch's own batch norm replicates it, eager and compiled."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    mesh = dist.init_device_mesh(torch.device(device).type, (WORLD,))
    x = normal((8, 5), F64, device)
    try:
        distribute_module(nn.BatchNorm1d(5, dtype=F64), mesh)(distribute_tensor(x, mesh, [Shard(0)]))
    except NotImplementedError as refusal:
        return refusal.args[0]
    try:
        module = distribute_module(nn.BatchNorm1d(5, dtype=F64), mesh)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        compiled(distribute_tensor(x, mesh, [Shard(0)])).square().sum().backward()
    except Exception as failure:  # torch 2.14 and 2.15 cannot
        return f"compiled, {type(failure).__name__}: {str(failure)[:200]}"
    torch.compiler.reset()
    found = []
    for cls in KINDS:
        for compiled in (False, True):
            module = distribute_module(module_for(cls, 5, device, dtype=F64), mesh)
            run = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
            out = run(distribute_tensor(x, mesh, [Shard(0)]))
            out.square().sum().backward()
            tensors = {"output": out, "weight": module.weight.grad, "running_var": module.running_var}
            found.append({k: v.full_tensor().detach() for k, v in tensors.items()})
    return found


def fused(device: str) -> Any:
    """Fused models under what wraps, shards and replicates modules; reverted too, once a tool has changed classes.

    Of each way and form: what training leaves, whether the fused operators ran, and what the classes are at the end.
    """
    from torch.distributed._composable.replicate import replicate
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(torch.device(device).type, (WORLD,))

    def shard(model: nn.Sequential) -> nn.Module:
        for block in model[1:3]:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def shard_norms(model: nn.Sequential) -> nn.Module:
        fully_shard(model[1].bn1, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    ways = {"shard": shard, "shard_norms": shard_norms, "data_parallel": nn.parallel.DistributedDataParallel}
    ways["replicate"] = replicate
    found: dict[str, Any] = {}
    for name, wrap in ways.items():
        for form in ("native", "fused", "reverted", "late"):
            torch.manual_seed(0)
            blocks = (fusion_models.residuals.TorchvisionDown(), fusion_models.residuals.Kuangliu())
            model = nn.Sequential(nn.Linear(6, 4), *blocks, nn.BatchNorm1d(4), nn.SiLU()).to(device, F64)
            if form in ("fused", "reverted"):
                bn_ext.convert(model, fuse=True)
            wrapped = wrap(model)
            if form == "reverted":
                bn_ext.revert(model)
            elif form == "late":
                bn_ext.convert(model, fuse=True)
            with OpLog() as log:
                state = train(wrapped, device)
            found[f"{name} {form}"] = (state, log.fused, [type(m).__name__ for m in model.modules()])
    return found


def converted_after_sharding(device: str) -> Any:
    """fully_shard gives a batch norm a class of its own, which convert leaves alone: the report says so, and why."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(torch.device(device).type, (WORLD,))
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    fully_shard(model[1], mesh=mesh)
    bn_ext.convert(model, fuse=True)
    return [(e.name, e.converted, e.reason) for e in bn_ext.fusion_report(model)], type(model[3]).__name__


def frozen(device: str) -> Any:
    """Batch norms frozen before and behind what wraps them: the modes in training, the statistics that moved."""
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(torch.device(device).type, (WORLD,))

    def shard(model: nn.Sequential) -> nn.Module:
        fully_shard(model[1], mesh=mesh)  # a class of its own
        return fully_shard(model, mesh=mesh)

    found = {}
    for cls in KINDS:
        for wrap in (nn.parallel.DistributedDataParallel, shard):
            for late in (False, True):
                model = network(cls, device)
                whole = bn_ext.freeze(wrap(model)) if late else wrap(bn_ext.freeze(model))
                before = {name: buffer.clone() for name, buffer in model.named_buffers()}
                state = train(whole.train(), device)
                moved = [name for name in before if not torch.equal(dict(model.named_buffers())[name], before[name])]
                modes = [model[1].training, model[3].training, bn_ext.unfreeze(whole) is whole, model[1].training]
                found[f"{cls.__name__} {wrap.__name__} {late}"] = (modes, moved, bool(state["loss"].isfinite()))
    return found


def checkpointed(device: str) -> Any:
    """Layers in checkpoints that keep statistics, under what replicates and shards, and without."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh(torch.device(device).type, (WORLD,))

    def blocks(model: nn.Sequential, wrap: bool) -> nn.Sequential:
        parts = [nn.Sequential(*model[:3]), nn.Sequential(*model[3:])]
        return nn.Sequential(*(checkpoint_wrapper(p, context_fn=bn_ext.keep_statistics) if wrap else p for p in parts))

    def shard(model: nn.Sequential) -> nn.Module:
        for block in model:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found = {}
    for cls in KINDS:
        for around in (nn.parallel.DistributedDataParallel, shard):
            states = [train(around(blocks(network(cls, device), wrap)), device) for wrap in (False, True)]
            found[f"{cls.__name__} {around.__name__}"] = states
    return found


# Two processes share the one device there may be, through gloo, which scatters and gathers in a CPU's memory alone.
ANYWHERE = (data_parallel, data_parallel_own_buffers, data_parallel_compiled, synchronised)
ON_CPU = (
    fully_sharded, fully_sharded_mixed, distributed_tensors, fused, converted_after_sharding, frozen, checkpointed,
)  # fmt: skip


def work(rank: int, folder: str, device: str) -> None:
    """What one process does: every scenario, each result or error kept in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    results = {}
    for scenario in ANYWHERE + (ON_CPU if device == "cpu" else ()):
        try:
            results[scenario.__name__] = scenario(device)
        except Exception:
            results[scenario.__name__] = {"failed": traceback.format_exc()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@functools.cache
def results_on(device: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (folder, device), nprocs=WORLD)
        return [torch.load(Path(folder) / f"{rank}.pt", map_location="cpu") for rank in range(WORLD)]


def results_of(scenario: Callable[[str], Any], device: str) -> list[Any]:
    """The scenario's result of each rank."""
    found = [results[scenario.__name__] for results in results_on(device)]
    for rank, result in enumerate(found):
        assert "failed" not in result, f"rank {rank}:\n{result['failed']}"
    return found


@pytest.mark.parametrize("scenario", [data_parallel, data_parallel_own_buffers], ids=lambda f: f.__name__)
def test_data_parallel_training(device: str, scenario: Callable[[str], Any]) -> None:
    ranks = results_of(scenario, device)
    for ours, native in ranks:
        torch.testing.assert_close(ours, native)
    (first, _), (second, _) = ranks
    for name, tensor in first.items():
        if "running" in name:
            assert not torch.equal(tensor, second[name]), f"{name}: the last batch of each rank is its own"
        elif name != "loss":
            assert torch.equal(tensor, second[name]), f"{name} went apart"


def test_data_parallel_compiled(device: str) -> None:
    """Compiled and eager in the same group: our kernels both times, so the same bits."""
    for compiled, eager in results_of(data_parallel_compiled, device):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=0)


def test_fully_sharded_training() -> None:
    for (ours, native), names in results_of(fully_sharded, "cpu"):
        torch.testing.assert_close(ours, native)
        assert [name.split(".")[0] for name in names if name.startswith("bn_ext::")] == 3 * (
            2 * ["bn_ext::batch_norm_forward"] + 2 * ["bn_ext::batch_norm_backward"]
        )


def test_fully_sharded_training_in_bfloat16() -> None:
    for ours, native in results_of(fully_sharded_mixed, "cpu"):
        assert list(ours) == list(native)
        for name, theirs in native.items():
            assert ours[name].dtype == torch.float32
            # Weights, activations and gradients of five layers are each rounded to 8 bits, at the size of the largest.
            bound = 16 * torch.finfo(torch.bfloat16).eps * float(theirs.abs().max())
            if name == "0.bias":  # zero but for rounding: batch norm takes off any bias before it
                bound = 16 * torch.finfo(torch.bfloat16).eps * float(native["0.weight"].abs().max())
            torch.testing.assert_close(ours[name], theirs, rtol=0, atol=bound, msg=lambda m, n=name: f"{n}: {m}")


def test_fused_models_in_groups() -> None:
    for found in results_of(fused, "cpu"):
        for case, (state, passes, classes) in found.items():
            way, form = case.split()
            native = found[f"{way} native"]
            # The bias before a batch norm has no gradient but rounding: sums of eight values of size one.
            torch.testing.assert_close(state, native[0], rtol=1e-9, atol=1e-10)
            # Five a step; three steps. A sharded norm is of another class, and so are blocks once they are sharded.
            fewest = {"native": 0, "fused": 12, "reverted": 0, "late": 0}[form]
            assert fewest <= passes <= (15 if form in ("fused", "late") else 0), (case, passes)
            if form == "reverted" and way != "shard_norms":  # a norm sharded on its own is of a class of torch's
                assert classes == native[2]


def test_a_batch_norm_that_was_sharded_is_reported() -> None:
    for report, other in results_of(converted_after_sharding, "cpu"):
        (first, converted, reason), (second, also, _) = report
        assert (first, converted, second, also, other) == ("1", False, "3", True, "FusedBatchNorm1d")
        assert "sharded" in reason and "convert before" in reason


def test_frozen_batch_norms_in_groups() -> None:
    for found in results_of(frozen, "cpu"):
        assert len(found) == 8
        for case, result in found.items():
            assert result == ([False, False, True, True], [], True), case


def test_checkpoints_in_groups() -> None:
    for found in results_of(checkpointed, "cpu"):
        assert len(found) == 4
        for case, (plain, through) in found.items():
            strip = [{k.replace("_checkpoint_wrapped_module.", ""): v for k, v in s.items()} for s in (plain, through)]
            torch.testing.assert_close(*strip, rtol=0, atol=0, msg=lambda m, c=case: f"{c}: {m}")
            assert sum("num_batches_tracked" in name and int(value) == 3 for name, value in strip[1].items()) == 2


def test_sync_batch_norm_takes_over(device: str) -> None:
    for ours, native in results_of(synchronised, device):
        torch.testing.assert_close(ours, native)


def test_distributed_tensors_go_to_native() -> None:
    for found in results_of(distributed_tensors, "cpu"):
        if isinstance(found, str):
            pytest.skip(f"nn.BatchNorm1d takes no DTensor in this torch: {found}")
        for other in found[:-1]:
            torch.testing.assert_close(other, found[-1])
