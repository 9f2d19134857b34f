import math

import pytest
import torch
from torch.nn import functional as F

from examples import bev_cross_attention
from examples.bev_cross_attention import (
    SpatialCrossAttention,
    camera_ring,
    look_around,
    paint,
    pillars,
    project,
    render,
)

IMAGE = (48, 80)
SHAPES = ((6, 10), (3, 5))


def work(dtype=torch.float64):
    """A module whose every parameter matters, and its arguments: two batches of three cameras around 25 pillars."""
    torch.manual_seed(0)
    module = SpatialCrossAttention(embed_dim=8, num_levels=2, num_heads=2, num_anchors=3, num_points=2).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    cameras = torch.stack([camera_ring(3, IMAGE, focal, 1.5, 0.1) for focal in (60.0, 18.0)]).to(dtype)
    points = pillars(8.0, 5, (-1.0, 0.5, 3.0)).to(dtype)
    query = torch.randn(2, len(points), 8, dtype=dtype)
    value = torch.randn(2, 3, sum(h * w for h, w in SHAPES), 8, dtype=dtype)
    return module, query, points, cameras, IMAGE, value, SHAPES


def one_camera(module, query, pillar, camera, image_size, value, shapes):
    """What one query samples from one camera, point by point by grid_sample; None where it sees no point."""
    H, L, Z, P = module.layout
    offsets = module.sampling_offsets(query).view(H, L, Z, P, 2)
    weights = module.attention_weights(query).view(H, -1).softmax(-1).view(H, L, Z, P)
    values = module.value_proj(value).unflatten(-1, (H, -1))
    out = torch.zeros(H, values.shape[-1], dtype=query.dtype)
    sees = False
    for z, point in enumerate(pillar):
        u, v, depth, _ = camera @ torch.cat((point, torch.ones(1, dtype=point.dtype)))
        x, y = u / depth / image_size[1], v / depth / image_size[0]
        if depth <= 0 or not (0 < x < 1 and 0 < y < 1):
            continue
        sees = True
        for head in range(H):
            for level, (h, w) in enumerate(shapes):
                start = sum(a * b for a, b in shapes[:level])
                image = values[start : start + h * w, head].T.reshape(1, -1, h, w)
                for p in range(P):
                    dx, dy = offsets[head, level, z, p]
                    grid = torch.stack((x + dx / w, y + dy / h)).view(1, 1, 1, 2) * 2 - 1
                    sample = F.grid_sample(image, grid, padding_mode="zeros", align_corners=False).flatten()
                    out[head] += weights[head, level, z, p] * sample
    return out.flatten() if sees else None


def naive(module, query, points, cameras, image_size, value, shapes):
    out = torch.zeros_like(query)
    for b in range(len(query)):
        for q, pillar in enumerate(points):
            found = [
                one_camera(module, query[b, q], pillar, camera, image_size, values, shapes)
                for camera, values in zip(cameras[b], value[b], strict=True)
            ]
            found = [sample for sample in found if sample is not None]
            if found:
                out[b, q] = module.output_proj(sum(found) / len(found))
    return out


@torch.no_grad()
def test_equals_a_loop_over_cameras_queries_and_points():
    module, *args = work()
    visible = project(args[1], args[2], IMAGE)[1]
    # The loop is worth running where pillars are seen whole, in part, by several cameras and by none.
    assert set(visible.sum(-1).unique().tolist()) == {0, 1, 2, 3}
    assert set(visible.any(-1).sum(1).unique().tolist()) >= {0, 1, 2}
    torch.testing.assert_close(module(*args), naive(module, *args), rtol=0, atol=1e-12)


def test_a_query_that_no_camera_sees_gets_zeros_and_finite_gradients():
    module, query, points, cameras, *rest = work()
    unseen = ~project(points, cameras, IMAGE)[1].any(-1).any(1)
    assert unseen.any()
    query.requires_grad_()
    out = module(query, points, cameras, *rest)
    assert (out[unseen] == 0).all()
    assert (out[~unseen] != 0).all()
    out.square().sum().backward()
    assert query.grad.isfinite().all()
    assert (query.grad[unseen] == 0).all()
    high = points + torch.tensor((0.0, 0.0, 1e3))
    assert (module(query, high, cameras, *rest) == 0).all()


