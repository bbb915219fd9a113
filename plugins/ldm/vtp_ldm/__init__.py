"""The KL autoencoder of latent diffusion (arXiv 2112.10752), which VA-VAE (arXiv 2501.01423) trains as well."""

from __future__ import annotations

from vtp_ldm.cnn import CNNDecoder as CNNDecoder
from vtp_ldm.cnn import CNNEncoder as CNNEncoder
from vtp_ldm.gaussian import Gaussian as Gaussian
from vtp_ldm.objective import KL as KL
