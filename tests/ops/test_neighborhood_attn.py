import importlib
from dataclasses import dataclass, field, replace

import pytest
import torch
from ops.samples import close, close_where_finite, every_device, opcheck
from torch.utils.flop_counter import FlopCounterMode

from dat.ops import neighborhood_attn, reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Sample:
    """Arguments of one call."""

    B: int = 2
    h: int = 3
    c: int = 8
    size: tuple[int, int] = (9, 11)
    kernel_size: int = 3
    dilation: int = 1
    dtype: torch.dtype = torch.float32
    biased: bool = True
    contiguous: bool = True
    device: str = "cpu"
    name: str = field(default="", compare=False)

    def tensors(self):
        """Query, key, value and bias, in float64 for float64 and else float32; without a bias the first three."""
        generator = torch.Generator().manual_seed(0)
        layout = (self.B, self.h, self.size[0] * self.size[1], self.c)
        cells = torch.randn(3, *layout, generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        if not self.contiguous:
            cells = cells.transpose(1, -1).contiguous().transpose(1, -1)
        real = torch.float64 if self.dtype == torch.float64 else torch.float32
        side = 2 * self.kernel_size - 1
        bias = torch.randn(self.h, side, side, generator=generator, dtype=torch.float64).to(self.device, real)
        return [*(t.clone(memory_format=torch.preserve_format) for t in cells), *([bias] if self.biased else [])]

    def leaves(self):
        return [t.requires_grad_() for t in self.tensors()]

    def options(self):
        return {"size": self.size, "kernel_size": self.kernel_size, "scale": 0.4, "dilation": self.dilation}

    def numbers(self):
        """The numbers of the op behind the function."""
        return *self.size, self.kernel_size, self.dilation, 0.4

    def padded(self):
        return min(self.size) < self.kernel_size * self.dilation


SAMPLES = [
    *(Sample(dtype=dtype, name=f"{dtype}") for dtype in DTYPES),
    *(Sample(dtype=dtype, contiguous=False, name=f"strided-{dtype}") for dtype in DTYPES),
    *(Sample(kernel_size=k, size=(19, 23), name=f"kernel-{k}") for k in (1, 5, 7, 9, 13)),
    *(Sample(dilation=d, size=(19, 14), dtype=dtype, name=f"dilation-{d}-{dtype}") for d in (2, 3) for dtype in DTYPES),
    *(Sample(c=c, dtype=dtype, name=f"c{c}-{dtype}") for c in (1, 24, 32, 33) for dtype in DTYPES[::2]),
    Sample(biased=False, name="no-bias"),
    Sample(biased=False, dilation=2, size=(13, 37), name="no-bias-dilation"),
    Sample(h=1, size=(40, 50), kernel_size=7, name="several-bands-and-registers"),
    Sample(h=1, size=(43, 20), kernel_size=5, name="bands-of-different-rows"),
    Sample(h=1, size=(61, 33), kernel_size=5, dilation=2, c=16, name="several-bands-of-a-dilation"),
    Sample(B=0, name="batch-0"),
    Sample(h=0, name="no-heads"),
    Sample(c=0, name="no-channels"),
    Sample(size=(0, 5), name="no-rows"),
    Sample(size=(3, 3), name="one-window"),
    Sample(size=(3, 40), name="as-high-as-a-window"),
    Sample(size=(40, 3), name="as-wide-as-a-window"),
    Sample(size=(1, 20), kernel_size=5, name="one-row"),
    Sample(size=(20, 1), kernel_size=5, dtype=torch.float64, name="one-column"),
    Sample(size=(1, 1), kernel_size=7, dtype=torch.bfloat16, name="one-cell"),
    Sample(size=(4, 30), kernel_size=3, dilation=2, name="lower-than-a-dilated-window"),
]

# Of these the dispatch of the compiler is checked, which takes seconds.
DISPATCHED = ("torch.float64", "torch.float32", "torch.bfloat16", "strided-torch.float32", "no-bias", "batch-0",
              "dilation-2-torch.float32")  # fmt: skip
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def neighbors_along(length, kernel_size, dilation):
    """Of each cell the nearest cells at multiples of the dilation, in order."""
    return [
        sorted(sorted(range(i % dilation, length, dilation), key=lambda j: abs(j - i))[:kernel_size])
        for i in range(length)
    ]


def pair_loop(query, key, value, bias, size, kernel_size, scale, dilation):
    """One query at a time, one neighbour at a time."""
    rows, columns = (neighbors_along(length, kernel_size, dilation) for length in size)
    out = []
    for i in range(size[0]):
        for j in range(size[1]):
            cells, scores = [], []
            for y in rows[i]:
                for x in columns[j]:
                    dy, dx = (y - i) // dilation + kernel_size - 1, (x - j) // dilation + kernel_size - 1
                    score = (query[:, :, i * size[1] + j] * key[:, :, y * size[1] + x]).sum(-1) * scale
                    scores.append(score + bias[:, dy, dx])
                    cells.append(value[:, :, y * size[1] + x])
            attention = torch.stack(scores, -1).softmax(-1)
            out.append((attention.unsqueeze(-1) * torch.stack(cells, 2)).sum(2))
    return torch.stack(out, 2)


@every_device
@pytest.mark.parametrize(
    ("size", "kernel_size", "dilation"),
    [
        ((3, 3), 3, 1),
        ((5, 8), 5, 1),
        ((8, 9), 7, 1),
        ((7, 9), 3, 2),
        ((10, 11), 3, 3),
        ((10, 13), 5, 2),
        ((4, 3), 1, 2),
    ],
)
def test_forward_and_gradients_equal_a_loop_over_pairs(size, kernel_size, dilation, device):
    sample = Sample(1, 2, 3, size, kernel_size, dilation, torch.float64, device=device)
    leaves = sample.leaves()
    out = neighborhood_attn(*leaves, **sample.options())
    exact = pair_loop(*leaves, *(sample.options()[key] for key in ("size", "kernel_size", "scale", "dilation")))
    close(out, exact, 1e-12)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=device).view(out.shape)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, grad), torch.autograd.grad(exact, leaves, grad), strict=True
    ):
        close(ours, theirs, 1e-12)


