"""Every error that this package raises on purpose.

Each message is one sentence: what was given, what is allowed, what to do.
"""

from __future__ import annotations


class InputError(ValueError):
    """An image, prompt, device or option cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint cannot be found, or cannot be loaded."""


class PoolOverflow(RuntimeError):  # noqa: N818 (a public name)
    """A selection does not fit into an HR pool of fixed size."""
