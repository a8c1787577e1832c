"""Every batch norm of a model: where it is called, what is computed there now, and why that is no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..modules import LazyFusedBatchNorm1d
from .container import BatchNormAct1d
from .pairing import KEEPS_RESIDUAL, activation_of, is_norm, listens
from .parents import FusedParent, Spec, is_fused, is_of_torch, is_sequential, original_of, why_not
from .rewrite import NORMS, Place, places_of, sites_of
from .waiting import path_of, why_not_inert


@dataclass(frozen=True)
class Fusion:
    """One place where a batch norm of a model is called.

    Attributes:
        name: the batch norm's in the model.
        where: the method and line, or the container, that calls it; "" where no call was found.
        computes: what is computed there in one pass.
        reason: why that is no more than the batch norm; "" where it is more.
    """

    name: str
    where: str
    computes: str
    reason: str = ""

    @property
    def fused(self) -> bool:
        return not self.reason


NOT_CONVERTED = "what calls it was not converted with fuse=True, as it is now"


class Analysis:
    """What the modules of a model call, and the classes that would fuse it; the model is only looked at."""

    def __init__(self, model: nn.Module) -> None:
        self.specs: dict[nn.Module, Spec] = {}
        self.names = {m: name for name, m in model.named_modules()}
        self.entries: dict[nn.Module, list[Fusion]] = {m: [] for m in self.names if type(m) in NORMS}
        if not self.entries:
            return
        self.outers: dict[nn.Module, list[tuple[nn.Module, int]]] = {}
        for module in self.names:
            if is_sequential(original_of(module)):
                for i, child in enumerate(module._modules.values()):
                    self.outers.setdefault(child, []).append((module, i))
        for module in self.names:
            if not any(child in self.entries for child in module.modules()) or module in self.entries:
                continue
            kind = original_of(module)
            if isinstance(module, BatchNormAct1d):
                self._container(module)
            elif is_sequential(kind):
                self._sequential(module, kind)
            elif not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
                self._methods(module)

    def report(self) -> list[Fusion]:
        found = []
        for norm, entries in self.entries.items():
            found += entries or [Fusion(self.names[norm], "", "batch norm", "no call of it was found")]
        return found

    # ---- the three that call batch norms ----

    def _container(self, module: BatchNormAct1d) -> None:
        norm = module._modules.get("norm")
        if norm in self.entries:
            act = module._modules.get("act")
            name = f"{self.names[module] or 'the model'}, a {type(module).__name__}"
            self._add(norm, name, _reason_of_norm(norm), [(act, (), {})], None)

    def _sequential(self, module: nn.Module, kind: type[nn.Module]) -> None:
        reason = why_not(kind, ())
        if not reason and any(child in self.entries for child in _flat(module)):
            self.specs[module] = ()
        where = f"{self.names[module] or 'the model'}, a {kind.__name__}"
        for i, norm in enumerate(module._modules.values()):
            if norm is not None and norm in self.entries:
                objection = _reason_of_parent(module, reason) or _reason_of_norm(norm)
                for follower in self._followers(module, i):
                    self._add(norm, where, objection, [] if follower is None else [(follower, (), {})], None)

    def _followers(self, module: nn.Module, i: int) -> list[nn.Module | None]:
        """Return what is called after the i-th child of a Sequential, by it or by those that it is a child of."""
        children = list(module._modules.values())
        if i + 1 < len(children):
            return [_first(children[i + 1])]
        if listens(module) or module not in self.outers:
            return [None]
        return [follower for outer, j in self.outers[module] for follower in self._followers(outer, j)]

    def _methods(self, module: nn.Module) -> None:
        kind = original_of(module)
        own = next((k for k in kind.__mro__ if not is_of_torch(k) and "fused_from" not in vars(k)), object)
        if issubclass(kind, (torch.fx.GraphModule, torch.jit.ScriptModule)):
            for child in module.modules():
                if child in self.entries:
                    why = f"the forward of a {kind.__name__} is generated"
                    self.entries[child].append(Fusion(self.names[child], self.names[module], "batch norm", why))
        if not issubclass(own, nn.Module) or own is FusedParent:
            return  # a wrapper of torch's: what it wraps calls the batch norms
        places, unreadable = places_of(module, own)
        spec = tuple(sorted((name, sites) for name, found in places.items() if (sites := sites_of(found))))
        reason = why_not(kind, spec) if spec else ""
        if spec and not reason:
            self.specs[module] = spec
        done = {name: dict(sites) for name, sites in getattr(type(module), "fused_spec", ())}
        for name, found in places.items():
            for place in found:
                here = done.get(name, {})
                stale = "" if place.chain.reason or not is_fused(module) or place.number in here else NOT_CONVERTED
                if is_fused(module) and not here.get(place.number, True):
                    place.activations = []  # what follows was none when it was converted
                file = os.path.basename(place.method.function.__code__.co_filename)
                where = f"{own.__name__}.{name}, {file}:{place.line}"
                for norm in place.norms:
                    if norm in self.entries:
                        objection = place.chain.reason or stale or _reason_of_parent(module, reason)
                        objection = objection or _reason_of_norm(norm) or self._reason_of_paths(module, place, norm)
                        self._add(norm, where, objection, place.activations, place)
        seen = {norm for found in places.values() for place in found for norm in place.norms}
        for child in _own(module):
            if "forward" in unreadable and child not in seen and child in self.entries:
                entry = Fusion(self.names[child], f"{own.__name__}.forward", "batch norm", unreadable["forward"])
                self.entries[child].append(entry)

    def _reason_of_paths(self, module: nn.Module, place: Place, norm: nn.Module) -> str:
        for path in place.chain.paths:
            try:
                between = path_of(module, path)
            except (KeyError, AttributeError):
                return f"self.{path}, which is no module, is called before its output is read"
            why = "" if between is None else why_not_inert(between, norm)
            if why:
                return f"self.{path} is called before its output is read: {why}"
        return ""

    def _add(self, norm: Any, where: str, reason: str, followers: list[Any], place: Place | None) -> None:
        """Enter what a call of norm computes: reason, if any, says why that is batch norm alone."""
        adds = place is not None and place.chain.add is not None
        found = [f if isinstance(f, str) else (activation_of(f, *rest) or ("",))[0] for f, *rest in followers]
        names = [name for name in dict.fromkeys(found) if name]
        if not reason and not names and not adds:
            reason = _reason_of_followers([f for f, *_ in followers])
        inner = "batch norm + residual" if adds else "batch norm"
        computes = f"{' or '.join(names)}({inner})" if names else inner
        if adds and set(names) & set(KEEPS_RESIDUAL):
            computes += f"; {inner} where autograd records"
        self.entries[norm].append(Fusion(self.names[norm], where, "batch norm" if reason else computes, reason))


def _own(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the batch norms that module's own methods may call: its children, and theirs where these are mere lists."""
    for child in module.children():
        if type(child) in NORMS:
            yield child
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _own(child)


