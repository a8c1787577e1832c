"""Run as a program: prints, as JSON, a digest of every result of a fixed list of cases. Used by test_determinism.py.

    python digest_worker.py [thread count ...]

Without thread counts the cases run once with the count that the process was started with.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch

import bn_ext
from support import LAYOUTS, module_for, name_of, normal, step

# Enough work for several threads in every direction of the split: rows, channels, length, and a ragged rest of each.
CASES = (
    ((64, 8), "contiguous", torch.float32),
    ((4096, 64), "contiguous", torch.float32),
    ((70_011, 3), "contiguous", torch.float32),
    ((200_007, 1), "contiguous", torch.float32),
    ((3, 40_009), "contiguous", torch.float32),
    ((3, 5, 20_001), "contiguous", torch.float32),
    ((1, 1, 300_001), "contiguous", torch.float32),
    ((130, 70, 33), "contiguous", torch.float32),
    ((130, 70, 33), "permuted", torch.float32),
    ((2, 2, 70_001), "permuted", torch.float32),
    ((4099, 65), "permuted", torch.float32),
    ((4099, 65), "sliced_channels", torch.float32),
    ((70, 65, 33), "strided_last", torch.float32),
    ((513, 129), "expanded_batch", torch.float32),
    ((5003, 33), "contiguous", torch.float64),
    ((5003, 33), "contiguous", torch.bfloat16),
    ((31, 17, 301), "permuted", torch.bfloat16),
    ((5003, 33), "contiguous", torch.float16),
    ((9, 7, 2001), "contiguous", torch.float16),
)


def second_derivatives(module: torch.nn.BatchNorm1d, x: torch.Tensor, g: torch.Tensor) -> dict[str, torch.Tensor]:
    """Derivatives of the gradients' squares by the gradient of the output, the input and the weight."""
    x, g = x.detach().requires_grad_(), g.detach().requires_grad_()
    parameters = module.weight, module.bias
    first = torch.autograd.grad(module(x), (x, *parameters), g, create_graph=True)
    found = torch.autograd.grad(first, (g, x, module.weight), [f.detach() for f in first])
    return dict(zip(("grad_grad_output", "second_grad_input", "second_grad_weight"), found, strict=True))


def digests(device: str = "cpu") -> dict[str, str]:
    """case -> digest over output, gradients and buffers, in training and in eval mode."""
    found = {}
    for shape, layout, dtype in CASES:
        x = LAYOUTS[layout](normal(shape, dtype, device, mean=3.0))
        g = normal(shape, dtype, device, seed=1)
        stored = torch.float64 if dtype == torch.float64 else torch.float32
        module = module_for(bn_ext.FusedBatchNorm1d, shape[1], device, dtype=stored)
        for training in (True, False):
            result = vars(step(module.train(training), x, g)) | second_derivatives(module, x, g)
            for key, value in result.items():
                raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                case = f"{shape} {layout} {name_of(dtype)} {'train' if training else 'eval'} {key}"
                found[case] = hashlib.sha256(raw).hexdigest()[:16]
    return found


def openmp_libraries() -> list[str]:
    """OpenMP runtimes mapped into this process; empty where the system does not tell."""
    try:
        with open("/proc/self/maps") as maps:
            paths = {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}
    except OSError:
        return []
    return sorted(p for p in paths if any(name in p.rsplit("/", 1)[-1] for name in ("libgomp", "libomp", "libiomp")))


def main() -> None:
    started_with = torch.get_num_threads()
    found = {}
    for threads in [int(a) for a in sys.argv[1:]] or [started_with]:
        torch.set_num_threads(threads)
        found[str(threads)] = digests()
    report = {
        "threads": started_with,
        "torch_level": torch.backends.cpu.get_cpu_capability().lower(),
        "level": bn_ext._C.isa_level(),
        "openmp": openmp_libraries(),
        "digests": found,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
