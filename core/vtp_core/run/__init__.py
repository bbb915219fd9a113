"""A run on disk and on the screen: directory, checkpoints, metrics, progress; without the engine."""
