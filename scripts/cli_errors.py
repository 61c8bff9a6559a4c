"""How the `kvstream` command says what a user can put right: one message, exit code 2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console

err = Console(stderr=True, highlight=False, soft_wrap=True)


def fail(message: str) -> NoReturn:
    """One message and exit code 2."""
    err.print("error: ", style="bold red", end="")
    err.print(message, markup=False)
    raise typer.Exit(2)


@contextlib.contextmanager
def clean_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors that a user can put right into one message and exit code 2."""
    try:
        yield
    except kinds as error:
        fail(str(error))
