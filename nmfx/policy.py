"""Which layer gets which pattern: the user's rules, and the default policy under them."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Union

from torch import nn

from .capture.candidates import Candidate
from .errors import NMError
from .pattern import Pattern, PatternLike

Rules = Union[PatternLike, Mapping[str, PatternLike | None]]  # noqa: UP007 (has a forward)

EVERYTHING = "*"


@dataclass(frozen=True)
class Rule:
    """One of the user's rules: a glob over module names, and a pattern or None (stay dense)."""

    glob: str
    pattern: Pattern | None

    @property
    def exact(self) -> bool:
        """Whether it names one module, without wildcards."""
        return not any(character in self.glob for character in "*?[")

    @property
    def default(self) -> bool:
        """Whether it is the catch-all, under which the default policy keeps the head dense."""
        return self.glob == EVERYTHING

    def matches(self, module_name: str) -> bool:
        """Whether a module's fully qualified name matches; the root module's name is ""."""
        return fnmatch.fnmatchcase(module_name, self.glob)


def parse_rules(rules: Rules) -> list[Rule]:
    """Reads "2:4", (2, 4), a Pattern, or a mapping of globs to patterns or None.

    Raises:
        NMError: an empty mapping, a key that is no string, or a pattern outside the grammar.
    """
    if not isinstance(rules, Mapping):
        return [Rule(EVERYTHING, Pattern.parse(rules))]
    if not rules:
        raise NMError("the rules are empty; write for example {'*': '2:4'}")
    parsed = []
    for glob, pattern in rules.items():
        if not isinstance(glob, str):
            raise NMError(f"rule {glob!r}: keys are globs over module names, like 'encoder.*'")
        try:
            parsed.append(Rule(glob, None if pattern is None else Pattern.parse(pattern)))
        except NMError as error:
            raise NMError(f"rule {glob!r}: {error}") from None
    return parsed


def check_lambda(lambda_w: Any) -> float:
    """`lambda_w` as a float.

    Raises:
        NMError: not a finite number >= 0. A negative decay pushes pruned weights back over the
            threshold: churn rises and training collapses.
    """
    if isinstance(lambda_w, bool) or not isinstance(lambda_w, (int, float)):
        raise NMError(f"lambda_w={lambda_w!r} is not a number; the paper's default is 2e-4")
    if not 0.0 <= lambda_w < float("inf"):
        raise NMError(
            f"lambda_w={lambda_w!r} is not finite and >= 0: SR-STE decays pruned weights towards "
            f"zero, 0 is plain STE; the paper's default is 2e-4"
        )
    try:
        return float(lambda_w)
    except OverflowError:
        raise NMError("lambda_w is an integer that no float holds") from None


@dataclass(frozen=True)
class Decision:
    """What becomes of one candidate: its pattern, or None and the reason."""

    candidate: Candidate
    pattern: Pattern | None
    reason: str


def decide(model: nn.Module, candidates: list[Candidate], rules: list[Rule]) -> list[Decision]:
    """Applies the first matching rule to each candidate.

    Raises:
        NMError: a rule that matches no module; an exact name that cannot be sparsified; two
            patterns for one tied weight.
    """
    _check_rules(model, candidates, rules)
    head = head_names(model, candidates)
    decisions = [_decide(candidate, rules, head) for candidate in candidates]
    return _agree(decisions) if any(c.tied for c in candidates) else decisions


def _agree(decisions: list[Decision]) -> list[Decision]:
    """Gives an embedding what the layers decide that it is tied to.

    Raises:
        NMError: these differ.
    """
    by_name = {decision.candidate.name: decision for decision in decisions}
    agreed = []
    for decision in decisions:
        candidate = decision.candidate
        others = [by_name[name] for name in candidate.tied if name in by_name]
        others = [other for other in others if other.candidate.kind != "embedding"]
        if candidate.kind == "embedding" and others and candidate.site is None:
            reason = "" if others[0].pattern else f"{others[0].candidate.name} stays dense"
            decision = replace(decision, pattern=others[0].pattern, reason=reason)
        patterns = {other.pattern for other in others} | {decision.pattern}
        if candidate.obstacle is None and candidate.site is None and len(patterns) > 1:
            raise NMError(
                f"{candidate.name} and {candidate.tied[0]} are one tensor, and the rules give it "
                f"{' and '.join(sorted(str(p) for p in patterns))}; give both the same pattern"
            )
        agreed.append(decision)
    return agreed


