"""The cost of FlexAttention in a language model: selections, systems, measurements and results."""
