"""nmfx.sparsify and its undo."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn

from .capture.candidates import Candidate, find_candidates
from .capture.fsdp import follow_below
from .capture.graph_module import rewrite_graph
from .capture.holder import HOLDER, Holder, holder_of
from .capture.install import check_classes, class_for, install_guards, remove
from .capture.refs import iter_sites
from .capture.site import (
    MEASURED,
    SITES,
    SKIPPED,
    Site,
    add_sites,
    get_path,
    marks_of,
    stored_names,
)
from .capture.take_over import decomposed_names, exported_nodes, recompose, take_over
from .capture.tied import admit_tied
from .errors import NMError
from .pattern import Pattern
from .policy import Decision, Rule, Rules, check_lambda, decide, parse_rules
from .storage.snapshot import Snapshot

# The default of the SR-STE paper. Reference: arXiv 2102.04010.
DEFAULT_LAMBDA_W = 2e-4


def sparsify(
    model: nn.Module, rules: Rules, *, lambda_w: float = DEFAULT_LAMBDA_W, tied: bool = False
) -> nn.Module:
    """Rewrites linear and conv layers so that they compute with N:M masked weights.

    In place; parameters, state_dict keys, hooks and `isinstance` stay as they are. Train as
    before: the mask follows the weights at every forward, and the gradient of a weight is
    `g + lambda_w * (1 - mask) * weight` (SR-STE), in train and eval mode alike. The decay counts
    once per use of a layer: twice for a module that is called twice (but once for a weight that
    one fx graph uses twice, which has one sr_ste node). `nmfx.attach` makes it once per step.

    Args:
        model: any `nn.Module` or `fx.GraphModule`.
        rules: a pattern ("2:4" keeps 2 of every 4) for the default policy, or a mapping of globs
            over module names to patterns or None, of which the first match counts. The default
            policy, also under the glob "*", keeps the output layer dense; any other rule that
            matches it includes it. Layers that no rule matches stay dense.
        lambda_w: strength of the decay of pruned weights, >= 0; 0 is plain STE.
        tied: admit weights that several modules share; they stay dense otherwise. All modules
            that share one are masked, an `nn.Embedding` among them too (name the output layer in a
            rule: `{"lm_head": "2:4", "*": "2:4"}`), so that they still agree after `nmfx.fold`. The
            decay inside backward counts once per use, that of `nmfx.attach` once.

    Returns:
        `model` itself.

    Raises:
        NMError: a pattern, rule or lambda that does not hold, two patterns for a tied weight, a
            rule that matches no module, an exact name that cannot be sparsified, a layer that
            already has another pattern, or nothing to sparsify. The model is unchanged then.

    Reference: arXiv 2102.04010.
    """
    _check_model(model)
    lambda_w = check_lambda(lambda_w)
    parsed = parse_rules(rules)
    with unchanged_if_refused(model):
        recompose(taken_over(model))
        _sparsify(model, parsed, lambda_w, tied)
    return model


def _sparsify(model: nn.Module, parsed: list[Rule], lambda_w: float, tied: bool) -> None:
    candidates = find_candidates(model)
    if tied:
        candidates = admit_tied(model, candidates)
    decisions = decide(model, candidates, parsed)
    check_existing(decisions)
    chosen = [d for d in decisions if d.pattern is not None]
    if not chosen:
        raise NMError(_nothing(model, decisions))

    install_sites(
        model,
        [
            (d.candidate, new_site(d.candidate, d.pattern, lambda_w))
            for d in chosen
            if d.candidate.site is None and d.pattern is not None
        ],
    )
    _note_reasons(decisions)


@contextmanager
def unchanged_if_refused(model: nn.Module) -> Iterator[None]:
    """Undoes on an error what taking over the exported graphs of a model changed.

    It is done before anything is known of what the caller asks. Without such graphs nothing is.
    """
    module = isinstance(model, nn.Module)
    exported = module and (exported_nodes(model) or decomposed_names(model))
    snapshot = Snapshot(model) if exported else None
    try:
        yield
    except BaseException:  # Ctrl-C too
        if snapshot is not None:
            snapshot.restore()
        raise


def taken_over(model: nn.Module, inplace: bool = True) -> nn.Module:
    """A model, or a copy of it, whose exported masks and packed weights are sites again.

    Without any it is `model` itself. See `take_over`.
    """
    taken, masked = take_over(model, inplace)
    if masked:
        install_sites(taken, masked)
    return taken


def install_sites(model: nn.Module, new: list[tuple[Candidate, Site]]) -> None:
    """Rewrites the hosts of candidates that have no site yet, so that they have these."""
    # Build everything first; what follows only assigns attributes.
    hosts: dict[nn.Module, list[tuple[Candidate, Site]]] = defaultdict(list)
    for candidate, site in new:
        hosts[candidate.host].append((candidate, site))
    planned = []
    for host, pairs in hosts.items():
        sites = [*_store_sites(host), *(site for _, site in pairs)]
        in_graph = pairs[0][0].capture == "graph"
        planned.append((host, sites, None if in_graph else class_for(host, sites)))

    for host, sites, cls in planned:
        _install(host, sites, cls)
    install_guards(model, set(hosts))
    follow_below(model, hosts)


def unsparsify(model: nn.Module) -> nn.Module:
    """Undoes `sparsify`: the dense model with the weights as trained, pruned ones included.

    In place; parameters are the same objects with the same values.

    Returns:
        `model` itself.

    Raises:
        NMError: nothing is sparsified, or a layer was lowered (its pruned weights are gone).
    """
    _check_model(model)
    check_classes(model)
    found = False
    for fqn, module in model.named_modules():
        for site in [*module.__dict__.get(SITES, ()), *_graph_sites(module)]:
            found = True
            if site.lowered:
                raise NMError(
                    f"{fqn or 'model'}: {site.path} is {site.state}; its dense weight is gone"
                )
    if not found:
        raise NMError(f"nmfx.unsparsify: {type(model).__name__} has no sparsified layer")
    restore(model)
    return model


def restore(model: nn.Module) -> None:
    """Removes everything nmfx from a model, except from layers that are lowered."""
    for module in list(model.modules()):
        remove(module)
        marks_of(module).pop(SKIPPED, None)
        if SITES not in module.__dict__:
            marks_of(module).pop(MEASURED, None)
    install_guards(model, {ref.host for ref in iter_sites(model)})  # over lowered layers


def _check_model(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise NMError("the model is a ScriptModule; sparsify it before torch.jit.script")
    if not isinstance(model, nn.Module):
        raise NMError(f"nmfx works on an nn.Module, got {type(model).__name__}")


def check_existing(decisions: list[Decision]) -> None:
    """Refuses another pattern than a layer has already."""
    for decision in decisions:
        site, pattern = decision.candidate.site, decision.pattern
        if site is not None and pattern is not None and site.pattern != pattern:
            raise NMError(
                f"{decision.candidate.module_name or 'model'}: it is {site.pattern} already, not "
                f"{pattern}; use nmfx.set_pattern to change it"
            )


def _nothing(model: nn.Module, decisions: list[Decision]) -> str:
    kind = type(model).__name__
    if not decisions:
        return f"{kind} has no linear or conv layer that nmfx could sparsify"
    first = decisions[0]
    return (
        f"nothing to sparsify in {kind}: all {len(decisions)} linear and conv weights stay dense, "
        f"the first one, {first.candidate.name}, because {first.reason}"
    )


def new_site(c: Candidate, pattern: Pattern, lambda_w: float) -> Site:
    """The site that a candidate gets when it is sparsified."""
    return Site(
        c.path, c.shape, c.dim, c.reduced, pattern, lambda_w, c.kind, c.capture, groups=c.groups
    )


def _graph_sites(module: nn.Module) -> list[Site]:
    holder = holder_of(module)
    return holder.__dict__[SITES] if holder is not None else []


def _store_sites(host: nn.Module) -> list[Site]:
    return [*host.__dict__.get(SITES, ()), *_graph_sites(host)]


def _install(host: nn.Module, sites: list[Site], cls: type[nn.Module] | None) -> None:
    devices = [get_path(host, stored_names(site)[0]).device for site in sites]
    if cls is None:
        holder = holder_of(host) or Holder()
        host._modules[HOLDER] = holder
        add_sites(holder, sites, devices)
        assert isinstance(host, fx.GraphModule)
        rewrite_graph(host)
    else:
        add_sites(host, sites, devices)
        host.__class__ = cls


def _note_reasons(decisions: list[Decision]) -> None:
    """Leaves the reason on each skipped layer, for the report; replaces those of earlier calls."""
    for decision in decisions:
        candidate = decision.candidate
        reasons = marks_of(candidate.host).setdefault(SKIPPED, {})
        reasons.pop(candidate.path, None)
        if decision.pattern is None and candidate.site is None:
            reasons[candidate.path] = decision.reason
        if not reasons:
            del marks_of(candidate.host)[SKIPPED]
