"""Frozen models that objectives align with: each resizes and normalises pictures itself."""
