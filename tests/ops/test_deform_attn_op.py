from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from ops import samples
from ops.samples import close_where_finite, every_device, opcheck

from benchmarks.timing import peak_bytes
from dat.ops import deform_attn, reference

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
close = partial(samples.close, least=1.0)


@dataclass(frozen=True)
class Sample:
    """Arguments of one call; positions reach beyond -1..1 by `reach`."""

    name: str
    B: int = 2
    h: int = 4
    g: int = 2
    c: int = 8
    size: tuple[int, int] = (5, 7)
    N: int = 9
    table: tuple[int, int] | None = (9, 13)
    align_corners: bool = True
    dtype: torch.dtype = torch.float32
    contiguous: bool = True
    reach: float = 1.3

    def tensors(self, device="cpu"):
        """Query, key, value, positions and, unless None, the table."""
        generator = torch.Generator().manual_seed(0)
        real = torch.float64 if self.dtype == torch.float64 else torch.float32

        def draw(*shape, dtype):
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            return drawn if self.contiguous else drawn.transpose(1, 2).contiguous().transpose(1, 2)

        (H, W), heads = self.size, (self.B, self.h)
        tensors = [draw(*heads, n, self.c, dtype=self.dtype) for n in (H * W, self.N, self.N)]
        positions = torch.rand(self.B, self.g, self.N, 2, generator=generator, dtype=torch.float64) * 2 - 1
        tensors.append((positions * self.reach).to(real))
        if self.table:
            tensors.append(draw(self.h, *self.table, dtype=real))
        return [t.to(device) for t in tensors]

    @property
    def kwargs(self):
        return {"size": self.size, "scale": 0.4, "align_corners": self.align_corners}


SHAPES = [
    Sample("own-table"),
    Sample("own-table-2022", align_corners=False),
    Sample("smaller-table", size=(20, 33), table=(5, 7), N=65, c=32),
    Sample("smaller-table-2022", size=(20, 33), table=(5, 7), N=65, c=32, align_corners=False),
    Sample("larger-table", size=(4, 33), table=(11, 150), N=5),
    Sample("own-table-many", size=(20, 33), table=(39, 65), N=130, c=32, h=2, g=1),
    Sample("far-positions", reach=500.0),
    Sample("one-cell-table", table=(1, 1)),
    Sample("two-cell-table", table=(2, 2), reach=5.0),
    Sample("one-row", size=(1, 7), table=(1, 13), c=3, N=4),
    Sample("one-row-2022", size=(1, 7), table=(3, 5), c=3, N=4, align_corners=False),
    Sample("one-column", size=(7, 1), table=(13, 1), c=3, N=4),
    Sample("one-column-other-table", size=(7, 1), table=(13, 9), c=33, N=4),
    Sample("one-query", size=(1, 1), table=(3, 3)),
    Sample("one-key", N=1),
    Sample("group-per-head", g=4),
    Sample("one-group", g=1, c=96),
    Sample("one-channel", c=1),
    Sample("no-table", table=None),
    Sample("strided", contiguous=False),
    Sample("batch-0", B=0),
    Sample("batch-33", B=33, h=2, g=1, N=3),
    Sample("no-keys", N=0),
    Sample("no-channels", c=0),
    # channels side by side, so that the CPU's kernels read and write rows where they lie
    Sample("strided-rows", size=(9, 15), table=(17, 29), N=70, c=32, h=2, g=1, contiguous=False),
]
SAMPLES = [
    replace(s, name=f"{s.name}-{dtype}", dtype=dtype) for s in SHAPES for dtype in (torch.float64, torch.float32)
]
SAMPLES += [replace(SHAPES[i], name=f"{SHAPES[i].name}-{d}", dtype=d) for i in (0, 2) for d in list(TOLERANCE)[2:]]
# Of these the dispatch of the compiler is checked, which takes seconds.
DISPATCHED = ("own-table-torch.float64", "own-table-torch.bfloat16", "own-table-2022-torch.float32",
              "no-table-torch.float32", "strided-torch.float32", "batch-0-torch.float32")  # fmt: skip
every_sample = pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)


