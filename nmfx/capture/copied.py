"""Deep copies of whole models, checked: a class may have a `__deepcopy__` of its own.

Such a method may build a new layer and load its weights, which is dense then, or share things with
the layer it copies. `fold` and `lower` would return the one and change the other without a word.
"""

from __future__ import annotations

import copy

from torch import nn

from ..errors import NMError
from .generate import base_class
from .refs import SiteRef, iter_sites


def copied(model: nn.Module, verb: str) -> nn.Module:
    """A deep copy of a model, with a copy of each of its sites.

    Raises:
        NMError: a class on the way to a site copies something else; `verb` is for the message.
    """
    twin = copy.deepcopy(model)
    sites = {ref.name: ref for ref in iter_sites(twin)}
    for ref in iter_sites(model):
        other = sites.get(ref.name)
        if other is None or other.host is ref.host or other.site.state != ref.site.state:
            raise NMError(
                f"nmfx.{verb}: {ref.name} is {ref.site.state}, and the copy of the model has no "
                f"such copy of it, by the __deepcopy__ of {_culprit(model, ref)}; pass "
                f"inplace=True, or drop that method"
            )
    return twin


def _culprit(model: nn.Module, ref: SiteRef) -> str:
    """The outermost class on the way to a site that copies itself."""
    way = [model]
    for name in ref.module_name.split("."):
        child = way[-1]._modules.get(name)
        if child is not None:
            way.append(child)
    own = [module for module in way if hasattr(base_class(module), "__deepcopy__")]
    return base_class((own or [ref.host])[0]).__name__
