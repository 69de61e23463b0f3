"""The paper's comparison in small: generated images, a small model trained from nothing, every system fine-tuned from one start."""
