"""The one error nmfx raises for input it cannot accept."""

from __future__ import annotations


class NMError(ValueError):
    """A value, model or file that nmfx cannot accept.

    The message names the value it got, the rule it breaks, the layer (fully qualified name)
    when there is one, and what to do. Nothing has been changed when it is raised.
    """
