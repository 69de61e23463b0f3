"""The paper's comparison in small: generated images, and a small model that every system fine-tunes from one start."""
