"""The things that are timed: each contender at one point, in one mode, as a function of no arguments."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import bn_ext
from grid import RIVALS, SECOND_ORDER_MODES, Point

Step = Callable[[], None]
WITH_BACKWARD = ("backward", "forward_backward", *SECOND_ORDER_MODES)


class Disagreement(Exception):
    """bn_ext and nn.BatchNorm1d computed different things, so that timing them would say nothing."""


def make_module(contender: str, point: Point, device: torch.device) -> nn.Module:
    """A fresh batch norm for ``point``: float64 parameters for float64 tensors, else float32, as under autocast."""
    dtype = torch.float64 if point.torch_dtype == torch.float64 else torch.float32
    kind = bn_ext.FusedBatchNorm1d if contender in ("bn_ext", "compiled") else nn.BatchNorm1d
    return kind(point.shape[1], device=device, dtype=dtype)


def to_onednn(x: Tensor) -> Tensor:
    """A copy of x in oneDNN's own layout, as the image of one column that its batch norm takes."""
    image = x.detach().reshape(*x.shape, *[1] * (4 - x.dim())).to_mkldnn()
    return image.requires_grad_(x.requires_grad)


class OneDNN(nn.Module):
    """A batch norm run by oneDNN, on tensors made by to_onednn."""

    def __init__(self, batch_norm: nn.Module) -> None:
        super().__init__()
        self.batch_norm = batch_norm
        self.weight, self.bias = batch_norm.weight, batch_norm.bias

    def forward(self, x: Tensor) -> Tensor:
        norm = self.batch_norm
        return nn.functional.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training, norm.momentum, norm.eps
        )


def forget_compiled() -> None:
    """Leave nothing over from the shapes before. Once a point: it throws away what was compiled for this one too."""
    torch._dynamo.reset()


def compiled(module: nn.Module) -> nn.Module:
    """torch.compile for exactly this shape."""
    torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]  # mode backward keeps its graph
    compiled_module: nn.Module = torch.compile(module, dynamic=False)
    return compiled_module


