"""Latents on disk: written once by a tokenizer, read by every stack that trains on them."""
