"""How a command line of this project starts and ends."""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings

import typer

from flexattn_cuda.errors import CheckpointError, InputError

# Loggers of packages that transformers imports where they are installed. They tell what they could not load, and that
# a layer computes in 8 bits.
_TALKATIVE = ("bitsandbytes", "torchao", "torch.utils._pytree")


def run_app(app: typer.Typer, name: str) -> None:
    """Run a command line.

    The exit code is 0, 1 if the command says so, 2 after wrong usage or an error in the input, which is one sentence on
    stderr, and 130 after Ctrl-C.

    Args:
        app: The command line.
        name: Its name in messages.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        app(prog_name=name)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sentence = sentence_of(error)
        if sentence is None:
            raise
        print_error(sentence)
        sys.exit(2)


def sentence_of(error: Exception) -> str | None:
    """Return what a user is told of an error in the input, or of a full GPU; None for any other error."""
    if isinstance(error, InputError | CheckpointError):
        return " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: most errors end without importing torch
        return "the GPU does not have enough memory; `flexattn info --model DIR` estimates what a model needs"
    return None


def print_error(sentence: str) -> None:
    """Print a sentence on stderr."""
    print(f"flexattn: {sentence}", file=sys.stderr, flush=True)


def require(extra: str, *packages: str) -> None:
    """Raise InputError if one of the packages that an extra of this package installs is missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{', '.join(missing)} is not installed; run: pip install 'flexattn_cuda[{extra}]'")


def silence_transformers() -> None:
    """Import transformers and keep warnings and progress bars, also those of what it imports, off the terminal."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
