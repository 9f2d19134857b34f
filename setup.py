"""Builds the two libraries of kernels; all metadata is in pyproject.toml.

Neither is needed to install: without a compiler the ops run on their PyTorch reference.
DAT_BUILD_CUDA=0/1 overrides whether the CUDA library is built, TORCH_CUDA_ARCH_LIST the architectures.
"""

import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

CSRC = Path("dat/csrc")
# The stable ABI of torch 2.11, and of Python 3.10: one built library serves every later one of both.
MACROS = [("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020b000000000000")]
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"


def has_compiler() -> bool:
    return shutil.which(os.environ.get("CXX", "c++")) is not None


def cuda_home() -> Path | None:
    """The toolkit to build with: the machine's, or the one that PyPI's `cuda-toolkit[nvcc,cudart,cccl]` brings.

    torch takes the folder above any `nvcc` on the PATH, which may be a wrapper far from its toolkit.
    """
    packaged = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*"), reverse=True)
    known = [os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME, "/usr/local/cuda", *packaged]
    for home in (Path(path) for path in known if path):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def wants_cuda() -> bool:
    override = os.environ.get("DAT_BUILD_CUDA")
    if override == "0":
        return False
    if override not in (None, "1"):
        sys.exit(f"DAT_BUILD_CUDA must be 0 or 1, got {override!r}")
    home = cuda_home()
    if override == "1" and home is None:
        sys.exit(
            "DAT_BUILD_CUDA=1, but no CUDA toolkit was found: CUDA_HOME must hold bin/nvcc and include/cuda_runtime.h"
        )
    cpp_extension.CUDA_HOME = None if home is None else str(home)
    return home is not None and (override == "1" or torch.version.cuda is not None)


def extensions() -> list:
    def sources(folder: str, pattern: str) -> list[str]:
        return sorted(str(path) for path in (CSRC / folder).glob(pattern))

    headers = [str(path) for path in CSRC.rglob("*.h")]
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
    if wants_cuda():
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
        # The kernels name what they were built for when a device cannot run them.
        macros = [*MACROS, ("USE_CUDA", None), ("DAT_CUDA_ARCHITECTURES", f'"{architectures}"')]
        libraries.append(
            cpp_extension.CUDAExtension(
                "dat._C_cuda",
                sources("cuda", "*.cu"),
                define_macros=macros,
                extra_compile_args={
                    "cxx": CXX_FLAGS,
                    "nvcc": ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v"],
                },
                depends=headers,
                py_limited_api=True,
            )
        )
    return libraries


if has_compiler():
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": cpp_extension.BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
else:
    print(
        "dat: no C++ compiler found: installing without libraries, the ops will run on PyTorch alone", file=sys.stderr
    )
    setup()
