"""The DETR family on any timm backbone, a detector a file."""
