"""BEVFormer's spatial cross-attention with the sampling op alone, shown on a ring of six cameras.

    python -m examples.bev_cross_attention

Paints a ground, renders it into the cameras, samples it back from their images by bird's-eye-view queries, and writes
runs/bev_cross_attention.png: the cameras' images, the ground, the result of the queries, and the cameras that see it.
Dark lines in the result are pillars of which a second camera sees only the top: the mean over cameras includes it, but
it does not see the ground.
"""

import math
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

from dat.layers import MSDeformAttn
from dat.ops import deform_sample
from dat.ops.deform_sample import Shapes

OUTPUT = Path("runs/bev_cross_attention.png")


class SpatialCrossAttention(MSDeformAttn):
    """Attention from bird's-eye-view queries to many cameras (BEVFormer, https://arxiv.org/abs/2203.17270, equation 3).

    A query stands for a pillar of reference points. Points that a camera sees are projected into its image, where
    learned points around them are sampled; the cameras that see a query are averaged. Parameters and their initial
    values are those of `MSDeformAttn` with num_anchors * num_points points.

    Args:
        embed_dim: channels C of queries and values; a multiple of num_heads.
        num_levels: feature levels L of each camera.
        num_heads: heads H.
        num_anchors: reference points Z of a pillar.
        num_points: samples P per head, level and reference point.
    """

    def __init__(
        self, embed_dim: int = 256, num_levels: int = 4, num_heads: int = 8, num_anchors: int = 4, num_points: int = 2
    ) -> None:
        super().__init__(embed_dim, num_levels, num_heads, num_anchors * num_points)
        self.layout = (num_heads, num_levels, num_anchors, num_points)

    def forward(
        self,
        query: Tensor,
        points: Tensor,
        cameras: Tensor,
        image_size: tuple[int, int],
        value: Tensor,
        shapes: Shapes,
    ) -> Tensor:
        """Attends from queries to the images of the cameras that see their pillars.

        Args:
            query: [B, Q, C].
            points: [Q, Z, 3], the pillars' reference points (x, y, z) in metres.
            cameras: [B, N, 4, 4], from (x, y, z, 1) to (u * depth, v * depth, depth, 1), u and v in pixels.
            image_size: (height, width) of the images in those pixels.
            value: [B, N, S, C], the levels of each camera flattened row by row and laid end to end.
            shapes: ((h_0, w_0), ...) of the levels.

        Returns:
            [B, Q, C]; zeros for a query that no camera sees.
        """
        centers, visible = project(points, cameras, image_size)
        hit = visible.any(-1)
        # Each camera samples only for the queries that it sees. Shorter lists are padded with queries that it does not
        # see, whose weights are zero.
        index = hit.int().argsort(dim=-1, descending=True, stable=True)[..., : int(hit.sum(-1).max())]
        rows = index + query.shape[1] * torch.arange(len(query), device=query.device)[:, None, None]
        offsets, weights = (tensor.flatten(0, 1)[rows] for tensor in self.samples(query))
        sizes = torch.tensor([(w, h) for h, w in shapes], dtype=centers.dtype, device=centers.device)
        centers = centers.take_along_dim(index[..., None, None], 2)[:, :, :, None, None, :, None]
        locations = centers + offsets / sizes[:, None, None]
        weights = weights * visible.take_along_dim(index[..., None], 2)[:, :, :, None, None, :, None]
        values = self.value_proj(value).flatten(0, 1).unflatten(-1, (self.num_heads, -1))
        # Cameras become the batch of the op, and the points of all anchors its points.
        sampled = deform_sample(values, shapes, locations.flatten(0, 1).flatten(4, 5), weights.flatten(0, 1).flatten(4))
        total = torch.zeros_like(query.flatten(0, 1), dtype=sampled.dtype)
        total = total.index_add(0, rows.flatten(), sampled.flatten(2).flatten(0, 1)).view(query.shape)
        count = hit.sum(1).unsqueeze(-1)
        return self.output_proj(total / count.clamp(min=1)) * (count > 0)

    def samples(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets in pixels of their level [B, Q, H, L, Z, P, 2] and weights [B, Q, H, L, Z, P] of the queries.

        The weights of a head sum to one over all L * Z * P samples, whichever of them a camera sees.
        """
        offsets = self.sampling_offsets(query).unflatten(-1, (*self.layout, 2))
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        return offsets.to(torch.promote_types(offsets.dtype, torch.float32)), weights.unflatten(-1, self.layout[1:])


def project(points: Tensor, cameras: Tensor, image_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Projects points: (x, y) in 0..1 across each camera's image [B, N, Q, Z, 2], and visibility [B, N, Q, Z].

    Arguments are those of `SpatialCrossAttention.forward`. Points behind a camera or outside its image are not visible.
    """
    matrix = cameras[:, :, None, None, :3]
    # Written out: autocast would take a matrix product in half precision, which is off by many pixels.
    u, v, depth = (matrix[..., 3] + sum(matrix[..., i] * points[..., i, None] for i in range(3))).unbind(-1)
    height, width = image_size
    ahead = depth > 1e-5
    distance = torch.where(ahead, depth, 1.0)
    locations = torch.stack((u / distance / width, v / distance / height), -1)
    return locations, ahead & ((locations > 0) & (locations < 1)).all(-1)


def camera_ring(count: int, image_size: tuple[int, int], focal: float, height: float, pitch: float) -> Tensor:
    """Camera matrices [count, 4, 4] of a ring that looks outwards from `height` metres, `pitch` radians downwards.

    x is forward, y left and z up; `focal` is in pixels.
    """
    intrinsics = torch.eye(4)
    intrinsics[0, 0] = intrinsics[1, 1] = focal
    intrinsics[0, 2], intrinsics[1, 2] = image_size[1] / 2, image_size[0] / 2
    matrices = []
    for yaw in torch.arange(count) * (2 * math.pi / count):
        right = torch.stack((yaw.sin(), -yaw.cos(), torch.zeros(())))
        forward = torch.stack(
            (yaw.cos() * math.cos(pitch), yaw.sin() * math.cos(pitch), torch.tensor(-math.sin(pitch)))
        )
        extrinsics = torch.eye(4)
        extrinsics[:3, :3] = torch.stack((right, torch.linalg.cross(forward, right), forward))
        extrinsics[:3, 3] = -extrinsics[:3, :3] @ torch.tensor((0.0, 0.0, height))
        matrices.append(intrinsics @ extrinsics)
    return torch.stack(matrices)


def paint(x: Tensor, y: Tensor) -> Tensor:
    """The ground's colour [..., 3] in 0..1 at (x, y) in metres: stripes along, stripes across and rings."""
    return 0.5 + 0.5 * torch.stack(((x * 0.8).sin(), (y * 0.8).sin(), (x.hypot(y) * 0.6).cos()), -1)


def render(cameras: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Images [N, height, width, 3] of the painted ground z = 0 under a black sky."""
    height, width = image_size
    v, u = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    pixels = torch.stack((u, v, torch.ones_like(u)), -1)
    # A point (x, y, 1) of the ground is projected by three columns of the matrix.
    ground = torch.einsum("nij,hwj->nhwi", cameras[:, :3, [0, 1, 3]].inverse(), pixels)
    x, y, nearness = ground.unbind(-1)
    below = nearness > 1e-6
    nearness = nearness.clamp(min=1e-6)
    return torch.where(below[..., None], paint(x / nearness, y / nearness), 0.0)


def pillars(reach: float, side: int, heights: tuple[float, ...]) -> Tensor:
    """Reference points [side * side, Z, 3] over a square of 2 * reach metres; the first row is the farthest ahead."""
    steps = ((torch.arange(side) + 0.5) / side * 2 - 1) * reach
    x, y, z = torch.meshgrid(-steps, -steps, torch.tensor(heights), indexing="ij")
    return torch.stack((x, y, z), -1).flatten(0, 1)


def ground_reader(heights: tuple[float, ...]) -> SpatialCrossAttention:
    """An attention with weights set by hand to return the colour at the pillars' point of height 0."""
    attention = SpatialCrossAttention(embed_dim=3, num_levels=1, num_heads=1, num_anchors=len(heights), num_points=1)
    with torch.no_grad():
        attention.sampling_offsets.bias.zero_()
        attention.attention_weights.bias[heights.index(0.0)] = 30.0
        for projection in (attention.value_proj, attention.output_proj):
            projection.weight.copy_(torch.eye(3))
    return attention


@torch.no_grad()
def look_around(side: int = 160, reach: float = 16.0, image_size: tuple[int, int] = (240, 400)) -> dict[str, Tensor]:
    """Renders the cameras and samples the ground.

    Returns:
        "images" [N, h, w, 3]; "truth" and "found" [side, side, 3], the ground from above and the result of the queries;
        and "hit" [N, side, side], which cameras see the ground there.
    """
    heights = (-1.0, 0.0, 1.0, 2.0)
    cameras = camera_ring(6, image_size, focal=image_size[1] * 0.7, height=1.6, pitch=0.2)
    images = render(cameras, image_size)
    points = pillars(reach, side, heights)
    query = torch.zeros(1, len(points), 3)
    found = ground_reader(heights)(query, points, cameras[None], image_size, images.flatten(1, 2)[None], [image_size])
    ground = points[:, heights.index(0.0)]
    seen = project(ground[:, None], cameras[None], image_size)[1]
    return {
        "images": images,
        "truth": paint(ground[:, 0], ground[:, 1]).unflatten(0, (side, side)),
        "found": found[0].unflatten(0, (side, side)),
        "hit": seen[0, ..., 0].unflatten(1, (side, side)),
    }


def draw(scene: dict[str, Tensor], path: Path) -> None:
    """Draws a scene from `look_around` to `path`."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    count = len(scene["images"])
    palette = torch.tensor(plt.get_cmap("hsv")(torch.arange(count) / count))[:, :3]
    who = torch.einsum("nhw,nc->hwc", scene["hit"].double(), palette) / scene["hit"].sum(0).clamp(min=1)[..., None]
    maps = {"the ground": scene["truth"], "sampled by the queries": scene["found"], "cameras that see it": who}
    figure = plt.figure(figsize=(12, 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 3))
    for index, axes in enumerate(upper.subplots(1, count, squeeze=False).flat):
        axes.imshow(scene["images"][index])
        axes.set_title(f"camera {index}", color=palette[index].tolist())
        axes.axis("off")
    for axes, (title, image) in zip(lower.subplots(1, 3), maps.items(), strict=True):
        axes.imshow(image.clamp(0, 1))
        axes.set_title(title)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    scene = look_around()
    count = scene["hit"].sum(0)
    error = (scene["found"] - scene["truth"]).abs()[count > 0].mean()
    draw(scene, OUTPUT)
    print(
        f"{(count > 0).float().mean():.0%} of the ground is seen, {(count > 1).float().mean():.0%} by two cameras;\n"
        f"its colours, 0 to 1, were found with a mean error of {error:.3f}.\n"
        f"  image   {OUTPUT}"
    )


if __name__ == "__main__":
    main()