def differentiated(function, tensors, sample, grad):
    """Output of `function` and gradients by everything that it depends on."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, **sample.kwargs)
    used = leaves if sample.table else leaves[:3]
    return out.detach(), *torch.autograd.grad(out, used, grad.to(out))


def output_gradient(sample, device="cpu"):
    H, W = sample.size
    numbers = torch.linspace(-1, 1, sample.B * sample.h * H * W * sample.c, device=device, dtype=torch.float64)
    return numbers.view(sample.B, sample.h, H * W, sample.c).sin().to(sample.dtype)


def bias_of_pairs(table, positions, size, align_corners):
    """The definition, pair by pair: a bilinear look-up at half the displacement, zero outside the table."""
    (H, W), (B, groups, N, _) = size, positions.shape
    heads, T_h, T_w = table.shape
    bias = torch.zeros(B, heads, H * W, N, dtype=table.dtype)

    def grid(i, length):
        return i / max(length - 1, 1) * 2 - 1 if align_corners else (i + 0.5) / length * 2 - 1

    def cell(head, row, column):
        return table[head, row, column] if 0 <= row < T_h and 0 <= column < T_w else 0.0

    for b, head, q, n in torch.cartesian_prod(*(torch.arange(k) for k in (B, heads, H * W, N))).tolist():
        x, y = positions[b, head // (heads // groups), n].tolist()
        column = ((grid(q % W, W) - x) / 2 + 1) / 2 * (T_w - 1)
        row = ((grid(q // W, H) - y) / 2 + 1) / 2 * (T_h - 1)
        j, i = int(column // 1), int(row // 1)
        u, v = column - j, row - i
        top = (1 - u) * cell(head, i, j) + u * cell(head, i, j + 1)
        bottom = (1 - u) * cell(head, i + 1, j) + u * cell(head, i + 1, j + 1)
        bias[b, head, q, n] = (1 - v) * top + v * bottom
    return bias


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "table_size"), [((3, 4), (5, 7)), ((1, 4), (1, 7)), ((2, 5), (9, 3))])
def test_deform_attn_equals_its_definition(size, table_size, align_corners):
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1

    B, heads, groups, N, c = 2, 4, 2, 3, 5
    query = rand(B, heads, size[0] * size[1], c)
    key, value, positions = rand(B, heads, N, c), rand(B, heads, N, c), rand(B, groups, N, 2) * 1.2
    table = rand(heads, *table_size)
    kwargs = {"size": size, "scale": 0.3, "align_corners": align_corners}
    bias = bias_of_pairs(table, positions, size, align_corners)
    expected = (query @ key.transpose(-1, -2) * 0.3 + bias).softmax(-1) @ value
    torch.testing.assert_close(deform_attn(query, key, value, positions, table, **kwargs), expected)
    plain = (query @ key.transpose(-1, -2) * 0.3).softmax(-1) @ value
    torch.testing.assert_close(deform_attn(query, key, value, positions, **kwargs), plain)


@every_device
@every_sample
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_gradients_equal_the_reference_in_float64(sample, device):
    tensors, grad = sample.tensors(device), output_gradient(sample, device)
    ours = differentiated(deform_attn, tensors, sample, grad)
    assert ours[0].dtype == sample.dtype
    exact = differentiated(reference.deform_attn, [t.double() for t in tensors], sample, grad)
    for by_ours, by_reference in zip(ours, exact, strict=True):
        close(by_ours, by_reference, TOLERANCE[sample.dtype])
    # The backward that second derivatives go through.
    backward = reference.deform_attn_backward(grad.double(), *(t.double() for t in tensors), **sample.kwargs)
    for by_formula, by_reference in zip(backward, exact[1:], strict=False):
        close(by_formula, by_reference, 1e-12)


@every_device
@pytest.mark.parametrize("align_corners", [True, False])
def test_gradients_at_kinks_are_those_of_grid_sample(align_corners, device):
    """Keys on queries, and on the border of the table: every look-up is at a cell's centre, exactly."""
    sample = Sample("kinks", size=(5, 9), table=(9, 17), N=45, dtype=torch.float64, align_corners=align_corners)
    tensors, grad = sample.tensors(device), output_gradient(sample, device)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 5), torch.linspace(-1, 1, 9), indexing="ij")
    tensors[3] = torch.stack((x, y), -1).flatten(0, 1).expand(2, 2, -1, -1).to(tensors[3])
    ours = differentiated(deform_attn, tensors, sample, grad)
    exact = differentiated(reference.deform_attn, tensors, sample, grad)
    for by_ours, by_reference in zip(ours, exact, strict=True):
        close(by_ours, by_reference, 1e-12)


