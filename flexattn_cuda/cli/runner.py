"""How a command line of this project starts and ends."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import NoReturn

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
    except (InputError, CheckpointError) as error:
        _fail(str(error))
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by name: most errors end without importing torch
            raise
        _fail("the GPU does not have enough memory; `flexattn info --model DIR` estimates what a model needs")
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    print(f"flexattn: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def silence_transformers() -> None:
    """Import transformers and keep warnings and progress bars, also those of what it imports, off the terminal."""
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="transformers")
