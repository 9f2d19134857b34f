"""Runs every registered DAT at many image sizes, with a classifier and as features. From the root of a checkout:

    python -m tests.models.sweep [NAME ...] [--sizes HxW ...]

Checks for each model and size, with random weights and in float32, one image and a batch of three that holds it:
outputs and gradients of the image and of every parameter are finite, and the image alone has the outputs and the
gradient that it has in the batch. The maps of the small sizes are single rows, columns and pixels.

Prints a line per case: the largest difference relative to the largest value of the same output or gradient, seconds,
and peak memory of the case's process. Exits with 1 if a case fails. Too long for the test suite: 800x1333 takes minutes
for the large models, which recompute blocks in its backward to need less memory.
"""

import argparse
import multiprocessing
import resource
import sys
import time
from itertools import product

import timm
import torch
from torch import Tensor, nn

import dat  # noqa: F401

SIZES = ("32x32", "4x160", "160x4", "97x61", "224x224", "384x384", "800x1333")
# Largest difference between alone and in a batch, relative to the largest value.
OUTPUT_TOLERANCE = 1e-4
# Sampling has kinks at pixel centres, and rounding may move a key across one.
GRADIENT_TOLERANCE = 1e-3
# Beyond so many pixels in a batch blocks are recomputed in the backward, except in models of few parameters.
CHECKPOINTED_PIXELS, CHECKPOINTED_PARAMETERS = 10**6, 10**7


def parameters(name: str) -> int:
    return sum(p.numel() for p in timm.create_model(name, device="meta").parameters())


def run(model: nn.Module, images: Tensor, cotangents: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Outputs and gradient of images, for a loss of which every image has its own part; all are finite."""
    model.zero_grad()
    images = images.clone().requires_grad_()
    outputs = model(images)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    if not cotangents:
        cotangents.extend(torch.randn_like(output[:1]) for output in outputs)
    sum((output * cotangent).sum() for output, cotangent in zip(outputs, cotangents, strict=True)).backward()
    tensors = {f"output {i}": output for i, output in enumerate(outputs)} | {"gradient of the image": images.grad}
    tensors |= {f"gradient of {n}": p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, tensor in tensors.items():
        if tensor is None or not tensor.isfinite().all():
            raise AssertionError(f"{name} is {'missing' if tensor is None else 'not finite'}")
    return [output.detach() for output in outputs], images.grad


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def check(size: str, name: str, features_only: bool) -> None:
    """One case, in a process of its own; prints its line and exits with 1 if it fails."""
    start = time.perf_counter()
    H, W = map(int, size.split("x"))
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=features_only).eval()
    images, cotangents = torch.randn(3, 3, H, W), []
    checkpointed = images[:, 0].numel() > CHECKPOINTED_PIXELS and parameters(name) > CHECKPOINTED_PARAMETERS
    if checkpointed:
        (model.model if features_only else model).set_grad_checkpointing()
    try:
        batch, batch_grad = run(model, images, cotangents)
        alone, alone_grad = run(model, images[1:2], cotangents)
        by_output = max(difference(a, b[1:2]) for a, b in zip(alone, batch, strict=True))
        by_grad = difference(alone_grad, batch_grad[1:2])
        verdict = "ok" if by_output <= OUTPUT_TOLERANCE and by_grad <= GRADIENT_TOLERANCE else "FAILED"
        figures = f"outputs {by_output:.1e}, gradient {by_grad:.1e}"
    except (AssertionError, RuntimeError, ValueError) as error:
        verdict, figures = "FAILED", str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    what = "features" if features_only else "logits"
    cost = f"{time.perf_counter() - start:.1f} s, {peak:.1f} GiB{', blocks recomputed' if checkpointed else ''}"
    print(f"{verdict} {name} {what} {size}: {figures}; {cost}", flush=True)
    sys.exit(verdict != "ok")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models; all of them by default")
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="HxW", help=" ".join(SIZES) + " by default")
    args = parser.parse_args()
    names = args.names or sorted(timm.list_models("dat_*"), key=parameters)
    # A process that ends gives all its memory back; a fork need not import torch again.
    context = multiprocessing.get_context("fork")
    failed = []
    # Cheap cases first.
    for case in product(args.sizes, names, (False, True)):
        process = context.Process(target=check, args=case)
        process.start()
        process.join()
        if process.exitcode:
            failed.append(case)
            if process.exitcode < 0:
                print(f"FAILED {case}: killed by signal {-process.exitcode}", flush=True)
    cases = len(names) * 2 * len(args.sizes)
    print(f"{cases - len(failed)} of {cases} cases ok")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
