import pytest
import torch

from dat.layers import MSDeformAttn

SHAPES = ((4, 6), (2, 3))


def layer(**kwargs):
    torch.manual_seed(0)
    layer = MSDeformAttn(embed_dim=16, num_levels=2, num_heads=4, num_points=3, **kwargs)
    torch.nn.init.normal_(layer.sampling_offsets.weight, std=0.3)
    torch.nn.init.normal_(layer.attention_weights.weight, std=0.3)
    return layer


def test_parameters_are_named_and_shaped_as_the_official_module():
    shapes = {name: tuple(p.shape) for name, p in MSDeformAttn(256, 4, 8, 4).named_parameters()}
    assert shapes == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_starts_with_heads_looking_in_eight_directions():
    bias = MSDeformAttn(256, 4, 8, 4).sampling_offsets.bias.view(8, 4, 4, 2)
    directions = torch.tensor([(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]).float()
    for point in range(4):
        torch.testing.assert_close(bias[:, 2, point], directions * (point + 1), rtol=0, atol=1e-5)


def test_padding_does_not_change_the_output():
    module = layer()
    query, value = torch.randn(2, 5, 16), torch.randn(2, 30, 16)
    reference = torch.rand(2, 5, 2, 2)
    mask = torch.zeros(2, 30, dtype=torch.bool)
    mask[1, 20:] = True
    out = module(query, reference, value, SHAPES, mask)
    value[1, 20:] = 1e3
    torch.testing.assert_close(module(query, reference, value, SHAPES, mask), out)
    assert not torch.equal(module(query, reference, value, SHAPES), out)


@pytest.mark.parametrize("size", [2, 4])
def test_gradient_reaches_every_parameter_and_input(size):
    module = layer()
    tensors = torch.randn(2, 5, 16), torch.rand(2, 5, 2, size), torch.randn(2, 30, 16)
    query, reference, value = (t.requires_grad_() for t in tensors)
    module(query, reference, value, SHAPES).square().sum().backward()
    for name, tensor in [("query", query), ("reference", reference), ("value", value), *module.named_parameters()]:
        assert tensor.grad is not None, name
        assert tensor.grad.abs().sum() > 0, name


def test_refuses_channels_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads = 3, got 16"):
        MSDeformAttn(embed_dim=16, num_heads=3)
