"""Models that every stack can use: the ViT encoder, the ViT pixel decoder and bottlenecks."""