def _reason_of_parent(module: nn.Module, reason: str) -> str:
    return "" if is_fused(module) else reason or NOT_CONVERTED


def _reason_of_norm(norm: nn.Module) -> str:
    if type(norm) is LazyFusedBatchNorm1d:
        return "it has not seen an input yet"
    return "" if is_norm(norm) else "it has hooks, or a forward of its own"


def _reason_of_followers(followers: list[Any]) -> str:
    if not followers:
        return "no activation follows"
    for follower in followers:
        if isinstance(follower, nn.Module) and listens(follower):
            return "the activation has hooks, or a forward of its own"
    name = type(followers[0]).__name__ if isinstance(followers[0], nn.Module) else str(followers[0])
    return f"{name} follows, which there is no kernel for"


def _flat(module: nn.Module) -> Iterator[nn.Module | None]:
    """Yield what a Sequential calls, the children of those in it in their place."""
    for child in module._modules.values():
        if child is not None and is_sequential(original_of(child)):
            yield from _flat(child)
        else:
            yield child


def _first(module: nn.Module | None) -> nn.Module | None:
    """Return what is called first where module is, the first child in a Sequential's place."""
    while module is not None and is_sequential(original_of(module)) and module._modules and not listens(module):
        module = next(iter(module._modules.values()))
    return module
