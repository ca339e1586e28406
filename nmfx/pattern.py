"""The N:M mini-language: parsed once, strictly, into an immutable value. No torch in here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

from .errors import NMError

# One group of weights is compared in registers by every kernel, and an index of a kept weight
# has to fit one byte with room to spare.
MAX_M = 64

# ASCII digits only: int() would also take "\uff12" (full width), "2_0", " 2 ", "+2" and "2\n".
_TEXT = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)", re.ASCII)

PatternLike = Union[str, tuple[int, int], "Pattern"]


@dataclass(frozen=True, order=True)
class Pattern:
    """Keep the ``n`` largest of every ``m`` consecutive weights along the reduced axis.

    N:M always counts the *kept* weights, as in the paper and on NVIDIA hardware (SparseGPT and
    Wanda count the pruned ones: there, ``prune_n = m - n``). ``n == m`` keeps everything.

    Args:
        n: weights kept per group, ``1 <= n <= m``.
        m: group length, ``1 <= m <= 64``.

    Raises:
        NMError: ``n`` or ``m`` is not an int in range.

    Reference: Zhou et al., ICLR 2021, arXiv 2102.04010.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        for value in (self.n, self.m):
            if type(value) is not int:  # bool and numpy integers would print and hash oddly
                raise NMError(
                    f"pattern ({self.n!r}, {self.m!r}): N and M must be int, "
                    f"got {type(value).__name__}; write for example (2, 4)"
                )
        if not 1 <= self.n <= self.m <= MAX_M:
            raise NMError(
                f"pattern {self.n}:{self.m} breaks 1 <= N <= M <= {MAX_M}; N:M means keep N of "
                f"every M, for example '2:4'"
            )

    @classmethod
    def parse(cls, spec: PatternLike) -> Pattern:
        """Reads ``"2:4"``, ``(2, 4)`` or a Pattern.

        The grammar is two ASCII numbers without sign, leading zero, blank or newline.

        Raises:
            NMError: anything else, with the text it got and an example.
        """
        if isinstance(spec, Pattern):
            return spec
        if isinstance(spec, str):
            match = _TEXT.fullmatch(spec)
            if match is None:
                raise NMError(
                    f"pattern {spec!r} is not of the form 'N:M' with 1 <= N <= M <= {MAX_M} "
                    f"(ASCII digits, no blanks or signs); write for example '2:4'"
                )
            return cls(int(match[1]), int(match[2]))
        if type(spec) is tuple and len(spec) == 2:
            return cls(*spec)
        raise NMError(
            f"pattern {spec!r} is a {type(spec).__name__}; "
            f"give a string like '2:4' or a tuple like (2, 4)"
        )

    @property
    def text(self) -> str:
        """The short form, ``"2:4"``, which `parse` reads back."""
        return f"{self.n}:{self.m}"

    @property
    def density(self) -> float:
        """The share of weights kept, ``n / m``."""
        return self.n / self.m

    def __str__(self) -> str:
        return f"{self.text} (keep {self.n} of every {self.m})"

    def __repr__(self) -> str:
        return f"Pattern({self.n}, {self.m})  # keep {self.n} of every {self.m}"
