"""``python -m vtp_core``, the form that torchrun starts."""

from vtp_core.cli import main

main()