class Bench:
    """One point in one mode: the inputs that its contenders share, and the step of each contender.

    On CUDA several input sets are used in turn so that none is still in the L2 cache when its turn comes again. Results
    are dropped at the end of each step and allocated afresh in the next, as in a training loop.
    """

    def __init__(self, point: Point, mode: str, device: torch.device, sets: int = 1) -> None:
        self.point, self.mode, self.device = point, mode, device
        forget_compiled()
        self.inputs = [point.randn(device) for _ in range(sets)]
        if mode in WITH_BACKWARD:
            self.inputs = [x.requires_grad_() for x in self.inputs]

    def grad_mode(self) -> contextlib.AbstractContextManager[object]:
        """Eval is timed without autograd, as inference is run; training with it."""
        return torch.no_grad() if self.mode == "eval" else contextlib.nullcontext()

    def has(self, contender: str) -> bool:
        """Whether a rival can be asked: none has second derivatives; oneDNN is for contiguous tensors on a CPU."""
        if self.mode in SECOND_ORDER_MODES:
            return contender not in RIVALS
        cpu = self.device.type == "cpu" and self.point.layout == "contiguous"
        return contender != "onednn" or (cpu and self.point.torch_dtype != torch.float64)

    def step(self, contender: str) -> Step:
        """The step of one contender, ready to be timed; anything that it needs is allocated here."""
        if contender == "copy":
            return self._copy_step()
        module = make_module(contender, self.point, self.device).train(self.mode != "eval")
        if self.mode == "gradient_penalty":
            return self._penalty_step(module)
        grads: list[Tensor] = []
        inputs = self.inputs
        if self.mode in WITH_BACKWARD:
            # Laid out as the contender's own output, which is how an elementwise layer behind it returns its gradient.
            with torch.no_grad():
                grads = [torch.randn_like(module(x)) for x in inputs]
        if contender in ("compile", "compiled"):
            module = compiled(module)
        if contender == "onednn":
            module = OneDNN(module)
            inputs, grads = [to_onednn(x) for x in inputs], [to_onednn(g) for g in grads]
        if self.mode == "backward":
            return self._backward_step(module, inputs, grads)
        if self.mode == "double_backward":
            return self._double_backward_step(module, grads)
        return self._forward_backward_step(module, inputs, grads) if grads else self._forward_step(module, inputs)

    def _copy_step(self) -> Step:
        sources = [x.detach() for x in self.inputs]
        targets = [torch.zeros_like(x) for x in sources]
        pairs = itertools.cycle(zip(targets, sources, strict=True))

        def copy() -> None:
            target, source = next(pairs)
            target.copy_(source)

        return copy

    def _forward_step(self, module: nn.Module, inputs: list[Tensor]) -> Step:
        each = itertools.cycle(inputs)

        def forward() -> None:
            module(next(each))

        return forward

    def _backward_step(self, module: nn.Module, inputs: list[Tensor], grads: list[Tensor]) -> Step:
        wanted = [module.weight, module.bias]
        outputs = [(module(x), [x, *wanted], g) for x, g in zip(inputs, grads, strict=True)]
        each = itertools.cycle(outputs)

        def backward() -> None:
            output, leaves, grad = next(each)
            torch.autograd.grad(output, leaves, grad, retain_graph=True)

        return backward

    def _forward_backward_step(self, module: nn.Module, inputs: list[Tensor], grads: list[Tensor]) -> Step:
        pairs: Iterator[tuple[Tensor, Tensor]] = itertools.cycle(zip(inputs, grads, strict=True))
        weight, bias = module.weight, module.bias

        def forward_backward() -> None:
            x, grad = next(pairs)
            module(x).backward(grad)
            x.grad = weight.grad = bias.grad = None

        return forward_backward

    def _double_backward_step(self, module: nn.Module, grads: list[Tensor]) -> Step:
        """Forward, backward with a graph, and back through both: to the input, the gradient and the weight."""
        triples = itertools.cycle(
            (x, g.requires_grad_(), torch.randn_like(g)) for x, g in zip(self.inputs, grads, strict=True)
        )
        weight = module.weight

        def double_backward() -> None:
            x, grad, arriving = next(triples)
            (first,) = torch.autograd.grad(module(x), x, grad, create_graph=True)
            first.backward(arriving)
            x.grad = grad.grad = weight.grad = None

        return double_backward

    def _penalty_step(self, module: nn.Module) -> Step:
        """The gradient penalty of a Wasserstein GAN's critic (Gulrajani et al. 2017) of one layer."""
        inputs = itertools.cycle(self.inputs)
        weight, bias = module.weight, module.bias

        def gradient_penalty() -> None:
            x = next(inputs)
            score = nn.functional.leaky_relu(module(x), 0.2).square().sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            (slope.flatten(1).norm(dim=1) - 1).square().mean().backward()
            x.grad = weight.grad = bias.grad = None

        return gradient_penalty


def check_agreement(point: Point, device: torch.device) -> None:
    """Raise Disagreement unless bn_ext and nn.BatchNorm1d give the same output and gradients at ``point``.

    The bounds leave room for native's own error, about 1e-3 of the standard deviation over millions of float32 samples,
    and for one rounding of either side to the tensor's dtype.
    """
    x, grad = point.randn(device), point.randn(device)
    samples = x.numel() // x.size(1)
    results: list[list[Tensor]] = []
    for contender in ("nn", "bn_ext"):
        module = make_module(contender, point, device)
        leaf = x.detach().requires_grad_()
        output = module(leaf)
        wanted = torch.autograd.grad(output, [leaf, *module.parameters()], grad)
        results.append([output.detach(), *wanted])
    names = ("output", "input gradient", "weight gradient", "bias gradient")
    # The gradients of weight and bias are sums of `samples` terms of size one, so about sqrt(samples) large.
    scales = (1.0, 1.0, samples**0.5, samples**0.5)
    for name, scale, native, ours in zip(names, scales, *results, strict=True):
        allowed = 1e-3 * scale + 2 * torch.finfo(point.torch_dtype).eps * float(native.abs().max())
        difference = float((ours - native).abs().max())
        if not difference <= allowed:
            raise Disagreement(f"{point}: {name} differs from native's by {difference:.3g}, allowed {allowed:.3g}")
