"""Every error that this package raises on purpose. Each message is one sentence: what was given, what is allowed, what to do."""

from __future__ import annotations


class InputError(ValueError):
    """An image, a prompt, a device or an option that cannot be used."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be found or loaded."""


class PoolOverflow(RuntimeError):  # noqa: N818 (a public name)
    """A selection did not fit into an HR pool of fixed size."""
