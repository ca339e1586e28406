"""Weights that several modules share, sparsified knowingly.

    embed.weight ---- sr_ste -> embedding lookup
          |                                            one parameter, one pattern, one group
          +---------- sr_ste -> linear (lm_head)       dimension: the same mask everywhere

What reads a shared weight raw would see another weight than the folded model has, so all modules
that share it are masked, or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from ..errors import NMError
from ..mask import same_values
from .candidates import Candidate, scoped_candidate, tied_obstacle
from .own_weights import EMBEDDING
from .refs import SiteRef, iter_sites
from .site import join, place_of


def admit_tied(model: nn.Module, candidates: list[Candidate]) -> list[Candidate]:
    """The candidates, of which those whose only obstacle is that they are tied lose it.

    Embeddings among the modules that share a weight become candidates too, where all can be masked
    alike; else the obstacle names the one that cannot.
    """
    by_name = {candidate.name: candidate for candidate in candidates}
    added: dict[str, Candidate] = {}
    result = []
    for candidate in candidates:
        if candidate.site is None and candidate.tied and _only_tied(candidate):
            partners = [
                by_name.get(name) or added.get(name) or _embedding(model, name, candidate)
                for name in candidate.tied
            ]
            obstacle = _obstacle(candidate, partners)
            if obstacle is None:
                added |= {p.name: p for p in partners if p is not None and p.name not in by_name}
            candidate = replace(candidate, obstacle=obstacle)
        result.append(candidate)
    return [*added.values(), *result]  # an output layer comes last


def _only_tied(candidate: Candidate) -> bool:
    return candidate.obstacle == tied_obstacle(candidate)


def _embedding(model: nn.Module, name: str, of: Candidate) -> Candidate | None:
    """The candidate for an embedding that shares its weight with `of`; None if it is none."""
    fqn, _, path = name.rpartition(".")
    module = model.get_submodule(fqn)
    if not isinstance(module, nn.Embedding) or path != EMBEDDING.path:
        return None
    candidate = scoped_candidate(fqn, module, EMBEDDING)
    candidate.tied = tuple(other for other in (of.name, *of.tied) if other != name)
    if module.sparse:
        candidate.obstacle = "its gradients are sparse (nn.Embedding(sparse=True))"
    if module.max_norm is not None:
        candidate.obstacle = "it writes to its weight (nn.Embedding(max_norm=...))"
    return candidate


def _obstacle(candidate: Candidate, partners: list[Candidate | None]) -> str | None:
    for name, partner in zip(candidate.tied, partners, strict=True):
        start = f"its weight is tied to {name}"
        if partner is None:
            return f"{start}, which nmfx cannot mask"
        if candidate.capture == "graph" or partner.capture == "graph":
            return f"{start}, and a graph reads it"
        if partner.obstacle is not None and not _only_tied(partner):
            return f"{start}: {partner.obstacle}"
        if (partner.dim, partner.reduced) != (candidate.dim, candidate.reduced):
            return f"{start}, which sums over another dimension"
    return None


def refuse_tied_since(model: nn.Module) -> None:
    """Refuses to write masks into weights that were tied after `sparsify`, by hand.

    Raises:
        NMError: one that a module reads without its mask, or with another pattern.
    """
    sites: dict[int, SiteRef] = {}
    masked: set[tuple[nn.Module, str]] = set()
    for ref in iter_sites(model):
        if ref.site.lowered:
            continue
        masked.add(place_of(ref.host, ref.site.path))
        first = sites.setdefault(id(ref.parameter), ref)
        if (first.site.pattern, first.site.dim) != (ref.site.pattern, ref.site.dim):
            raise NMError(
                f"{first.name} and {ref.name} are one tensor since they were sparsified, with two "
                f"patterns or dimensions; give each a parameter of its own"
            )
    for fqn, module in model.named_modules():
        for path, parameter in module._parameters.items():
            tied = sites.get(id(parameter))
            if tied is not None and (module, path) not in masked:
                raise NMError(
                    f"{tied.name}: it is tied to {join(fqn, path)} since it was sparsified, which "
                    f"reads it without the mask; give each a parameter of its own, or call "
                    f"nmfx.unsparsify, and nmfx.sparsify with tied=True to mask both"
                )


def retie(model: nn.Module, ties: Mapping[str, tuple[str, ...]]) -> None:
    """Makes weights one parameter again that were one before they were lowered.

    Args:
        model: the lowered one, its weights dense again.
        ties: of such weights, by name, the other names that they had. A name that the model does
            not have (it is a part of the one that was lowered), or whose values are others by now,
            is passed over.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, others in ties.items():
        # One parameter for all: what was dense all the time, if there is such.
        names = sorted((name, *others), key=lambda one: (one in ties, one))
        first: nn.Parameter | None = None
        for table, key in (_place(modules, one) for one in names):
            parameter = table.get(key)
            if first is None:
                first = parameter
            elif parameter is not None and parameter is not first and _same(first, parameter):
                table[key] = first


def _same(one: nn.Parameter, other: nn.Parameter) -> bool:
    kinds = [(p.shape, p.dtype, p.device) for p in (one, other)]
    return kinds[0] == kinds[1] and same_values(one.detach(), other.detach())


def names_now(name: str, then: tuple[str, ...]) -> tuple[str, ...]:
    """What the other names of a tied weight are in the model that it is in now.

    Args:
        name: of the weight in that model: a part of the one that was lowered, or one around it.
        then: its name in the one that was lowered, and the others; or nothing.
    """
    if not then:
        return ()
    own, others = then[0], then[1:]
    if f".{name}".endswith(f".{own}"):
        prefix = name[: len(name) - len(own)]
        return tuple(prefix + other for other in others)
    if own.endswith(f".{name}"):
        prefix = own[: len(own) - len(name)]
        return tuple(other[len(prefix) :] for other in others if other.startswith(prefix))
    return ()


def _place(
    modules: Mapping[str, nn.Module], name: str
) -> tuple[dict[str, nn.Parameter | None], str]:
    """(the table of parameters that a name is in, its key there)."""
    fqn, _, key = name.rpartition(".")
    return (modules[fqn]._parameters if fqn in modules else {}), key
