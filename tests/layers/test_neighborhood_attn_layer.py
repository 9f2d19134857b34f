import pytest
import torch
from torch.nn import functional as F

from dat.layers import NeighborhoodAttention
from dat.ops import reference


def make_layer(embed_dims=12, num_heads=3, **options):
    torch.manual_seed(0)
    return NeighborhoodAttention(embed_dims, num_heads, dtype=torch.float64, **options)


def by_hand(layer, x):
    """The layer's definition: pad, project, attend, crop, project."""
    B, H, W, C = x.shape
    window = layer.kernel_size * layer.dilation
    x = F.pad(x, (0, 0, 0, max(window - W, 0), 0, max(window - H, 0)))
    size = x.shape[1], x.shape[2]
    q, k, v = layer.qkv(x).view(B, size[0] * size[1], 3, layer.num_heads, -1).permute(2, 0, 3, 1, 4)
    options = {"size": size, "kernel_size": layer.kernel_size, "dilation": layer.dilation}
    out = reference.neighborhood_attn(q, k, v, layer.rpb, scale=(C // layer.num_heads) ** -0.5, **options)
    return layer.proj(out.transpose(1, 2).reshape(B, *size, C)[:, :H, :W])


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("size", [(9, 11), (5, 5), (3, 12), (1, 9), (12, 1), (1, 1)])
def test_equals_its_definition(size, dilation):
    layer = make_layer(kernel_size=5, dilation=dilation)
    x = torch.randn(2, *size, 12, dtype=torch.float64, requires_grad=True)
    out, expected = layer(x), by_hand(layer, x)
    torch.testing.assert_close(out, expected)
    leaves = (x, *layer.parameters())
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y in (out, expected))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_padding_is_attended_to_with_the_bias_of_the_projection():
    """As the official code, which pads before it projects; padding of zero keys would give something else."""
    layer = make_layer(kernel_size=5)
    x = torch.randn(1, 2, 3, 12, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.qkv.bias[-1] += 1.0
    assert not torch.allclose(before, layer(x))
    keys = layer.qkv(torch.zeros(1, 12, dtype=torch.float64))[0, 12:24]
    torch.testing.assert_close(keys, layer.qkv.bias[12:24])


def test_parameters_have_the_names_and_shapes_of_nattens():
    shapes = {name: tuple(p.shape) for name, p in make_layer(kernel_size=7).named_parameters()}
    assert shapes == {
        "rpb": (3, 13, 13),
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }


def test_without_bias_of_the_projection():
    layer = make_layer(qkv_bias=False, kernel_size=3)
    assert layer.qkv.bias is None
    x = torch.randn(1, 5, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_hand(layer, x))


def test_an_image_alone_equals_itself_in_a_batch():
    layer = make_layer(kernel_size=3)
    x = torch.randn(3, 7, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))


def test_dropout_of_the_projection_is_for_training_alone():
    layer = make_layer(kernel_size=3, proj_drop=0.5)
    x = torch.randn(1, 7, 6, 12, dtype=torch.float64)
    assert (layer(x) == 0).any()
    assert not (layer.eval()(x) == 0).any()


def test_compiles_whole():
    torch.compiler.reset()
    layer = make_layer(kernel_size=3)
    x = torch.randn(2, 7, 6, 12, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dims": 10, "num_heads": 3}, "embed_dims must be a multiple of num_heads = 3, got 10"),
        ({"embed_dims": 9, "num_heads": 3, "kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
        ({"embed_dims": 9, "num_heads": 3, "dilation": 0}, "dilation must be at least 1, got 0"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(**arguments)
