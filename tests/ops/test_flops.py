"""FLOP counts of fvcore, which traces models with torch.jit.trace, beside torch's."""

import pytest
import timm
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dat  # noqa: F401
from dat.layers import MSDeformAttn, NeighborhoodAttention
from dat.ops import deform_sample, ms_deform_attn
from dat.ops.flops import fvcore_handles

# jit.trace warns of every size that it takes for a constant, which a count of one input's operations may do.
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit:FutureWarning")

SHAPES = ((4, 6), (2, 3))


def fvcore_count(model, args):
    analysis = FlopCountAnalysis(model.eval(), args).set_op_handle(**fvcore_handles())
    counts = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    assert not [name for name in analysis.unsupported_ops() if name.startswith("dat::")]
    return counts


def torch_count(model, args):
    with FlopCounterMode(display=False) as counter:
        model(*args)
    return {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}


class Both(nn.Module):
    """The two ops on the same levels."""

    def forward(self, value, locations, weights, reference):
        weighted = deform_sample(value, SHAPES, locations, weights)
        samples = deform_sample(value, SHAPES, locations).sum((3, 4))
        return weighted + samples + ms_deform_attn(value, SHAPES, reference, locations, weights)


def test_ops_count_four_multiply_adds_for_each_sample_and_channel():
    B, Q, H, L, P, D = 2, 5, 3, 2, 4, 8
    locations = torch.rand(B, Q, H, L, P, 2)
    args = torch.randn(B, 30, H, D), locations, torch.rand(B, Q, H, L, P), torch.rand(B, Q, L, 4)
    flops = 4 * B * Q * H * L * P * D
    assert fvcore_count(Both(), args) == {"deform_sample": 2 * flops, "ms_deform_attn": flops}
    assert torch_count(Both(), args) == {"dat.deform_sample": 4 * flops, "dat.ms_deform_attn": 2 * flops}


class Attend(nn.Module):
    """The layer at fixed sizes of its levels."""

    def __init__(self):
        super().__init__()
        self.layer = MSDeformAttn(16, num_levels=2, num_heads=4, num_points=3)

    def forward(self, query, reference, value):
        return self.layer(query, reference, value, SHAPES)


def test_the_layer_is_counted_by_hand():
    B, Q, S, C, samples = 2, 5, 30, 16, 4 * 2 * 3
    counts = fvcore_count(Attend(), (torch.randn(B, Q, C), torch.rand(B, Q, 2, 2), torch.randn(B, S, C)))
    linear = B * Q * C * samples * 3 + B * S * C * C + B * Q * C * C
    assert counts == {"linear": linear, "ms_deform_attn": 4 * B * Q * samples * C // 4}


def test_a_model_counts_as_much_as_with_torch():
    torch.manual_seed(0)
    model, args = timm.create_model("dat_nano"), (torch.randn(1, 3, 224, 224),)
    ours, theirs = fvcore_count(model, args), torch_count(model, args)
    same = {
        "deform_sample": ["dat.deform_sample"],
        "deform_attn": ["dat.deform_attn"],
        "matmul": ["aten.bmm"],
        "linear": ["aten.addmm", "aten.mm"],
        "conv": ["aten.convolution"],
    }
    for name, of_torch in same.items():
        assert 2 * ours[name] == sum(theirs[op] for op in of_torch), name
    # One deformable block each in stage 3, with a key for every 2 x 2 queries, and in stage 4; keys are 7 x 7 in both.
    assert ours["deform_sample"] == 4 * 7 * 7 * (128 + 256)


def test_published_flops_of_dat_pp_tiny():
    """4.3 G by the paper, in which a multiply-add counts as one, as it does in fvcore."""
    counts = fvcore_count(timm.create_model("dat_pp_tiny"), (torch.randn(1, 3, 224, 224),))
    assert sum(counts.values()) / 1e9 == pytest.approx(4.3, rel=0.01)


def test_models_can_be_traced():
    """Sizes that torch.jit.trace gives for a tensor's shape are tensors."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = MSDeformAttn(16, num_levels=1, num_heads=4, num_points=3)

        def forward(self, maps, query, reference):
            return self.layer(query, reference, maps.flatten(2).transpose(1, 2), [maps.shape[2:]])

    torch.manual_seed(0)
    model = Net()
    args = torch.randn(2, 16, 4, 6), torch.randn(2, 5, 16), torch.rand(2, 5, 1, 2)
    torch.testing.assert_close(torch.jit.trace(model, args)(*args), model(*args))


def test_neighborhood_attention_counts_its_multiply_adds():
    counts = fvcore_count(NeighborhoodAttention(12, 3, kernel_size=3), (torch.randn(2, 5, 6, 12),))
    assert counts["neighborhood_attn"] == 2 * 2 * 30 * 9 * 12