def padded_reference(sample, query, key, value, bias=None):
    """The reference on a map filled up with cells of zeros."""
    H, W = sample.size
    down, right = (max(sample.kernel_size * sample.dilation - length, 0) for length in sample.size)

    def pad(tensor):
        cells = tensor.unflatten(2, sample.size)
        cells = torch.cat((cells, cells.new_zeros(*cells.shape[:3], right, cells.shape[-1])), 3)
        return torch.cat((cells, cells.new_zeros(*cells.shape[:2], down, *cells.shape[3:])), 2).flatten(2, 3)

    size = (H + down, W + right)
    out = reference.neighborhood_attn(pad(query), pad(key), pad(value), bias, **{**sample.options(), "size": size})
    return out.unflatten(2, size)[:, :, :H, :W].flatten(2, 3)


@every_device
@every_sample
def test_forward_and_gradients_equal_the_reference_in_float64(sample, device):
    leaves = replace(sample, device=device).leaves()
    out = neighborhood_attn(*leaves, **sample.options())
    assert out.dtype == sample.dtype
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    ours = torch.autograd.grad(out, leaves, grad)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = padded_reference(sample, *wide)
    close(out, exact, TOLERANCE[sample.dtype])
    theirs = torch.autograd.grad(exact, wide, grad.double())
    # The scores of a single neighbour do not matter: gradients by them are zero, and close to it in the kernels.
    for by_ours, by_reference, leaf in zip(ours, theirs, leaves, strict=True):
        assert by_ours.dtype == leaf.dtype
        if sample.kernel_size > 1 or by_reference.abs().sum() > 1e-9:
            close(by_ours, by_reference, TOLERANCE[sample.dtype])
        else:
            assert by_ours.abs().max() <= 1e-5


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("biased", [True, False])
def test_reference_backward_is_the_derivative_of_the_reference(biased, dilation):
    sample = Sample(1, 2, 3, (6, 7), 3, dilation, torch.float64, biased)
    leaves = sample.leaves()
    out = reference.neighborhood_attn(*leaves, **sample.options())
    grad = torch.randn(out.shape, dtype=torch.float64)
    query, key, value, *bias = leaves
    theirs = reference.neighborhood_attn_backward(grad, query, key, value, *(bias or [None]), **sample.options())
    for by_autograd, by_hand in zip(torch.autograd.grad(out, leaves, grad), theirs, strict=False):
        close(by_hand, by_autograd, 1e-12)


