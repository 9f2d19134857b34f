import math

import torch

from dat.detection.models.position_encoding import sine_encoding, sine_positions


def test_encoding_interleaves_sines_and_cosines():
    encoded = sine_encoding(torch.tensor([[0.25, 0.6]]), 6, temperature=100.0)
    expected = []
    for coordinate in (0.25, 0.6):
        for i in range(3):
            angle = coordinate * 2 * math.pi / 100 ** (2 * i / 6)
            expected += [math.sin(angle), math.cos(angle)]
    torch.testing.assert_close(encoded, torch.tensor([expected]))


def test_position_is_y_then_x_at_cell_centres():
    x = torch.empty(1, 0)
    position = sine_positions(None, [(3, 5)], 16, like=x).view(3, 5, 16)
    torch.testing.assert_close(position[2, 1, :8], sine_encoding(torch.tensor([2.5 / 3]), 8), atol=1e-5, rtol=0)
    torch.testing.assert_close(position[2, 1, 8:], sine_encoding(torch.tensor([1.5 / 5]), 8), atol=1e-5, rtol=0)


def test_padding_does_not_change_unpadded_cells():
    mask = torch.ones(1, 6, 9, dtype=torch.bool)
    mask[:, :4, :7] = False
    padded = sine_positions([mask], [(6, 9)], 32, like=torch.empty(0)).view(6, 9, 32)
    alone = sine_positions(None, [(4, 7)], 32, like=torch.empty(0)).view(4, 7, 32)
    assert padded.isfinite().all()
    torch.testing.assert_close(padded[:4, :7], alone, atol=0, rtol=0)


def test_dtype_follows_the_features():
    assert sine_positions(None, [(2, 2)], 8, like=torch.empty(0, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_maps_are_encoded_one_after_the_other():
    masks = [torch.rand(2, *size, generator=torch.Generator().manual_seed(0)) < 0.3 for size in ((3, 5), (2, 1))]
    both = sine_positions(masks, [(3, 5), (2, 1)], 16, like=torch.empty(0))
    apart = [sine_positions([mask], [mask.shape[1:]], 16, like=torch.empty(0)) for mask in masks]
    assert torch.equal(both, torch.cat(apart, 1))
