"""Raw calls, torch.ops.dat.*, with arguments that do not fit together: an error, never a read out of bounds."""

import pytest
import torch

from dat import ops

pytestmark = pytest.mark.skipif(bool(ops.MISSING["_C_cpu"]), reason="the CPU library was not built")

HUGE = 2**40


def sample_arguments():
    """Positional arguments of deform_sample: two levels, 8 heads of 4 channels, 5 queries, 3 points."""
    value, locations, weights = torch.rand(2, 10, 8, 4), torch.rand(2, 5, 8, 2, 3, 2), torch.rand(2, 5, 8, 2, 3)
    return [value, locations, weights, [2, 3, 4, 1], False]


def points_arguments():
    value, reference = torch.rand(2, 10, 8, 4), torch.rand(2, 5, 2, 4)
    return [value, reference, torch.rand(2, 5, 8, 2, 3, 2), torch.rand(2, 5, 8, 2, 3), [2, 3, 4, 1]]


def attention_arguments():
    query, key = torch.rand(2, 4, 6, 8), torch.rand(2, 4, 5, 8)
    return [query, key, key.clone(), torch.rand(2, 4, 5, 2), torch.rand(4, 3, 5), [2, 3], 0.5, True]


def neighborhood_arguments():
    query = torch.rand(2, 4, 42, 8)
    return [query, query.clone(), query.clone(), torch.rand(4, 5, 5), 7, 6, 3, 2, 0.5]


def backward_arguments(name):
    """Arguments of the backward op: the gradient first, then those of the forward with what that returned."""
    args = ARGUMENTS[name]()
    out = getattr(torch.ops.dat, name)(*args)
    if name == "deform_attn":
        return [torch.rand_like(out[0]), *args[:5], *out, *args[5:]]
    # with_reference and deterministic of the sampling ops.
    options = {"deform_sample": [False], "ms_deform_attn": [True, False]}.get(name, [])
    return [torch.rand_like(out), *args, *options]


ARGUMENTS = {
    "deform_sample": sample_arguments,
    "ms_deform_attn": points_arguments,
    "deform_attn": attention_arguments,
    "neighborhood_attn": neighborhood_arguments,
}
# Other values of arguments that are not tensors, by op and position, and the error.
NUMBERS = [
    ("deform_sample", 3, [2, 3, 4], "shapes must be"),
    ("deform_sample", 3, [2, 3, 4, 2], "S = 10"),
    ("deform_sample", 3, [-2, -3, 4, 1], "sizes must be at least 0"),
    ("deform_sample", 3, [0, HUGE, 10, 1], "sizes must be at least 0"),
    ("deform_sample", 3, [5, 2], "locations must be"),
    ("ms_deform_attn", 4, [], "S = 10"),
    ("ms_deform_attn", 4, [10, 1, 0, 3, 0, 0], "offsets must be"),
    ("deform_attn", 5, [6], "size must be"),
    ("deform_attn", 5, [-2, -3], "sizes must be at least 0"),
    ("deform_attn", 5, [3, 3], "query must be"),
    ("neighborhood_attn", 4, 8, "query must be"),
    ("neighborhood_attn", 4, 0, "height and width must be"),
    ("neighborhood_attn", 4, -7, "sizes must be at least 0"),
    ("neighborhood_attn", 4, HUGE, "sizes must be at least 0"),
    ("neighborhood_attn", 6, 0, "kernel_size must be odd"),
    ("neighborhood_attn", 6, 2, "kernel_size must be odd"),
    ("neighborhood_attn", 6, HUGE + 1, "height and width must be"),
    ("neighborhood_attn", 7, 0, "dilation must be"),
    ("neighborhood_attn", 7, 3, "height and width must be"),
]


# (position, dimension) of arguments whose size fits whatever it is.
FREE = {
    "deform_sample": {(0, 3)},
    "ms_deform_attn": {(0, 3)},
    "deform_attn": {(4, 1), (4, 2)},
    "deform_attn_backward": {(5, 1), (5, 2)},
}


def changes(tensor, position, free):
    """The tensor in other shapes and dtypes, each of which some other argument forbids."""
    yield tensor[0]
    yield tensor.unsqueeze(0)
    yield tensor.new_zeros(())
    yield tensor.to(torch.float64)
    yield tensor.long()
    for dim, size in enumerate(tensor.shape):
        if (position, dim) not in free:
            for other in (0, size - 1, size + 1):
                yield tensor.new_zeros(*tensor.shape[:dim], other, *tensor.shape[dim + 1 :])


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("op", ARGUMENTS)
def test_tensors_that_do_not_fit_are_refused(op, backward):
    args = backward_arguments(op) if backward else ARGUMENTS[op]()
    name = f"{op}_backward" if backward else op
    call = getattr(torch.ops.dat, name)
    call(*args)
    for position, tensor in enumerate(args):
        if isinstance(tensor, torch.Tensor):
            for changed in changes(tensor, position, FREE.get(name, ())):
                with pytest.raises(RuntimeError, match=f"{op}: "):
                    call(*args[:position], changed, *args[position + 1 :])


@pytest.mark.parametrize(("name", "position", "value", "message"), NUMBERS)
def test_numbers_that_do_not_fit_are_refused(name, position, value, message):
    args = ARGUMENTS[name]()
    args[position] = value
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(torch.ops.dat, name)(*args)
    args = backward_arguments(name)
    args[position + 1 + 2 * (name == "deform_attn")] = value
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(torch.ops.dat, f"{name}_backward")(*args)


def test_groups_that_do_not_divide_the_heads_are_refused():
    for groups in (0, 3):
        args = attention_arguments()
        args[3] = torch.rand(2, groups, 5, 2)
        with pytest.raises(RuntimeError, match=f"divisor of 4 heads as groups, got {groups}"):
            torch.ops.dat.deform_attn(*args)


def test_the_message_names_the_argument_and_both_shapes():
    args = sample_arguments()
    args[2] = torch.rand(2, 5, 8, 2, 4)
    with pytest.raises(RuntimeError, match=r"deform_sample: weights must be \[2, 5, 8, 2, 3\], got \[2, 5, 8, 2, 4\]"):
        torch.ops.dat.deform_sample(*args)