def test_points_behind_a_camera_contribute_nothing():
    module, query, _, _, *rest = work()
    camera = camera_ring(1, IMAGE, 60.0, 1.5, 0.0)[None].double().expand(2, 1, 4, 4)
    value = rest[1][:, :1]
    ahead = torch.tensor((5.0, 0.2, 1.0), dtype=torch.float64)
    # Half a metre behind the camera, with u * depth and v * depth that would be pixels of its image.
    behind = torch.tensor((-0.5, -0.5, 1.0), dtype=torch.float64)
    points = torch.stack((ahead, ahead, behind)).expand(query.shape[1], 3, 3)
    visible = project(points, camera, IMAGE)[1]
    assert visible[0, 0, 0].tolist() == [True, True, False]
    out = module(query, points, camera, IMAGE, value, SHAPES)
    with torch.no_grad():
        torch.testing.assert_close(out[:, :1], naive(module, query[:, :1], points[:1], camera, IMAGE, value, SHAPES))
    module(query, behind.expand(query.shape[1], 3, 3), camera, IMAGE, value, SHAPES).sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


def test_gradient_reaches_every_parameter_and_input():
    module, query, points, cameras, image_size, value, shapes = work()
    leaves = [t.requires_grad_() for t in (query, points, cameras, value)]
    module(query, points, cameras, image_size, value, shapes).square().sum().backward()
    for name, tensor in [
        *zip(("query", "points", "cameras", "value"), leaves, strict=True),
        *module.named_parameters(),
    ]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert tensor.grad.any(), name


@torch.no_grad()
def test_autocast_does_not_move_the_samples():
    module, *args = work(torch.float32)
    exact = module(*args)
    with torch.autocast("cpu", torch.bfloat16):
        locations = project(args[1], args[2], IMAGE)
        out = module(*args)
    assert torch.equal(locations[0], project(args[1], args[2], IMAGE)[0])
    assert (out - exact).abs().max() < 0.05 * exact.abs().max()


def test_projects_to_where_cameras_are_turned():
    cameras = camera_ring(4, IMAGE, 60.0, 1.5, 0.0)[None]
    # Five metres before each camera, at its height, one to its left and one upwards: x grows right, y down.
    ahead = torch.tensor([(5.0, 0.0), (0.0, 5.0), (-5.0, 0.0), (0.0, -5.0)])
    left = torch.stack((-ahead[:, 1], ahead[:, 0]), -1) / 5
    points = torch.cat((ahead + left, torch.full((4, 1), 2.5)), -1)[:, None]
    locations, visible = project(points, cameras, IMAGE)
    assert torch.equal(visible[0, :, :, 0], torch.eye(4, dtype=torch.bool))
    seen = locations[0, range(4), range(4), 0]
    expected = torch.tensor((0.5 - 12 / 80, 0.5 - 12 / 48))
    torch.testing.assert_close(seen, expected.expand(4, 2), rtol=0, atol=1e-5)


def test_an_image_shows_the_ground_where_points_are_projected():
    size = (240, 400)
    cameras = camera_ring(6, size, 280.0, 1.6, 0.2)
    ground = torch.tensor([(6.0, 0.5, 0.0), (-4.0, 7.0, 0.0), (1.0, -9.0, 0.0)])[:, None]
    locations, visible = project(ground, cameras[None], size)
    images = render(cameras, size).permute(0, 3, 1, 2)
    for camera, query in visible[0, ..., 0].nonzero().tolist():
        grid = locations[0, camera, query].view(1, 1, 1, 2) * 2 - 1
        colour = F.grid_sample(images[camera : camera + 1], grid, align_corners=False).flatten()
        torch.testing.assert_close(colour, paint(*ground[query, 0, :2]), rtol=0, atol=0.02)
    assert visible.any(1).all()


def test_the_demonstration_finds_the_ground_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bev_cross_attention, "OUTPUT", tmp_path / "runs" / "bev.png")
    monkeypatch.setattr(bev_cross_attention, "look_around", lambda: look_around(side=40))
    bev_cross_attention.main()
    scene = look_around(side=40)
    count = scene["hit"].sum(0)
    assert ((scene["found"] - scene["truth"]).abs().amax(-1)[count == 1] < 0.05).float().mean() > 0.9
    assert (scene["found"][20, 20] == 0).all()
    assert count.max() == 2
    assert (tmp_path / "runs" / "bev.png").stat().st_size > 10_000
    assert "mean error of 0.0" in capsys.readouterr().out
    assert math.isclose((count > 0).float().mean(), 0.98, abs_tol=0.02)


def test_refuses_channels_that_heads_do_not_divide():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads = 3, got 8"):
        SpatialCrossAttention(embed_dim=8, num_heads=3)