def _decide(candidate: Candidate, rules: list[Rule], head: set[str]) -> Decision:
    rule = next((rule for rule in rules if rule.matches(candidate.module_name)), None)
    if rule is None:
        return Decision(candidate, None, "no rule matches")
    if rule.pattern is None:
        return Decision(candidate, None, f"kept dense by rule {rule.glob!r}")
    if candidate.site is not None:
        return Decision(candidate, rule.pattern, "")
    obstacle = obstacle_to(candidate, rule.pattern)
    if obstacle is not None:
        if rule.exact:
            raise NMError(
                f"{candidate.module_name or 'model'}: {obstacle}; "
                f"skip it with {{{candidate.module_name!r}: None}}"
            )
        return Decision(candidate, None, obstacle)
    if rule.default and candidate.module_name in head:
        return Decision(
            candidate,
            None,
            "the output layer stays dense by default; name it in a rule to include it",
        )
    return Decision(candidate, rule.pattern, "")


def obstacle_to(candidate: Candidate, pattern: Pattern) -> str | None:
    """Why a candidate cannot take a pattern, or None."""
    if candidate.obstacle is not None:
        return candidate.obstacle
    reduced = candidate.reduced
    if reduced % pattern.m == 0:
        return None
    name, crossed = {
        "linear": ("in_features", "rows"),
        "addmm": ("in_features", "columns"),
        "conv": ("in_channels/groups", "kernel positions"),
        "conv_transpose": ("in_channels/groups", "channel groups"),
        "recurrent": ("the axis it sums over", "gates"),
        "bilinear": ("in2_features", "rows"),
        "embedding": ("embedding_dim", "rows"),
        "experts": ("the axis it sums over", "rows"),
    }[candidate.kind]
    return (
        f"{name}={reduced} is not a multiple of {pattern.m}, "
        f"so {pattern.text} groups would straddle {crossed}"
    )


def _check_rules(model: nn.Module, candidates: list[Candidate], rules: list[Rule]) -> None:
    names = {name for name, _ in model.named_modules()} | {c.module_name for c in candidates}
    layers = {candidate.module_name for candidate in candidates}
    for rule in rules:
        if not any(rule.matches(name) for name in names):
            wrapped = "_orig_mod" in model._modules
            raise NMError(
                f"rule {rule.glob!r} matches no module of {type(model).__name__}; "
                + ("torch.compile puts '_orig_mod.' before all names; " if wrapped else "")
                + "print(nmfx.report(model)) lists the layers"
            )
        # None for a container would silently leave out nothing; for an embedding, say, it is true.
        below = any(name.startswith(f"{rule.glob}." if rule.glob else "") for name in layers)
        if rule.exact and rule.glob not in layers and (below or rule.pattern is not None):
            raise NMError(
                f"rule {rule.glob!r} names a {type(model.get_submodule(rule.glob)).__name__}, "
                f"which is no linear or conv layer; for all layers below it write "
                f"{rule.glob + '.*' if rule.glob else '*'!r}"
            )


def head_names(model: nn.Module, candidates: list[Candidate]) -> set[str]:
    """Names of the output layers, which the default policy keeps dense, as the paper does.

    Hugging Face's output embeddings, timm's classifier, else the last linear layer of a model
    with several layers.
    """
    declared = _declared_heads(model)
    if declared is not None:
        below = {module for head in declared for module in head.modules()}  # PEFT may wrap a head
        return {name for name, module in model.named_modules() if module in below}
    # A projection inside an attention module is not an output layer, and what PEFT added is none.
    linear = [
        c
        for c in candidates
        if c.kind in ("linear", "addmm")
        and not isinstance(c.host, nn.MultiheadAttention)
        and not (c.adapted is not None and c.adapted.added)
    ]
    several = len({candidate.module_name for candidate in candidates}) > 1
    return {linear[-1].module_name} if linear and several else set()


def _declared_heads(model: nn.Module) -> set[nn.Module] | None:
    for method in ("get_output_embeddings", "get_classifier"):
        try:
            heads = getattr(model, method, lambda: None)()
        except (NotImplementedError, AttributeError):  # declared by a base class, not by this model
            continue
        heads = {head for head in _as_tuple(heads) if isinstance(head, nn.Module)}
        if heads:
            return heads
    return None


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)
