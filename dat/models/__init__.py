"""Backbones, registered with timm on import, and readers of the official configurations and checkpoints."""

from dat.models import official as official
from dat.models.dat import DAT as DAT
from dat.models.dat import StageConfig as StageConfig
from dat.models.flop_count import flops as flops
from dat.models.hub import push_to_hf_hub as push_to_hf_hub
from dat.models.hub import save_for_hf as save_for_hf
