"""Stacks by name: each ``<name>.yaml`` here has an entry point in the group ``vtp_plugins.stacks``."""
