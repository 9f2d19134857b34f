import onnxruntime
import pytest
import torch
from torch.export import Dim

from dat.layers import NeighborhoodAttention
from dat.ops.onnx import translation_table

# torch.onnx says so of every dimension that two inputs share.
pytestmark = pytest.mark.filterwarnings("ignore:# The axis name")


@pytest.mark.parametrize("dilation", [1, 2])
def test_layer_in_onnxruntime_at_sizes_not_known_beforehand(dilation):
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, kernel_size=3, dilation=dilation).eval()
    height, width = Dim("height", min=7, max=64), Dim("width", min=7, max=64)
    with torch.no_grad():
        program = torch.onnx.export(
            layer,
            (torch.randn(2, 9, 11, 8),),
            opset_version=20,
            dynamic_shapes=({0: Dim("batch", min=1), 1: height, 2: width},),
            custom_translation_table=translation_table(),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for shape in ((2, 9, 11, 8), (3, 8, 14, 8), (1, 13, 7, 8)):
        x = torch.randn(shape)
        (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(out), layer(x), rtol=0, atol=1e-5)


def test_map_lower_than_a_window():
    torch.manual_seed(0)
    layer = NeighborhoodAttention(8, 2, kernel_size=5).eval()
    x = torch.randn(1, 3, 9, 8)
    with torch.no_grad():
        program = torch.onnx.export(
            layer, (x,), opset_version=20, custom_translation_table=translation_table(), verbose=False
        )
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(out), layer(x), rtol=0, atol=1e-5)
