"""The command line, `multilora`: one file per command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

import typer

# Read by OpenMP when torch is imported: a waiting thread spins for microseconds, then frees its core. Waiting
# without any spin (OMP_WAIT_POLICY=PASSIVE) took twice as long on the embedded base.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

from multilora.cli.app import app as app_command
from multilora.cli.batch import batch
from multilora.cli.compare import compare
from multilora.cli.compose import compose
from multilora.cli.console import warnings_as_notes
from multilora.cli.convert import convert
from multilora.cli.doctor import doctor
from multilora.cli.eval import evaluation
from multilora.cli.extract import extract
from multilora.cli.fisher import fisher
from multilora.cli.gates import gates
from multilora.cli.grid import grid
from multilora.cli.inspect import inspect
from multilora.cli.judge import judge
from multilora.cli.loras import loras
from multilora.cli.merge import merge
from multilora.cli.methods import methods
from multilora.cli.reproduce import reproduce
from multilora.cli.resize import resize
from multilora.cli.score import score
from multilora.cli.search import search
from multilora.cli.train import train
from multilora.cli.world import world
from multilora.cli.ziplora import train_ziplora  # noqa: F401  (a command of `train`)

app = typer.Typer(
    name="multilora",
    help="Several LoRAs in one picture. Start with: multilora compose",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(compose)
app.command()(methods)
app.command()(loras)
app.command()(inspect)
app.command()(merge)
app.command()(compare)
app.command()(resize)
app.command()(convert)
app.command()(extract)
app.command()(fisher)
app.command()(search)
app.command()(batch)
app.command("eval")(evaluation)
app.command()(grid)
app.command()(score)
app.command()(judge)
app.command()(reproduce)
app.command()(doctor)
app.command("app")(app_command)
app.add_typer(world, name="world")
app.add_typer(train, name="train")
app.add_typer(gates, name="gates")


def _version(wanted: bool) -> None:
    if wanted:
        from multilora import __version__

        typer.echo(f"multilora {__version__}")
        raise typer.Exit()


@app.callback()
def _top(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="print the version"),
    traceback: bool = typer.Option(False, "--traceback", help="show where an error came from"),
) -> None:
    global _traceback
    _traceback = traceback


_traceback = False

# Loggers of other packages that speak on import, or of the embedded base's small decoder, and not of what was asked.
_BESIDE_THE_POINT = ("torch.utils._pytree", "diffusers.quantizers.torchao", "bitsandbytes.backends.cpu.ops")


def _quiet() -> None:
    for name in _BESIDE_THE_POINT:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(_not_about_the_decoder)


def _not_about_the_decoder(record: logging.LogRecord) -> bool:
    return "got <class 'diffusers.models.autoencoders.autoencoder_tiny" not in record.getMessage()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; always raises SystemExit. Status 0: done, 1: it failed, 2: bad arguments, 130: stopped.

    Errors that say what the user can do are printed as one message; --traceback shows where they came from.
    """
    _quiet()
    try:
        with warnings_as_notes():
            app(args=None if arguments is None else list(arguments))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if _traceback:
            raise
        known = isinstance(error, (ValueError, OSError)) or type(error).__module__.startswith("multilora")
        what = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
        hint = "" if known else "\nThis may be a mistake in multilora; `multilora --traceback ...` shows where it is."
        print(f"error: {what}{hint}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, ValueError) else 1) from None
