"""hierarchical_attention against its peers: inputs, methods, checks, clocks and results."""
