"""Our tokenizers as other libraries' classes; each module here needs its library."""
