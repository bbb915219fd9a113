"""Vision foundation models as encoders, and RAE's decoder (arXiv 2510.11690) of what they see."""

from __future__ import annotations

from vtp_vfm.decoder import RAEDecoder as RAEDecoder
from vtp_vfm.encoder import Timm as Timm
