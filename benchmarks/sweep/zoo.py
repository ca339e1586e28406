"""All models by library and name."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from sweep.case import Case

LIBRARIES = ("torch", "torchvision", "timm", "transformers")


def library(name: str) -> Any:
    """The module with `names()` and `build(name, recipe)` of a library."""
    return import_module(f"sweep.{name}_zoo")


def build(key: str, recipe: str = "") -> Case:
    """The model of "library/name"; raises whatever keeps it from running dense."""
    lib, _, name = key.partition("/")
    return library(lib).build(name, recipe)
