"""Maths that several plugins share: prototype head, targets, chunked losses."""
