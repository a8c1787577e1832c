"""Every batch norm of a model: where it is called, what is computed there now, and why that is no more."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.utils import parametrize

from ..modules import LazyFusedBatchNorm1d
from .container import BatchNormAct1d
from .pairing import KEEPS_RESIDUAL, activation_of, is_norm, is_sequential, listens
from .parents import FROM, SPEC, FusedParent, Spec, is_fused, is_of_torch, original_of, why_not
from .resolve import mangled
from .rewrite import NORMS, Place, norms_of, places_of, sites_of
from .waiting import path_of, why_not_inert
from .watch import asks_for_class_named


@dataclass(frozen=True)
class Fusion:
    """One place where a batch norm of a model is called, or one that convert leaves alone.

    Attributes:
        name: the batch norm's in the model.
        where: the method and line, or the container, that calls it; "" where no call was found or looked for.
        computes: what is computed there in one pass.
        reason: why that is no more than the batch norm; "" where it is more.
        converted: whether it is a batch norm of ours, and not one that convert leaves alone.

    Example:
        >>> from torch import nn
        >>> import bn_ext
        >>> (entry,) = bn_ext.fusion_report(bn_ext.convert(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()), fuse=True))
        >>> entry.name, entry.computes, entry.fused
        ('0', 'relu(batch norm)', True)
    """

    name: str
    where: str
    computes: str
    reason: str = ""
    converted: bool = True

    @property
    def fused(self) -> bool:
        """Whether more than the batch norm is computed there in one pass."""
        return not self.reason


def why_left_alone(module: nn.Module) -> str:
    """Return why convert would leave a batch norm of torch's, or a subclass of one, what it is; "" for all the rest."""
    kind = type(module)
    if not isinstance(module, _BatchNorm) or kind in NORMS or kind in _CONVERTED:
        return ""
    if isinstance(module, SyncBatchNorm):
        return "it takes the statistics of all processes together, which there is no kernel for"
    if kind in _OTHER_RANKS:
        return "it is for inputs of other dimensions than (N, C) and (N, C, L)"
    if any(base.__module__.startswith("torch.distributed.") for base in kind.__mro__):
        return "it has been sharded, which gave it a class of its own: convert before that"
    if parametrize.is_parametrized(module):
        return "it is parametrized, which gave it a class of its own: convert before that"
    return f"{kind.__name__} is a subclass of {kind.__mro__[1].__name__}, and may compute something else"


_CONVERTED = (nn.BatchNorm1d, nn.LazyBatchNorm1d)  # convert makes NORMS of these
_OTHER_RANKS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)


NOT_CONVERTED = "what calls it was not converted with fuse=True, as it is now"


