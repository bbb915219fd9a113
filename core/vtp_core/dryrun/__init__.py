"""A step of the real engine on tensors without values: what it computes, keeps, sends and writes."""
