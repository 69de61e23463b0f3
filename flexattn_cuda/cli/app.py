"""`flexattn` and its commands."""

from __future__ import annotations

from typing import Annotated

import typer

import flexattn_cuda
from flexattn_cuda.cli.ask import ask
from flexattn_cuda.cli.ask_batch import ask_batch
from flexattn_cuda.cli.bench import bench
from flexattn_cuda.cli.chat import chat
from flexattn_cuda.cli.convert import convert
from flexattn_cuda.cli.demo import demo
from flexattn_cuda.cli.eval import eval  # noqa: A004 - the name of the command
from flexattn_cuda.cli.flops import flops
from flexattn_cuda.cli.info import info
from flexattn_cuda.cli.options import as_command, examples_of
from flexattn_cuda.cli.predict import predict
from flexattn_cuda.cli.runner import run_app
from flexattn_cuda.cli.serve import serve
from flexattn_cuda.cli.train import train
from flexattn_cuda.cli.tune import tune

app = typer.Typer(
    help="Ask questions about large images: a vision-language model with FlexAttention (Li et al., ECCV 2024).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
COMMANDS = (ask, chat, ask_batch, serve, tune, train, eval, demo, info, flops, predict, bench, convert)
for command in COMMANDS:
    app.command(epilog="\n\n".join(["Examples:", *examples_of(command)]))(as_command(command))


def main() -> None:
    """Run `flexattn`."""
    run_app(app, "flexattn")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flexattn {flexattn_cuda.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