class Analysis:
    """What the modules of a model call, and the classes that would fuse it; the model is only looked at.

    Attributes:
        specs: what parents.fused_class takes, for every module that it would fuse something in.
    """

    def __init__(self, model: nn.Module) -> None:
        self.specs: dict[nn.Module, Spec] = {}
        self.names = {m: name for name, m in model.named_modules()}
        self.kinds = {original_of(m) for m in self.names}
        self.entries: dict[nn.Module, list[Fusion]] = {m: [] for m in self.names if type(m) in NORMS}
        if not self.entries:
            return
        self.outers: dict[nn.Module, list[tuple[nn.Module, int]]] = {}
        for module in self.names:
            if is_sequential(original_of(module)):
                for i, child in enumerate(module._modules.values()):
                    if child is not None:
                        self.outers.setdefault(child, []).append((module, i))
        sequentials = []
        for module in self.names:
            if module in self.entries or not any(child in self.entries for child in module.modules()):
                continue
            if type(module).forward is BatchNormAct1d.forward:
                self._container(module)
            elif is_sequential(original_of(module)):
                sequentials.append(module)
            elif type(module) not in (nn.ModuleList, nn.ModuleDict):
                self._methods(module)
        for module in sequentials:  # behind the methods, which may say what follows a Sequential
            self._sequential(module)

    def report(self) -> list[Fusion]:
        found = []
        for module, name in self.names.items():
            reason = why_left_alone(module)
            if module in self.entries:
                found += self.entries[module] or [Fusion(name, "", "batch norm", "no call of it was found")]
            elif reason:
                found.append(Fusion(name, "", f"{type(module).__name__}'s own forward", reason, False))
        return found

    # ---- the three that call batch norms ----

    def _container(self, module: nn.Module) -> None:
        norm, act = module._modules.get("norm"), module._modules.get("act")
        if norm in self.entries:
            reason = "it has hooks, or a forward of its own" if "forward" in vars(module) else ""
            self._add(norm, self._place(module), reason or _reason_of_norm(norm), [(act, (), {})], None)

    def _sequential(self, module: nn.Module) -> None:
        reason = self._why_not(original_of(module), ())
        if not reason and any(child in self.entries for child in _flat(module)):
            self.specs[module] = ()
        for i, norm in enumerate(module._modules.values()):
            if norm is not None and norm in self.entries:
                objection = _reason_of_parent(module, reason) or _reason_of_norm(norm)
                for follower in self._followers(module, i):
                    if follower is None and self.entries[norm]:
                        continue  # a method has said what follows
                    followers: list[Any] = [] if follower is None else [(follower, (), {})]
                    self._add(norm, self._place(module), objection, followers, None)

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
        generated = issubclass(kind, (torch.fx.GraphModule, torch.jit.ScriptModule))
        own: Any = next((k for k in kind.__mro__ if not is_of_torch(k) and FROM not in vars(k)), object)
        if generated or not issubclass(own, nn.Module) or own is FusedParent:
            for child in module.modules() if generated else ():
                self._refuse(child, self._place(module), f"the forward of a {kind.__name__} is generated")
            return  # else a wrapper of torch's: what it wraps calls the batch norms
        places, unreadable = places_of(module, own)
        spec = tuple(sorted((name, sites) for name, found in places.items() if (sites := sites_of(found))))
        reason = self._why_not(kind, spec) if spec else ""
        if "forward" in vars(module):
            reason = f"{own.__name__} has been given another forward"
        if spec and not reason:
            self.specs[module] = spec
        done = {name: dict(sites) for name, sites in getattr(type(module), SPEC, ())}
        for name, found in places.items():
            for place in found:
                self._method_place(module, own, name, place, reason, done.get(name, {}))
        for name, (why, mentioned) in unreadable.items():
            for root in mentioned:
                for child in _own(module._modules.get(root)):
                    if not self.entries.get(child, True):
                        self._refuse(child, f"{own.__name__}.{name}", why)

    def _method_place(
        self, module: nn.Module, own: type, name: str, place: Place, reason: str, done: dict[int, bool]
    ) -> None:
        """Enter one call in a method. done: the sites that module's class fuses in it, each with or without what
        follows."""
        fused = is_fused(module) and not reason
        stale = "" if place.chain.reason or not fused or place.number in done else NOT_CONVERTED
        if fused and not place.chain.reason and not done.get(place.number, True):
            place.activations = []  # what follows was none when it was converted
        file = os.path.basename(place.method.function.__code__.co_filename)
        for norm in place.norms:
            if norm in self.entries:
                objection = place.chain.reason or stale or ("" if fused else reason or NOT_CONVERTED)
                objection = objection or _reason_of_norm(norm) or _reason_of_paths(module, place, norm)
                followers = place.activations if place.chain.loop is None else _next_in_list(module, place, norm)
                self._add(norm, f"{own.__name__}.{name}, {file}:{place.line}", objection, followers, place)

    # ---- entries ----

    def _place(self, module: nn.Module) -> str:
        return f"{self.names[module] or 'the model'}, a {type(module).__name__}"

    def _why_not(self, kind: type[nn.Module], spec: Spec) -> str:
        """Return why no subclass of kind can stand in its place in this model."""
        for other in self.kinds:
            asks = asks_for_class_named(other, kind.__name__)
            if asks:
                return f"{other.__name__}.{asks} asks whether something is a {kind.__name__}"
        return why_not(kind, spec)

    def _refuse(self, norm: nn.Module, where: str, reason: str) -> None:
        if norm in self.entries:
            self.entries[norm].append(Fusion(self.names[norm], where, "batch norm", reason))

    def _add(self, norm: Any, where: str, reason: str, followers: list[Any], place: Place | None) -> None:
        """Enter what a call of norm computes: reason, if any, says why that is batch norm alone."""
        adds = place is not None and place.chain.add is not None
        found = [f if isinstance(f, str) else (activation_of(f, *rest) or ("",))[0] for f, *rest in followers]
        names = [name for name in dict.fromkeys(found) if name]
        reason = reason or ("" if names or adds else _reason_of_followers([f for f, *_ in followers]))
        if reason:
            return self._refuse(norm, where, reason)
        inner = "batch norm + residual" if adds else "batch norm"
        computes = f"{' or '.join(names)}({inner})" if names else inner
        if adds and set(names) & set(KEEPS_RESIDUAL):
            computes += f"; {inner} where autograd records"
        self.entries[norm].append(Fusion(self.names[norm], where, computes))
        return None


def _next_in_list(module: nn.Module, place: Place, norm: nn.Module) -> list[Any]:
    """Return what a loop over a list of self's calls after norm, as activations are given."""
    assert place.chain.loop is not None
    layers = module._modules.get(mangled(getattr(place.chain.loop.iter, "attr", ""), place.method.owner))
    listed = list(layers._modules.values()) if type(layers) is nn.ModuleList else []
    return [(after, (), {}) for before, after in itertools.pairwise(listed) if norm in norms_of([before])]


def _own(module: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the batch norms that module is, or holds if it is a mere list."""
    if module is not None and type(module) in NORMS:
        yield module
    elif isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        for child in module.children():
            yield from _own(child)


def _reason_of_parent(module: nn.Module, reason: str) -> str:
    return "" if is_fused(module) else reason or NOT_CONVERTED


def _reason_of_norm(norm: nn.Module) -> str:
    if type(norm) is LazyFusedBatchNorm1d:
        return "it has not seen an input yet"
    return "" if is_norm(norm) else "it has hooks, or a forward of its own"


def _reason_of_paths(module: nn.Module, place: Place, norm: nn.Module) -> str:
    for path in place.chain.paths:
        try:
            between = path_of(module, path)
        except (KeyError, AttributeError):
            return f"self.{path}, which is no module, is called before its output is read"
        why = "" if between is None else why_not_inert(between, norm)
        if why:
            return f"self.{path} is called before its output is read: {why}"
    return ""


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