@every_device
@pytest.mark.parametrize(
    "sample",
    [
        Sample(1, 2, 2, (3, 5), name="kernel"),
        Sample(1, 1, 2, (6, 6), dilation=2, biased=False, name="dilation"),
        Sample(1, 1, 2, (3, 3), name="one-window"),
        Sample(1, 1, 2, (2, 4), name="padded"),
    ],
    ids=lambda sample: sample.name,
)
def test_gradcheck_once_and_twice(sample, device):
    leaves = replace(sample, dtype=torch.float64, device=device).leaves()

    def attend(*tensors):
        return neighborhood_attn(*tensors, **sample.options())

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


@every_device
@pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.padded()], ids=lambda sample: sample.name)
def test_opcheck_of_forward_and_backward(sample, device):
    leaves = replace(sample, device=device).leaves()
    args = (*leaves, *(() if sample.biased else (None,)), *sample.numbers())
    opcheck(torch.ops.dat.neighborhood_attn, args, dispatch=sample.name in DISPATCHED, atol=TOLERANCE[sample.dtype])
    if sample.dtype == torch.float64:
        grad = torch.randn(leaves[0].shape, dtype=torch.float64, device=device)
        torch.library.opcheck(torch.ops.dat.neighborhood_attn_backward, (grad, *args))


