"""The command line: flexattn ask, chat, ask-batch, serve, tune, train, eval, demo, info, flops, predict,
bench, convert.

A command is a function of one options dataclass in a file of its own. It imports heavy packages only when it runs: the
version, the help and most errors need neither torch nor transformers.
"""

from flexattn_cuda.cli.app import main
from flexattn_cuda.cli.options import as_command
from flexattn_cuda.cli.runner import run_app, silence_transformers

__all__ = ["as_command", "main", "run_app", "silence_transformers"]
