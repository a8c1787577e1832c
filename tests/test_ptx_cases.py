"""Cases of tests/simt on the PTX of each architecture, a part of them spread over all; `make test-ptx` runs all.

Half of them with every product that an addition takes in one with it, as ptxas may do.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import nvcc
from simt.backend import ARCHITECTURES, running_on
from simt.calls import DTYPES
from simt_support import ids
from support import name_of

MODULES = ("kernels", "activated", "padded", "virtual", "padded_virtual", "renorm", "stages", "values", "traffic")
# Cases of a function on each architecture, where there are so many; by name, where the kernels are many too.
FEW = 2
MORE = {
    "kernels.test_regime": 16,
    "kernels.test_regime_of_other_types": 24,
    "kernels.test_layout": 6,
    "activated.test_values": 8,
    "activated.test_regimes_of_training": 6,
    "activated.test_regimes_of_backward": 10,
    "padded.test_every_pass": 8,
    "padded.test_residual_and_activation": 8,
    "virtual.test_forward_and_backward": 4,
    "virtual.test_every_regime": 4,
    "virtual.test_residual_and_activation": 6,
    "padded_virtual.test_forward_and_backward": 4,
    "padded_virtual.test_residual_and_activation": 4,
    "renorm.test_forward_and_backward": 4,
    "renorm.test_residual_and_activation": 4,
    "stages.test_every_regime_forward": 6,
    "stages.test_every_regime_backward": 6,
    "stages.test_parts_are_the_batch": 4,
}
LEFT_OUT = {
    "kernels.test_a_removed_barrier_shows": "g++ builds it",
    "kernels.test_sizes_around_every_multiple": "half a minute",
    "values.test_any_call_matches_the_reference": "as many calls as hypothesis likes",
    "stages.test_reference_of_moments_is_that_of_the_batch": "runs no kernel",
    "traffic.test_large_tensors_occupy_every_sm": "plans alone",
    "traffic.test_every_plan_can_be_launched": "plans alone",
    "traffic.test_plans_cover_every_element": "plans alone",
    "traffic.test_launches_and_reads_promised": "plans alone",
    "traffic.test_a_plan_depends_on_its_arguments_alone": "plans alone",
    "padded_virtual.test_more_of_them_than_a_grid_has_rows": "billions of instructions",
    "virtual.test_two_launches_where_they_keep_the_device_at_work": "plans alone",
    "virtual.test_large_pieces_go_one_by_one": "plans alone",
    "virtual.test_without_cooperative_launches_there_are_two_all_the_same": "plans alone",
}


# Functions whose cases take several element types each.
SEVERAL_TYPES = {"kernels.test_types_of_parameters_and_statistics", "kernels.test_backward_takes_what_forward_saved"}


@dataclass
class Case:
    name: str
    function: Callable[..., None]
    arguments: dict[str, Any]


def _values_of(mark: pytest.Mark) -> Iterator[dict[str, Any]]:
    """The arguments that one `parametrize` gives, one after the other."""
    names, values = mark.args[:2]
    names = names.replace(" ", "").split(",") if isinstance(names, str) else list(names)
    for value in values:
        plain = value.values if hasattr(value, "values") and hasattr(value, "marks") else value
        yield dict(zip(names, plain if len(names) > 1 or plain is not value else (plain,), strict=True))


def _cases_of(name: str, function: Callable[..., None]) -> list[Case]:
    marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
    cases = []
    for parts in itertools.product(*(list(_values_of(mark)) for mark in reversed(marks))):
        arguments = {key: value for part in parts for key, value in part.items()}
        text = "-".join((ids(v) or str(v)).replace("torch.", "")[:30] for v in arguments.values())
        cases.append(Case(f"{name}[{text}]", function, arguments))
    return cases


def every_case() -> dict[str, list[Case]]:
    """All cases of tests/simt that need no fixture, by function."""
    found = {}
    for short in MODULES:
        module = importlib.import_module(f"test_simt_{short}")
        for name, function in vars(module).items():
            if name.startswith("test_") and inspect.getmodule(function) is module:
                cases = _cases_of(f"{short}.{name}", function)
                if not hasattr(function, "hypothesis") and set(cases[0].arguments) == set(
                    inspect.signature(function).parameters
                ):
                    found[f"{short}.{name}"] = cases
    return found


def _architectures(case: Case) -> list[int]:
    """Those that have clusters, where the case takes one, and whose PTX of all its types is at hand."""
    dtypes = {v for v in case.arguments.values() if isinstance(v, torch.dtype)} or {torch.float32}
    sources = [Path(f"{name_of(d)}.cu") for d in (DTYPES if case.name.split("[")[0] in SEVERAL_TYPES else dtypes)]
    every = [a for a in ARCHITECTURES if all(a in nvcc.families_of(source) for source in sources)]
    return [a for a in every if a >= 90 or "cluster" not in case.name]


def spread() -> list[Any]:
    """Of each function some cases, one architecture after the other, in an order that only names decide."""
    chosen = []
    for name, cases in every_case().items():
        if name in LEFT_OUT:
            continue
        order = sorted(cases, key=lambda case: zlib.crc32(case.name.encode()))
        first = zlib.crc32(name.encode())
        for k, case in enumerate(order[: 4 * MORE.get(name, FEW)]):
            knows = _architectures(case)
            architecture, contract = knows[(first + k) % len(knows)], k // 4 % 2 == 1
            label = f"{architecture}{'-contract' * contract}-{case.name}"
            chosen.append(pytest.param(architecture, contract, case, id=label))
    return chosen


@pytest.fixture(scope="module", autouse=True)
def _toolkit() -> None:
    nvcc.toolkit_or_skip()


@pytest.mark.parametrize(("architecture", "contract", "case"), spread())
def test_case(architecture: int, contract: bool, case: Case) -> None:
    with running_on(architecture, contract=contract):
        case.function(**case.arguments)


def test_what_is_left_out_is_there() -> None:
    """Functions by whose names something is said above; all others are spread."""
    known = {*every_case(), "values.test_any_call_matches_the_reference"}
    assert {*LEFT_OUT, *MORE, *SEVERAL_TYPES} <= known
