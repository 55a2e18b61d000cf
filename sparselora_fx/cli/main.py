"""The entry point of ``sparselora-fx``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; without the packages that it needs, say which."""
    try:
        from sparselora_fx.cli.app import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"sparselora-fx: error: the command line needs {error.name}, which is not installed; "
            "install it with: pip install 'sparselora_fx[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app()
