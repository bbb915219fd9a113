"""Noise paths and the loss that trains a generator on them."""

from vtp_flow.ddpm import DDPM as DDPM
from vtp_flow.objective import Flow as Flow
from vtp_flow.paths import GVP as GVP
from vtp_flow.paths import VP as VP
from vtp_flow.paths import Linear as Linear
