"""Diffusion transformers: DiT, SiT, LightningDiT, DDT and DiT-DH, from one block with switches."""

from __future__ import annotations

from vtp_dit.decoupled import DDT, DiTDH
from vtp_dit.network import NarrowWarning
from vtp_dit.plain import DiT, LightningDiT, SiT

__all__ = ["DDT", "DiT", "DiTDH", "LightningDiT", "NarrowWarning", "SiT"]