@every_device
def test_positions_that_are_not_numbers_have_no_bias(device):
    sample = Sample("not-finite")
    tensors = sample.tensors(device)
    tensors[3][0, 0, :3, 0] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    far = [*tensors[:3], tensors[3].nan_to_num(1e6, 1e6, -1e6), tensors[4]]
    ours, expected = (differentiated(deform_attn, t, sample, output_gradient(sample, device)) for t in (tensors, far))
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


def check_table(attend, sample, bad):
    """Output and gradients beside the reference's where the table holds `bad`, and where whole blocks of keys do."""
    *tensors, table = sample.tensors()
    # Keys on a line below and above the map, and in its middle.
    tensors[3][..., 1] = torch.linspace(-1.23, 1.21, sample.N)
    corner, row = table.clone(), table.clone()
    corner[0, 3, 4] = row[0, -sample.table[0] // 3 :] = bad
    for spoiled in (corner, row):
        inputs = [*tensors, spoiled]
        grad = output_gradient(sample)
        exact = differentiated(reference.deform_attn, [t.double() for t in inputs], sample, grad)
        out, by_query, by_key, by_value, _, by_table = attend(inputs, grad)
        assert torch.equal(out.isfinite().all(-1).cpu(), exact[0].isfinite().all(-1))
        for ours, theirs in zip((out, by_query, by_key, by_value, by_table), (*exact[:4], exact[5]), strict=True):
            close_where_finite(ours, theirs, TOLERANCE[sample.dtype])


TABLES = [
    Sample("own-table", B=1, h=2, g=1),
    Sample("other-table", B=1, h=2, g=1, size=(9, 20), table=(6, 9), N=150, align_corners=False),
    Sample("more-keys", B=1, h=2, g=1, size=(9, 20), table=(17, 39), N=150),
]


@every_device
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sample", TABLES, ids=lambda sample: sample.name)
def test_a_table_that_is_not_finite_reaches_the_queries_that_look_it_up(sample, dtype, bad, device):
    sample = replace(sample, dtype=dtype)

    def attend(tensors, grad):
        return differentiated(deform_attn, [t.to(device) for t in tensors], sample, grad.to(device))

    check_table(attend, sample, bad)


@every_device
@pytest.mark.parametrize("change", [{}, {"align_corners": False, "table": (4, 5)}, {"table": None}])
def test_gradcheck_once_and_twice(change, device):
    sample = replace(Sample("check", B=1, h=2, g=1, c=2, size=(2, 3), N=3, table=(3, 5), dtype=torch.float64), **change)
    leaves = [t.requires_grad_() for t in sample.tensors(device)]
    leaves, rest = (leaves, []) if sample.table else (leaves[:3], [leaves[3].detach()])

    def attend(*tensors):
        return deform_attn(*tensors, *rest, **sample.kwargs)

    assert torch.autograd.gradcheck(attend, leaves)
    assert torch.autograd.gradgradcheck(attend, leaves)


@every_device
@every_sample
@pytest.mark.usefixtures("poisoned_memory")
def test_opcheck_of_forward_and_backward(sample, device):
    tensors = sample.tensors(device)
    tensors = [t.requires_grad_() for t in (tensors if sample.table else tensors[:3])]
    tensors += [] if sample.table else [sample.tensors(device)[3], None]
    options = list(sample.size), 0.4, sample.align_corners
    opcheck(
        torch.ops.dat.deform_attn,
        (*tensors, *options),
        dispatch=sample.name in DISPATCHED,
        atol=TOLERANCE[sample.dtype],
    )
    if sample.dtype == torch.float64 and sample.name.startswith(("own-table-torch", "no-table", "strided-rows")):
        out, lse = (t.detach() for t in torch.ops.dat.deform_attn(*tensors, *options))
        args = output_gradient(sample, device), *tensors, out, lse, *options
        torch.library.opcheck(torch.ops.dat.deform_attn_backward, args)


@pytest.mark.parametrize("threads", [1, 2, 5, 13])
@pytest.mark.parametrize("sample", [SAMPLES[4], SAMPLES[10]], ids=lambda sample: sample.name)
def test_gradients_with_any_number_of_threads(sample, threads):
    tensors, grad = sample.tensors(), output_gradient(sample)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        ours = differentiated(deform_attn, tensors, sample, grad)
        again = differentiated(deform_attn, tensors, sample, grad)
    finally:
        torch.set_num_threads(before)
    exact = differentiated(reference.deform_attn, [t.double() for t in tensors], sample, grad)
    for by_ours, repeated, by_reference in zip(ours, again, exact, strict=True):
        assert torch.equal(by_ours, repeated)
        close(by_ours, by_reference, TOLERANCE[sample.dtype])


def test_large_scores_do_not_overflow():
    sample = Sample("large")
    query, *others = sample.tensors()
    out = deform_attn(query * 1e4, *others, **sample.kwargs)
    exact = reference.deform_attn(*(t.double() for t in (query * 1e4, *others)), **sample.kwargs)
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sample", [SHAPES[0], SHAPES[2], SHAPES[18]], ids=lambda sample: sample.name)
def test_compiled_equals_eager(sample):
    def attend(*tensors):
        return deform_attn(*tensors, **sample.kwargs)

    tensors = sample.tensors()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    ours, eager = ([t.detach().requires_grad_() for t in tensors] for _ in range(2))
    compiled(*ours).sum().backward()
    attend(*eager).sum().backward()
    for one, other in zip(ours, eager, strict=True):
        assert torch.equal(one.grad, other.grad) if other.grad is not None else one.grad is None


@every_device
def test_vmap_and_batched_gradients_equal_a_loop(device):
    sample = Sample("vmap", dtype=torch.float64)
    query, *others = (t.requires_grad_() for t in sample.tensors(device))
    tables = torch.stack((others[-1], -others[-1], others[-1] * 2))
    mapped = torch.vmap(lambda t: deform_attn(query, *others[:-1], t, **sample.kwargs))(tables)
    alone = [deform_attn(query, *others[:-1], t, **sample.kwargs) for t in tables]
    torch.testing.assert_close(mapped, torch.stack(alone))
    out = deform_attn(query, *others, **sample.kwargs)
    grads = torch.stack((torch.ones_like(out), torch.full_like(out, -2)))
    batched = torch.autograd.grad(out, (query, *others), grads, is_grads_batched=True, retain_graph=True)
    for k, grad in enumerate(grads):
        for ours, theirs in zip(
            batched, torch.autograd.grad(out, (query, *others), grad, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(ours[k], theirs)


@every_device
def test_autocast_takes_half_precision_queries(device):
    sample = Sample("autocast")
    tensors = sample.tensors(device)
    half = [t.bfloat16() for t in tensors[:3]]
    with torch.autocast(device, dtype=torch.bfloat16):
        out = deform_attn(half[0], *tensors[1:], **sample.kwargs)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, deform_attn(*half, *tensors[3:], **sample.kwargs))


@pytest.mark.parametrize("table", [(127, 127), (27, 27)])
def test_memory_is_a_fraction_of_the_scores(table):
    """Scores, bias and displacements of the official formulation are each as large as `scores` or larger."""
    sample = Sample("memory", B=1, h=4, g=2, size=(64, 64), N=1024, c=8, table=table)
    tensors, grad = sample.tensors(), output_gradient(sample)
    scores = 4 * 64 * 64 * 1024 * 4
    differentiated(deform_attn, tensors, sample, grad)
    run = partial(differentiated, deform_attn, tensors, sample, grad)
    # Other threads of the process may allocate meanwhile, which only adds.
    peaks = [peak_bytes(run, torch.device("cpu")) for _ in range(3)]
    assert None in peaks or min(peaks) < scores / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (3, 3)}, "query must have H.W = 9"),
        ({"key": torch.zeros(1, 2, 3, 5)}, "key and value must be"),
        ({"positions": torch.zeros(1, 3, 3, 2)}, "positions must be"),
        ({"table": torch.zeros(3, 3, 3)}, "table must be"),
        ({"table": torch.zeros(2, 0, 3)}, "table must be .* not empty"),
        ({"query": torch.zeros(2, 4, 4)}, "query must be"),
        ({"query": torch.zeros(1, 2, 4, 4).long()}, "query must be float32"),
        ({"value": torch.zeros(1, 2, 3, 4).double()}, "key and value must be torch.float32"),
        ({"positions": torch.zeros(1, 1, 3, 2).half()}, "positions must be float32 or float64"),
        ({"positions": torch.zeros(1, 1, 3, 2, device="meta")}, "positions must be on the device of query"),
    ],
)
def test_deform_attn_errors_name_the_argument(change, message):
    args = {
        "query": torch.zeros(1, 2, 4, 4),
        "key": torch.zeros(1, 2, 3, 4),
        "value": torch.zeros(1, 2, 3, 4),
        "positions": torch.zeros(1, 1, 3, 2),
        "size": (2, 2),
        "scale": 1.0,
    }
    with pytest.raises((TypeError, ValueError), match=message):
        deform_attn(**{**args, **change})
