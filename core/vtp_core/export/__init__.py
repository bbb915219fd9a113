"""A run's tokenizer and generator in a directory that others can use: our own layout, and foreign ones."""