@pytest.mark.parametrize("threads", [2, 5, 13])
@pytest.mark.parametrize("dilation", [1, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads, dilation):
    sample = Sample(h=2, size=(45, 20), kernel_size=5, dilation=dilation)
    leaves = sample.leaves()
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            out = neighborhood_attn(*leaves, **sample.options())
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


def test_views_of_a_projection_equal_copies():
    qkv = torch.randn(2, 99, 3, 3, 8).permute(2, 0, 3, 1, 4)
    bias = torch.randn(3, 5, 5)
    views = [t.requires_grad_() for t in qkv.unbind(0)]
    copies = [t.detach().contiguous().requires_grad_() for t in views]
    outs = [neighborhood_attn(*cells, bias, **Sample().options()) for cells in (views, copies)]
    assert torch.equal(*outs)
    grads = [torch.autograd.grad(out.square().sum(), cells) for out, cells in zip(outs, (views, copies), strict=True)]
    for by_view, by_copy in zip(*grads, strict=True):
        assert torch.equal(by_view, by_copy)


def test_expanded_gradient():
    leaves = Sample().leaves()
    out = neighborhood_attn(*leaves, **Sample().options())
    ones = torch.ones((), dtype=out.dtype)
    for by_expanded, by_full in zip(
        torch.autograd.grad(out, leaves, ones.expand(out.shape), retain_graph=True),
        torch.autograd.grad(out, leaves, torch.ones_like(out)),
        strict=True,
    ):
        assert torch.equal(by_expanded, by_full)


def test_large_scores_do_not_overflow():
    query, key, value, bias = Sample(kernel_size=5).tensors()
    out = neighborhood_attn(query * 300, key * 300, value, bias, **Sample(kernel_size=5).options())
    exact = reference.neighborhood_attn(
        query.double() * 300, key.double() * 300, value.double(), bias.double(), **Sample(kernel_size=5).options()
    )
    torch.testing.assert_close(out.double(), exact, atol=2e-2, rtol=0)


def test_a_query_sees_its_window_alone():
    sample = Sample(1, 1, 4, (9, 20), 5, dtype=torch.float64)
    query, key, value, bias = sample.tensors()
    value.requires_grad_()
    out = neighborhood_attn(query, key, value, bias, **sample.options())
    (by_value,) = torch.autograd.grad(out[0, 0, 1 * 20 + 18].sum(), value)
    seen = by_value[0, 0].abs().sum(-1).view(9, 20) > 0
    expected = torch.zeros(9, 20, dtype=torch.bool)
    expected[0:5, 15:20] = True
    assert torch.equal(seen, expected)


NOT_FINITE = (float("nan"), float("inf"), -float("inf"))


def check_spread(attend, sample, which, bad, pixels=None):
    """Output and gradients beside the reference's where a tensor (the last is the output's gradient) holds `bad`.

    It is in the first, the middle and the last pixel by turns, or in `pixels`.
    """
    tensors = sample.tensors()
    grad = torch.linspace(-1, 1, tensors[0].numel(), dtype=torch.float64).view(tensors[0].shape).to(sample.dtype)
    tensors.append(grad)
    H, W = sample.size
    for pixel in pixels or (0, H // 2 * W + W // 2, H * W - 1):
        spoiled = [tensor.clone() for tensor in tensors]
        # A channel of a pixel, or an entry of the bias.
        numbers = spoiled[which][0].view(-1) if which == 3 else spoiled[which][0, 0, :, 1]
        numbers[pixel % len(numbers)] = bad
        wide = [tensor.double() for tensor in spoiled]
        exact = reference.neighborhood_attn(*wide[:-1], **sample.options())
        exact_grads = reference.neighborhood_attn_backward(wide[-1], *wide[:-1], **sample.options())
        out, *grads = attend(*spoiled)
        close_where_finite(out, exact, TOLERANCE[sample.dtype])
        assert torch.equal(out.isfinite().all(-1).cpu(), exact.isfinite().all(-1))
        # The gradient of the bias is a sum over all pixels.
        for by_ours, by_reference in zip(grads[:3], exact_grads[:3], strict=True):
            close_where_finite(by_ours, by_reference, TOLERANCE[sample.dtype])


@every_device
@pytest.mark.parametrize("bad", NOT_FINITE)
@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize(
    "sample",
    [
        Sample(1, 2, 8, (9, 11), 3),
        Sample(1, 1, 8, (20, 40), 7),
        Sample(1, 1, 5, (13, 37), 3, 2),
        Sample(1, 1, 8, (9, 17), 5, dtype=torch.float64),
        Sample(1, 1, 8, (9, 17), 5, dtype=torch.bfloat16),
    ],
    ids=["small", "wide", "dilated", "float64", "bfloat16"],
)
def test_numbers_that_are_not_finite_reach_only_windows_that_hold_them(sample, which, bad, device):
    def attend(*tensors):
        *leaves, grad = (tensor.to(device).requires_grad_() for tensor in tensors)
        out = neighborhood_attn(*leaves, **sample.options())
        return out.detach(), *torch.autograd.grad(out, leaves, grad.detach())

    check_spread(attend, sample, which, bad)


@every_device
def test_autocast_takes_half_precision(device):
    sample = Sample(device=device)
    query, key, value, bias = sample.tensors()
    with torch.autocast(device, dtype=torch.bfloat16):
        out = neighborhood_attn(query, key, value, bias, **sample.options())
    assert out.dtype == torch.bfloat16
    expected = neighborhood_attn(query.bfloat16(), key.bfloat16(), value.bfloat16(), bias, **sample.options())
    assert torch.equal(out, expected)


@every_device
def test_sums_are_in_float32_under_autocast_in_a_map_as_large_as_a_window(device):
    """Products of matrices that autocast would round: errors add up, and float16 overflows."""
    sample = Sample(1, 2, 32, (7, 7), 7, device=device)
    query, key, value, bias = (tensor.half() for tensor in sample.tensors())
    results = []
    for enabled in (False, True):
        leaves = [tensor.clone().requires_grad_() for tensor in (60 * query, 60 * key, value, bias)]
        with torch.autocast(device, torch.float16, enabled=enabled):
            out = neighborhood_attn(*leaves, **sample.options())
        results.append([out, *torch.autograd.grad(out, leaves, torch.ones_like(out))])
    assert results[0][0].isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("kernel_size", "biased", "taken"), [(25, True, True), (27, True, False), (27, False, True)])
def test_windows_whose_gradients_fit_in_the_shared_memory_of_any_gpu(kernel_size, biased, taken, monkeypatch):
    query = torch.empty(1, 1, 784, 32, dtype=torch.bfloat16)
    module = importlib.import_module("dat.ops.neighborhood_attn")
    monkeypatch.setattr(module, "has_triton", lambda: True)
    assert module._has_triton_kernels(query, biased, kernel_size) == taken


@pytest.mark.parametrize("biased", [True, False])
def test_vmap_and_batched_gradients_equal_a_loop(biased):
    sample = Sample(dtype=torch.float64, biased=biased)
    query, key, value, *bias = leaves = sample.leaves()
    queries = torch.stack((query, query * 2, -query), 1)
    mapped = torch.vmap(lambda q: neighborhood_attn(q, key, value, *bias, **sample.options()), in_dims=1)(queries)
    alone = [neighborhood_attn(q, key, value, *bias, **sample.options()) for q in queries.unbind(1)]
    torch.testing.assert_close(mapped, torch.stack(alone))
    out = neighborhood_attn(*leaves, **sample.options())
    grads = torch.stack((torch.ones_like(out), torch.full_like(out, -2)))
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        for ours, theirs in zip(batched, alone, strict=True):
            torch.testing.assert_close(ours[k], theirs)


def test_compile_sees_through_at_sizes_not_known_beforehand():
    torch.compiler.reset()

    def attend(query, key, value, bias, H, W):
        cells = (t.flatten(2, 3) for t in (query, key, value))
        return neighborhood_attn(*cells, bias, size=(H, W), kernel_size=3, scale=0.4).square().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((9, 11), (12, 10)):
        query, key, value, bias = Sample(size=size).tensors()
        leaves = [
            *(t.unflatten(2, size).contiguous().requires_grad_() for t in (query, key, value)),
            bias.requires_grad_(),
        ]
        torch.testing.assert_close(
            torch.autograd.grad(compiled(*leaves, *size), leaves), torch.autograd.grad(attend(*leaves, *size), leaves)
        )


def test_flops_are_those_of_the_products():
    sample = Sample(size=(9, 11), kernel_size=5)
    leaves = sample.leaves()
    product = 2 * sample.B * sample.h * 9 * 11 * 25 * sample.c
    with FlopCounterMode(display=False) as counter:
        out = neighborhood_attn(*leaves, **sample.options())
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


Q, K, V, BIAS = Sample().tensors()
OPTIONS = Sample().options()


@pytest.mark.parametrize(
    ("error", "message", "args", "options"),
    [
        (ValueError, r"query must be \[B, h, 99, c\]", (Q[0], K, V), {}),
        (ValueError, r"query must be \[B, h, 90, c\] for size \(9, 10\)", (Q, K, V), {"size": (9, 10)}),
        (ValueError, r"key must be \(2, 3, 99, 8\)", (Q, K[:1], V), {}),
        (ValueError, r"value must be \(2, 3, 99, 8\)", (Q, K, V[..., :4]), {}),
        (TypeError, "value must be torch.float32", (Q, K, V.half()), {}),
        (TypeError, "query must be float32", (Q.long(), K.long(), V.long()), {}),
        (ValueError, r"bias must be \[3, 5, 5\]", (Q, K, V, BIAS[:, 1:]), {}),
        (TypeError, "bias must be floating point", (Q, K, V, BIAS.long()), {}),
        (ValueError, "bias must be on the device of query", (Q, K, V, BIAS.to("meta")), {}),
        (ValueError, "kernel_size must be odd and positive, got 4", (Q, K, V), {"kernel_size": 4}),
        (ValueError, "dilation must be at least 1, got 0", (Q, K, V), {"dilation": 0}),
    ],
)
def test_errors_name_the_argument(error, message, args, options):
    with pytest.raises(error, match=message):
        neighborhood_attn(*args, **{**OPTIONS, **options})
