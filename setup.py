"""Build of bn_ext: the package's metadata is in pyproject.toml, the decisions are in buildtools/plan.py."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "buildtools"))
import locate_torch  # noqa: E402  (an isolated build puts no folder of the checkout on sys.path)
import plan  # noqa: E402

try:
    import torch
    from torch.utils import cpp_extension

    Base = cpp_extension.BuildExtension
except ImportError:  # metadata and source distributions are made without torch; a build stops in plan.settle
    from setuptools.command.build_ext import build_ext as Base

RECORD = "_build.json"


def sources(*patterns: str) -> list[str]:
    """Return the files under csrc that match, sorted, relative to this file as setuptools wants them."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


CUDA_SOURCES = sources("cuda/*.cu", "cuda/cut.cpp", "cuda/launch.cpp", "cuda/padded.cpp", "torch/cuda_ops.cpp")
CPP_SOURCES = [name for name in sources("*/*.cpp") if name not in CUDA_SOURCES]
HEADERS = sources("**/*.h", "**/*.cuh", "**/*.inc", "**/*.inl")


class BuildLibrary(Base):
    """torch's BuildExtension, told what to build when it really builds, leaving a record of what it built against."""

    def run(self) -> None:
        record = self.plan_extension()
        super().run()
        plan.say_what_is_missing(record)
        text = json.dumps(record, indent=2) + "\n"
        for path in {built for built, _ in self.record_paths()} | {kept for _, kept in self.record_paths() if kept}:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_text(text)

    def plan_extension(self) -> dict[str, object]:
        """Fill in the extension for this torch and this machine; return the record of it."""
        compiler, toolkit, cuda = plan.settle(os.environ)
        if "CXX" not in os.environ and compiler != ["c++"]:
            os.environ["CXX"] = compiler[0]  # torch's ninja rules would call c++
        name = plan.compiler_name(compiler)
        openmp, one_thread = plan.openmp_flags(torch, name)
        flags = ["-O3", "-g0", "-fvisibility=hidden", "-fvisibility-inlines-hidden"] if os.name == "posix" else []
        common = {"sources": list(CPP_SOURCES), "include_dirs": [str(ROOT / "csrc")], "depends": HEADERS}
        objects = [str(Path(name).with_suffix("")) for name in CPP_SOURCES + CUDA_SOURCES]
        if len(set(objects)) < len(objects):
            raise plan.Cannot("two sources in one folder of csrc have one name, so their object files would collide.")
        codes = ""
        if cuda.wanted:
            # torch has taken them from the first nvcc on PATH, a wrapper or a link of no toolkit perhaps
            cpp_extension.CUDA_HOME = os.environ["CUDA_HOME"] = str(toolkit.home)
            common["sources"] += CUDA_SOURCES
            common["include_dirs"].append(str(toolkit.include))
            codes = self.choose_architectures(toolkit)
            planned = cpp_extension.CUDAExtension(
                "bn_ext._C",
                define_macros=[("WITH_CUDA", None)],
                # for nvcc, no flag may contain the letters "arch", or torch would drop its own list, and a macro no
                # comma, at which nvcc begins another macro
                extra_compile_args={
                    "cxx": [*flags, *openmp, f"-DBN_EXT_CUDA_CODES={codes}"],
                    "nvcc": ["-O3", "-Xcompiler", "-fvisibility=hidden", "-Xcompiler", "-fvisibility-inlines-hidden"],
                },
                **common,
            )
        else:
            planned = cpp_extension.CppExtension("bn_ext._C", extra_compile_args={"cxx": flags + openmp}, **common)
        vars(self.extensions[0]).update(vars(planned))
        jobs = os.environ.setdefault("MAX_JOBS", str(plan.default_jobs(cuda.wanted)))
        threads = "OpenMP threads" if openmp else "one thread"
        print(
            f"bn_ext: torch {torch.__version__}, {name}, {threads}, {jobs} jobs, "
            f"CUDA {'yes' if cuda.wanted else 'no'}: {cuda.reason}{', for ' * bool(codes)}{codes}",
            flush=True,
        )
        for clause in toolkit.passed_over if cuda.wanted else ():
            print(f"bn_ext: {clause}; the toolkit in {toolkit.home} is used", flush=True)
        return {
            "version": self.distribution.get_version(),
            "torch": str(torch.__version__),
            "torch_cuda": torch.version.cuda,
            "cxx11_abi": bool(torch.compiled_with_cxx11_abi()),
            "python": sysconfig.get_config_var("SOABI") or "",
            "compiler": name,
            "openmp": bool(openmp),
            "one_thread_reason": one_thread,
            "cuda": cuda.wanted,
            "cuda_reason": cuda.reason,
            "cuda_codes": codes,
        }

    def choose_architectures(self, toolkit: plan.Toolkit) -> str:
        """Set TORCH_CUDA_ARCH_LIST to what is built for, the wish, the GPUs seen or all; return nvcc's codes."""
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and torch.cuda.device_count() == 0:
            os.environ["TORCH_CUDA_ARCH_LIST"] = plan.default_arch_list(toolkit.version)
        try:
            flags = cpp_extension._get_cuda_arch_flags([])
        except ValueError as error:
            raise plan.Cannot(f"TORCH_CUDA_ARCH_LIST={os.environ['TORCH_CUDA_ARCH_LIST']}: {error}.") from error
        os.environ["TORCH_CUDA_ARCH_LIST"], codes = plan.architectures(os.environ, flags, toolkit)
        return codes

    def record_paths(self) -> list[tuple[str, str]]:
        """Return where the record is built and, for a build in place, where in the sources it is kept ("" if not)."""
        kept = str(ROOT / "bn_ext" / RECORD) if self.inplace else ""
        return [(os.path.join(self.build_lib, "bn_ext", RECORD), kept)]

    def get_outputs(self) -> list[str]:
        return sorted({*super().get_outputs(), *(built for built, _ in self.record_paths())})

    def get_output_mapping(self) -> dict[str, str]:
        return {**super().get_output_mapping(), **{built: kept for built, kept in self.record_paths() if kept}}


def put_ninja_on_path() -> None:
    """An environment's ninja need not be on PATH when its pip is called by its full name."""
    try:
        from ninja import BIN_DIR
    except ImportError:
        return
    os.environ["PATH"] = BIN_DIR + os.pathsep + os.environ.get("PATH", "")


class Distribution(setuptools.Distribution):
    """A wheel runs under the torch that it was built for and says so; a source distribution takes any that is known."""

    def parse_config_files(self, *args: object, **kwargs: object) -> None:
        super().parse_config_files(*args, **kwargs)
        found = None if "sdist" in sys.argv else locate_torch.locate_torch()
        if found is not None:
            local, requirement = plan.stamp(os.environ, found)
            self.metadata.version += f"+{local}"
            others = [r for r in self.install_requires if not r.startswith("torch")]
            self.install_requires = self.metadata.install_requires = [requirement, *others]


put_ninja_on_path()
setuptools.setup(
    distclass=Distribution,
    ext_modules=[setuptools.Extension("bn_ext._C", CPP_SOURCES, depends=HEADERS, language="c++")],
    cmdclass={"build_ext": BuildLibrary},
)
