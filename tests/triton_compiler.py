"""Triton's compiler, in a process of its own: the tests run its interpreter in theirs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def compile_elsewhere(program: str, cases: dict[str, Any], cache: str) -> dict[str, dict[str, str]]:
    """Case -> what the program prints of it as JSON: its PTX and machine code.

    Args:
        program: Python; the cases are its first argument, as JSON.
        cases: by name, as the program wants them.
        cache: a folder for what is compiled.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = cache
    command = [sys.executable, "-c", program, json.dumps(cases)]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
