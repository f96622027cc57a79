"""``condconv``: the commands, and how their errors end."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from condconv_surgery import __version__, native
from condconv_surgery.errors import SurgeryError

from .check import check
from .collapse import collapse
from .compare import compare
from .convert import convert
from .export_layout import export
from .finetune import finetune
from .fold import fold
from .import_layout import import_
from .output.console import say
from .output.standard_output import use_standard_output
from .predict import predict
from .report import report
from .share import share
from .translate_arguments import TranslatingCommand

app = typer.Typer(
    name="condconv",
    help="Give a trained convolutional network conditional convolutions, fine-tune it, and say whether that pays.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command(cls=TranslatingCommand)(convert)
app.command(cls=TranslatingCommand)(check)
app.command(cls=TranslatingCommand)(finetune)
app.command(cls=TranslatingCommand)(compare)
app.command(cls=TranslatingCommand)(report)
app.command(cls=TranslatingCommand)(predict)
app.command(cls=TranslatingCommand)(collapse)
app.command(cls=TranslatingCommand)(fold)
app.command("import", cls=TranslatingCommand)(import_)
app.command(cls=TranslatingCommand)(export)
app.command(cls=TranslatingCommand)(share)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"condconv-surgery {__version__}\n{native.describe()}")
        raise typer.Exit


@app.callback()
def condconv(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    with_kernels: Annotated[
        bool | None,
        typer.Option(
            "--native/--no-native",
            help="Insist on the C++ kernels, compiling them first where the installation has none, or do without. "
            "Default: use those of the installation (--version shows them). "
            "CONDCONV_NATIVE=1 or 0 in the environment does the same.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Give a trained convolutional network conditional convolutions."""
    if with_kernels is not None:  # both import torch, which help and typos do not need
        native.enable() if with_kernels else native.disable()


def run() -> None:
    """The entry point: exit code 0 done, 1 the work failed, 2 the input is wrong, 128 + its number after a signal."""
    use_standard_output()
    try:
        try:
            app()
        finally:
            if sys.stdout is not None:  # closed by the shell
                sys.stdout.flush()
    except SurgeryError as error:
        say(f"Error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("Interrupted.")
        sys.exit(130)
