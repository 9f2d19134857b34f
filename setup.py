"""Builds the two libraries of kernels; all metadata is in pyproject.toml.

Neither is needed to install: without a compiler the ops run on their PyTorch reference.
DAT_BUILD_CUDA=0/1 overrides whether the CUDA library is built, TORCH_CUDA_ARCH_LIST the architectures.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch
from setuptools import find_packages, setup
from setuptools.command.build import build
from torch.utils import cpp_extension

CSRC = Path("dat/csrc")
# The stable ABI of torch 2.11, and of Python 3.10: one built library serves every later one of both.
MACROS = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020b000000000000")]
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v", "-Xfatbin=-compress-all"]


def has_compiler() -> bool:
    """Whether there is a C++ compiler that runs; macOS without Xcode's tools has a c++ that only asks for them."""
    # The kernels use extensions of GCC and Clang, and torch builds with MSVC on Windows.
    if os.name != "posix":
        return False
    command = shlex.split(os.environ.get("CXX") or "c++")
    try:
        return subprocess.run([*command, "--version"], capture_output=True).returncode == 0
    except OSError:
        return False


def toolkits() -> Iterator[tuple[Path, tuple[int, int]]]:
    """CUDA toolkits and their versions: the machine's, then what PyPI's `cuda-toolkit[nvcc,cudart,cccl]` brings.

    torch takes the folder above any `nvcc` on the PATH, which may be a wrapper far from its toolkit.
    """
    packaged = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*"), reverse=True)
    for home in (os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME, "/usr/local/cuda", *packaged):
        if home and Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            text = subprocess.run([Path(home, "bin/nvcc"), "--version"], capture_output=True, text=True).stdout
            version = re.search(r"release (\d+)\.(\d+)", text)
            if version:
                yield Path(home), (int(version[1]), int(version[2]))


def find_toolkit() -> tuple[Path, tuple[int, int]] | None:
    """The toolkit to build the CUDA library with, of the major version of torch's CUDA; None to do without."""
    override = os.environ.get("DAT_BUILD_CUDA") or None
    if override not in (None, "0", "1"):
        sys.exit(f"DAT_BUILD_CUDA must be 0 or 1, got {override!r}")
    if override == "0":
        return None
    found = list(toolkits())
    wanted = torch.version.cuda
    fitting = [toolkit for toolkit in found if wanted and toolkit[1][0] == int(wanted.split(".")[0])]
    if fitting:
        return fitting[0]
    seen = ", ".join(f"{home} ({major}.{minor})" for home, (major, minor) in found) or "none"
    reason = f"dat: no CUDA library: torch has CUDA {wanted or 'not at all'}, toolkits found: {seen}"
    if override == "1":
        sys.exit(reason)
    print(reason, file=sys.stderr)
    return None


def cuda_architectures(version: tuple[int, int]) -> tuple[str, list[str]]:
    """The architectures to build for, in the form of TORCH_CUDA_ARCH_LIST, and nvcc's flags for them.

    torch makes the flags of a list that the user gives. The default compiles the kernels to PTX twice and not for every
    architecture: sm_90 is the last that brings an instruction which they use. Older GPUs of this machine come first.
    """
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return given, []
    ampere = "-gencode=arch=compute_80,code=sm_80"
    least = (7, 5) if version >= (13, 0) else (5, 0)
    visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    older = sorted(capability for capability in visible if least <= capability < (8, 0))
    names = "".join(f"{major}.{minor};" for major, minor in older)
    flags = [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in older] + [ampere]
    if version < (12, 8):
        return f"{names}8.0;9.0+PTX", [*flags, "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    return f"{names}8.0;9.0+PTX;10.0;12.0", [*flags, "-gencode=arch=compute_90,code=[sm_90,sm_100,sm_120,compute_90]"]


class Build(build):
    """setuptools', without what an earlier build left: modules and libraries that this one does not have."""

    def run(self) -> None:
        if Path(self.build_lib).parent == Path(self.build_base):
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExtension(cpp_extension.BuildExtension):
    """torch's, which takes a minute or two without a word."""

    def build_extensions(self) -> None:
        names = " and ".join(extension.name for extension in self.extensions)
        cores = os.environ.get("MAX_JOBS") or os.cpu_count()
        line = f"dat: compiling {names} on {cores} cores, which takes minutes ..."
        print(line, file=sys.stderr)
        # pip keeps what a build prints for itself.
        if not sys.stderr.isatty() and os.access("/dev/tty", os.W_OK):
            with contextlib.suppress(OSError):
                Path("/dev/tty").write_text(f"\n{line}\n")
        super().build_extensions()


def extensions() -> list:
    def sources(folder: str, pattern: str) -> list[str]:
        return sorted(str(path) for path in (CSRC / folder).glob(pattern))

    headers = [str(path) for pattern in ("*.h", "*.cuh") for path in CSRC.rglob(pattern)]
    libraries = [
        cpp_extension.CppExtension(
            "dat._C_cpu",
            sources("cpu", "*.cpp"),
            define_macros=MACROS,
            extra_compile_args={"cxx": [*CXX_FLAGS, "-ffp-contract=fast"]},
            depends=headers,
            py_limited_api=True,
        )
    ]
    toolkit = find_toolkit()
    if toolkit is not None:
        home, version = toolkit
        cpp_extension.CUDA_HOME = str(home)
        architectures, flags = cuda_architectures(version)
        # The kernels name what they were built for when a device cannot run them.
        macros = [*MACROS, ("USE_CUDA", None), ("DAT_CUDA_ARCHITECTURES", f'"{architectures}"')]
        library = cpp_extension.CUDAExtension(
            "dat._C_cuda",
            sources("cuda", "*.cu"),
            define_macros=macros,
            extra_compile_args={"cxx": CXX_FLAGS, "nvcc": [*NVCC_FLAGS, *flags]},
            depends=headers,
            py_limited_api=True,
        )
        runtimes = sorted(home.glob("lib/libcudart.so.*"))
        if runtimes and not any((home / folder / "libcudart.so").exists() for folder in ("lib64", "lib")):
            # PyPI's toolkit has the runtime without the name that a linker looks for.
            library.libraries.remove("cudart")
            library.extra_link_args += [f"-L{runtimes[0].parent}", f"-l:{runtimes[0].name}"]
        libraries.append(library)
    return libraries


def main() -> None:
    # configs/ lies beside the package, where a reader looks for it, and is installed inside it.
    packages = {
        "packages": [*find_packages(include=["dat*"]), "dat.configs"],
        "package_dir": {"dat.configs": "configs"},
    }
    commands = {"build": Build}
    if not has_compiler():
        print("dat: no C++ compiler: installing without libraries, the ops will run on PyTorch alone", file=sys.stderr)
        setup(**packages, cmdclass=commands)
        return
    setup(
        **packages,
        ext_modules=extensions(),
        cmdclass={**commands, "build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
