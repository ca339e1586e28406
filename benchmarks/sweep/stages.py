"""The stages of a sweep: what one child process does with one model."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable
from typing import Any

from sweep import checks
from sweep.case import Case
from sweep.equality import check_against_reference, measure
from sweep.steps import Note
from sweep.zoo import build


def main_steps(case: Case, note: Note) -> None:
    """Sparsify, equality with the reference, training, fold, lower, save and load."""
    model = checks.check_install(case, note)
    if model is not None:
        check_against_reference(case, model, note)
        checks.check_after(case, checks.check_training(case, model, note), note)


def _main(key: str, recipe: str, note: Note) -> None:
    warnings.simplefilter("ignore")
    note("begin", "dense")
    try:
        case = build(key, recipe)
        measure(case, case.fresh(), False)
    except Exception as error:  # noqa: BLE001 (it is the row)
        traceback.print_exc()
        note("dense", f"does not run dense here: {type(error).__name__}: {error}"[:700])
        return
    note("recipe", case.recipe)
    note("parameters", sum(p.numel() for p in case.model.parameters()))
    main_steps(case, note)


def _compile(key: str, recipe: str, note: Note) -> None:
    warnings.simplefilter("ignore")
    checks.check_compiled(build(key, recipe), note)


def _tune(key: str, recipe: str, note: Note) -> None:
    warnings.simplefilter("ignore")
    checks.check_tuned(build(key, recipe), note)


STAGES: dict[str, Callable[[str, str, Any], None]] = {
    "main": _main,
    "compile": _compile,
    "tune": _tune,
}
