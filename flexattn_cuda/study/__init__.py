"""The paper's comparison in small: generated pictures, a small model trained from nothing, every system fine-tuned from one start."""
