"""`python -m nmfx`: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .demo import command as demo
from .errors import NMError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without argparse's usage text


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command.

    Raises:
        SystemExit: status 2 and one line on stderr for a request that cannot be met, 130 after
            Ctrl-C.
    """
    parser = _Parser(prog="python -m nmfx", description="N:M structured sparsity for PyTorch.")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    demo.add_options(commands.add_parser("demo", help="dense, STE and SR-STE training compared"))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (NMError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")


if __name__ == "__main__":
    main(sys.argv[1:])
