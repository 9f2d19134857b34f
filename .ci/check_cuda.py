"""Checks the machine code of the built CUDA library, which needs no GPU: no register spills, and vector reductions.

    python .ci/check_cuda.py [LIBRARY, by default dat/_C_cuda*.so]

Prints a line for each failure and exits with 1 if there was one.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

# The first architecture that adds four floats at a time to memory.
VECTOR_REDUCTIONS = 90
# Kernels that add to the gradient by value in float32, whole vectors of channels at a time.
VECTOR_KERNEL = re.compile(r"backward_kernel\w*?RowsI(?:f|6__half|13__nv_bfloat16)Li\d+ELi\d+ELi4E")


def find_cuobjdump() -> Path | None:
    """CUDA's own, or the one that triton brings along with torch."""
    triton = Path(sysconfig.get_path("purelib"), "triton/backends/nvidia/bin/cuobjdump")
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    candidates = [shutil.which("cuobjdump"), *(Path(home, "bin/cuobjdump") for home in homes if home), triton]
    return next((Path(path) for path in candidates if path and Path(path).exists()), None)


def sections(text: str, pattern: str) -> list[tuple[str, str]]:
    """Splits at what `pattern` matches: (its group, the text up to the next)."""
    parts = re.split(pattern, text)
    return list(zip(parts[1::2], parts[2::2], strict=True))


def spills(resources: str) -> list[str]:
    failures = []
    for architecture, code in sections(resources, r"\narch = (sm_\w+)"):
        for function, usage in sections(code, r"Function (\w+):"):
            stack, local = (re.search(rf"{name}:(\d+)", usage) for name in ("STACK", "LOCAL"))
            if not stack or not local:
                failures.append(f"{architecture}: no resource usage of {function}")
            elif int(stack[1]) or int(local[1]):
                failures.append(f"{architecture}: {function} keeps {stack[1]} + {local[1]} bytes outside of registers")
    return failures


def scalar_reductions(architecture: str, machine_code: str) -> list[str]:
    kernels = [part for part in sections(machine_code, r"Function : (\w+)") if VECTOR_KERNEL.search(part[0])]
    if not kernels:
        return [f"{architecture}: no backward kernels for vectors of channels"]
    failures = []
    for function, code in kernels:
        reductions = re.findall(r"\bREDG?\.\S*ADD\S*", code)
        if not reductions or not all("F32x4" in reduction for reduction in reductions):
            failures.append(f"{architecture}: {function} adds by {sorted(set(reductions)) or 'nothing'}, not by F32x4")
    return failures


def check(library: Path, cuobjdump: Path) -> tuple[list[str], str]:
    """Failures, and what was looked at."""

    def run(*flags: str) -> str:
        return subprocess.run([cuobjdump, *flags, library], check=True, capture_output=True, text=True).stdout

    resources = run("--dump-resource-usage")
    architectures = sorted(set(re.findall(r"\narch = (sm_\w+)", resources)))
    functions = len(re.findall(r"Function \w+:", resources))
    failures = spills(resources)
    if not functions:
        failures.append(f"{library}: no kernels")
    for architecture in architectures:
        if int(re.sub(r"\D", "", architecture)) >= VECTOR_REDUCTIONS:
            failures += scalar_reductions(architecture, run("-sass", "-arch", architecture))
    return failures, f"{functions} kernels for {', '.join(architectures)}"


def main() -> None:
    built = [Path(sys.argv[1])] if len(sys.argv) > 1 else sorted(Path("dat").glob("_C_cuda*.so"))
    if not built or not built[0].exists():
        sys.exit(f"no CUDA library to look into: {built[0] if built else 'dat/_C_cuda*.so'} was not built")
    cuobjdump = find_cuobjdump()
    if not cuobjdump:
        sys.exit("cuobjdump is needed to look into the CUDA library: CUDA's toolkit and triton have it")
    failures, seen = check(built[0], cuobjdump)
    if failures:
        sys.exit("\n".join(failures))
    print(f"{built[0]}: {seen}, no spills, vector reductions from sm_{VECTOR_REDUCTIONS} on")


if __name__ == "__main__":
    main()
