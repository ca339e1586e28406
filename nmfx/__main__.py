"""`python -m nmfx`: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from .cli import bench, check, convert, doctor, report
from .demo import command as demo
from .errors import NMError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")  # one line, without argparse's usage text


_FILES = "safetensors: a file, an index of shards, or a folder with either."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command.

    Raises:
        SystemExit: status 2 and one line on stderr for a request that cannot be met, 1 where
            `check` says no, 130 after Ctrl-C.
    """
    parser = _Parser(
        prog="python -m nmfx", description="N:M structured sparsity for PyTorch. " + _FILES
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, module, text in (
        ("report", report, "which layers of a file satisfy which N:M"),
        ("check", check, "exit status 1, and where, if a file (.onnx too) breaks a pattern"),
        ("convert", convert, "make a checkpoint N:M, shard by shard, without its model"),
        ("bench", bench, "what N:M gains on this machine, as a table and a picture"),
        ("doctor", doctor, "what this machine has, and what will be fast on it"),
    ):
        module.add_command(commands.add_parser(name, help=text, description=text))
    demo.add_options(commands.add_parser("demo", help="dense, STE and SR-STE training compared"))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except BrokenPipeError:
        sys.stderr.close()  # a pager or `head` that has seen enough
        parser.exit(1)
    except (NMError, OSError) as error:
        parser.error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted\n")


if __name__ == "__main__":
    main(sys.argv[1:])
