"""A model made what a specification says, all but the values of its dense tensors.

    norms         a bias for each convolution that a batch norm was folded into
    identities    nn.Identity in place of batch norms and fused activations
    lowered       packed and compressed tensors, from the file, in place of weights
    sparse        masked layers, with their patterns, lambda and fixed masks
    report        reasons and measurements

Everything in a file may be wrong on purpose: each name, number and text is checked against the
model before it is used. Nothing is undone here; the caller has a `Snapshot`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from ..capture.candidates import Candidate, find_candidates
from ..capture.fold_norm import NormFolding
from ..capture.forms import form_names, forms_of
from ..capture.fuse_activation import ActivationFusing, behind
from ..capture.install import install_guards, refresh
from ..capture.lowering import Target
from ..capture.neighbours import NORM_NAMES, is_norm, left_by
from ..capture.refs import SiteRef, iter_sites
from ..capture.site import (
    FOLDED,
    MADE_ON,
    MEASURED,
    NOTES,
    REPLACES,
    SITES,
    SKIPPED,
    Site,
    marks_of,
)
from ..capture.tied import admit_tied
from ..errors import NMError
from ..graph.follow import activation, called, module_activation
from ..kernels import semi_structured
from ..packing import matrix_shape
from ..pattern import Pattern
from ..plan import obstacle_to_packing
from ..schedule import change_pattern, fix_masks, free_masks
from ..sparsify import install_sites, new_site
from .graphs import graph_digests
from .spec import LOWERED, Layer, Spec
from .tensors import MASK, slots_of

_DENSE = Pattern(1, 1)


def restructure(
    model: nn.Module, spec: Spec, tensors: Mapping[str, Tensor], device: torch.device
) -> None:
    """Gives `model` the structure of the model that was saved.

    Args:
        model: dense, or of this structure already.
        spec, tensors: of the file, the tensors under all of their names.
        device: where tensors go whose place in `model` is on the meta device.

    Raises:
        NMError: the model is not that which was saved; it may be changed in part.
    """
    refs = {ref.name: ref for ref in iter_sites(model)}
    wanted = {name: layer for name, layer in spec.layers.items() if layer.state != "folded"}
    _check_existing(refs, wanted)
    new = {name: layer for name, layer in wanted.items() if name not in refs}
    _fold_norms(model, spec)
    _put_identities(model, spec.identities)
    lowered = {name: layer for name, layer in new.items() if layer.state in LOWERED}
    _lower(model, lowered, tensors, device)
    sparse = {name: layer for name, layer in wanted.items() if layer.state not in LOWERED}
    _check_shared(model, spec, sparse)
    _sparsify(model, sparse, tensors)
    if spec.graphs:
        found = graph_digests(model)
        odd = sorted(key for key in spec.graphs if found.get(key) != spec.graphs[key])
        if odd:
            raise NMError(
                f"{odd[0] or 'model'}: its graph is not the one that was saved; trace or export "
                f"the model as it was then, with the same versions of torch and of its code"
            )
    _remark(model, spec)


def _check_existing(refs: Mapping[str, SiteRef], wanted: Mapping[str, Layer]) -> None:
    if not refs:
        return
    odd = sorted(refs.keys() ^ wanted.keys())
    if odd:
        here, there = ("is", "is not") if odd[0] in refs else ("is not", "is")
        raise NMError(
            f"{odd[0]}: it {here} an N:M layer in the model and {there} one in the file; load "
            f"into the dense model (nmfx.unsparsify makes it), or one sparsified the same way"
        )
    for name, ref in refs.items():
        site, layer = ref.site, wanted[name]
        same = (site.shape, site.dim, site.kind, site.groups)
        if same != (layer.shape, layer.dim, layer.kind, layer.groups):
            raise NMError(f"{name}: it is {same} in the model and another layer in the file")
        mine, its = (_choice(one) for one in (site, layer))
        if (site.lowered or layer.state in LOWERED) and mine != its:
            raise NMError(
                f"{name}: it is {mine} in the model and {its} in the file; load into the dense "
                f"model"
            )


def _choice(one: Site | Layer) -> str:
    """What a lowered layer was made to be, in words."""
    words = [one.pattern.text, *([] if one.activation == "none" else [one.activation]), one.format]
    if one.algorithms:
        words.append(f"algorithms {list(one.algorithms)}")
    if one.threshold:
        words.append(f"up to {one.threshold} rows")
    return f"{one.state} ({', '.join(word for word in words if word)})"


def _check_shared(model: nn.Module, spec: Spec, layers: Mapping[str, Layer]) -> None:
    """A layer with several names in the file must be one here: only one of them is masked."""
    slots = slots_of(model)
    for alias, name in spec.aliases.items():
        here, there = (slots[key].tensor if key in slots else None for key in (alias, name))
        if name in layers and here is not there:
            raise NMError(f"{alias}: it is {name} in the file, and a weight of its own here")


def _candidate(found: Mapping[str, Candidate], name: str, layer: Layer) -> Candidate:
    """The layer of a model that a file speaks of."""
    c = found.get(name)
    if c is None:
        raise NMError(f"{name}: the model has no linear or conv layer of this name")
    if c.obstacle is not None:
        raise NMError(f"{name}: it is {layer.pattern.text} in the file, and here {c.obstacle}")
    mine, its = ((one.kind, tuple(one.shape), one.dim, one.groups) for one in (c, layer))
    if mine != its:
        raise NMError(
            f"{name}: it is a {mine[0]} of shape {mine[1]} in the model and a {its[0]} of shape "
            f"{its[1]} in the file" + ("" if mine[:2] != its[:2] else ", grouped otherwise")
        )
    if c.reduced % layer.pattern.m:
        raise NMError(f"{name}: {layer.pattern} does not fit its axis of {c.reduced}")
    return c


def _fold_norms(model: nn.Module, spec: Spec) -> None:
    found = {c.name: c for c in admit_tied(model, find_candidates(model))}
    modules = [name for name in spec.norms if name in found and found[name].capture != "graph"]
    left = sum(what in NORM_NAMES for what in spec.identities.values())
    if len(modules) > left:  # each left an nn.Identity
        raise NMError(
            f"{modules[0]}: batch norms were folded into {len(modules)} layers, it says, and "
            f"{left} became an nn.Identity; the file is damaged"
        )
    for name in spec.norms:
        c = found.get(name)
        if c is None or not c.kind.startswith(("conv", "linear")):
            raise NMError(
                f"{name}: a batch norm was folded into it, and it is no convolution or linear "
                f"layer here"
            )
        if c.path in marks_of(c.host).get(FOLDED, ()):
            continue
        if c.capture == "graph":
            target = Target(c, _DENSE)
            values = target.weight.detach(), target.weight.new_empty(c.shape[0])
            why = NormFolding().fold_graph(target, values)
            if why != "":
                reason = why or "no batch norm follows it"
                raise NMError(f"{name}: a batch norm was folded into it, and here {reason}")
            continue
        bias, weight = c.host._parameters.get("bias"), c.host._parameters.get("weight")
        if weight is None or "bias" not in c.host._parameters:
            raise NMError(f"{name}: a batch norm was folded into it, and here it has no bias")
        if bias is None:
            empty = weight.new_empty(c.shape[0])
            c.host._parameters["bias"] = nn.Parameter(empty, weight.requires_grad)
        marks_of(c.host)[FOLDED] = (*marks_of(c.host).get(FOLDED, ()), c.path)


def _put_identities(model: nn.Module, identities: Mapping[str, str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    new: dict[nn.Module, nn.Module] = {}
    # Inner ones first: what stays of a batch norm takes its children over.
    for name, what in sorted(identities.items(), key=lambda item: -item[0].count(".")):
        old = modules.get(name)
        if old is None or not name:
            raise NMError(f"{name}: it became an nn.Identity, and the model has no such module")
        if old.__dict__.get(REPLACES) == what:
            continue
        kind = type(old).__name__ if is_norm(old) else module_activation(old)
        if kind != what:
            raise NMError(
                f"{name}: {what} was replaced by nn.Identity there, and here it is a "
                f"{type(old).__name__}"
            )
        if old not in new and is_norm(old):
            new[old] = left_by(old)
        elif old not in new:
            new[old] = nn.Identity().train(old.training)
            new[old].__dict__[REPLACES] = what
        prefix, _, key = name.rpartition(".")
        modules[prefix]._modules[key] = new[old]


def _lower(
    model: nn.Module,
    layers: Mapping[str, Layer],
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    if not layers:
        return
    found = {c.name: c for c in admit_tied(model, find_candidates(model))}
    targets = []
    for name, layer in layers.items():
        c = _candidate(found, name, layer)
        target = Target(c, layer.pattern)
        reason = obstacle_to_packing(c, layer.pattern, target.weight)
        c = target.candidate
        if layer.state == "prepacked" and c.capture != "leaf":
            reason = f"it is captured as {c.capture}"
        if reason is not None or c.capture != layer.capture:
            raise NMError(
                f"{name}: it is {layer.state} in the file, which this model does not allow: "
                f"{reason or f'its capture is {c.capture}, not {layer.capture}'}"
            )
        place = device if target.device.type == "meta" else target.device
        moved = {
            form: _moved(name, form, layer, target, tensors, place)
            for form in forms_of(layer.state)
        }
        target.adopt(layer.state, moved, layer.format, layer.algorithms, layer.threshold)
        targets.append(target)
        if layer.activation != "none" and c.capture == "leaf":
            c.host.__dict__[SITES][0].activation = layer.activation
            refresh(c.host, c.host)
    hosts = {target.candidate.host for target in targets}
    install_guards(model, hosts)
    activations = ActivationFusing()
    for target in targets:
        if target.candidate.capture == "graph":
            activations.fuse_graph(target)
    _drop_fused_nodes(model)


def _moved(
    name: str,
    form: str,
    layer: Layer,
    target: Target,
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> tuple[Tensor, ...]:
    """The tensors of one form of a lowered layer on their device; none of a dense weight."""
    if form in ("prepacked", "dense"):
        return ()
    names = form_names(name, form)
    dtype = tensors[names[0]].dtype if form == "packed" else layer.dtype
    assert dtype is not None, layer
    if dtype != target.weight.dtype:
        raise NMError(f"{name}: it is {dtype} in the file and {target.weight.dtype} in the model")
    if form == "semi_structured":
        backend = semi_structured.backend_of(device)
        here = (
            f"no such layers ({backend})"
            if isinstance(backend, str)
            else semi_structured.format_of(backend, dtype, device)
        )
        if here != layer.format:
            raise NMError(
                f"{name}: the file holds it as {layer.format}, and {device} has {here}; lower the "
                f"dense model here"
            )
        out, into = matrix_shape(layer.shape, layer.dim)
        assert not isinstance(backend, str)
        sizes = tuple(tensors[key].nbytes for key in names)
        if not semi_structured.has_size(sizes, out, into, backend):
            raise NMError(f"{name}: its tensors have {sizes} bytes; the file is damaged")
        if backend is semi_structured.CUSPARSELT:
            found = tuple(tensors[names[0]].shape)
            wanted = semi_structured.compressed_shape(out, into, dtype, device)
            if found != wanted:
                raise NMError(
                    f"{name}: its bytes have the shape {found}, and torch {torch.__version__} "
                    f"makes {wanted}; lower the dense model here"
                )
    return tuple(tensors[key].to(device) for key in names)


def _drop_fused_nodes(model: nn.Module) -> None:
    """Takes functions out of graphs whose work a packed layer before them does itself."""
    for gm in model.modules():
        if not isinstance(gm, fx.GraphModule):
            continue
        modules = dict(gm.named_modules(remove_duplicate=False))
        changed = False
        for node in list(gm.graph.nodes):
            layer = called(modules, node)
            sites: list[Site] = layer.__dict__.get(SITES, []) if layer is not None else []
            if len(sites) != 1 or sites[0].activation == "none":
                continue
            source, after = behind(node, modules)
            if after is not None and activation(after, source, modules) == sites[0].activation:
                after.replace_all_uses_with(source)
                gm.graph.erase_node(after)
                changed = True
        if changed:
            gm.recompile()


def _sparsify(model: nn.Module, layers: Mapping[str, Layer], tensors: Mapping[str, Tensor]) -> None:
    if not layers:
        return
    found = {c.name: c for c in admit_tied(model, find_candidates(model))}
    new = []
    for name, layer in layers.items():
        if name in found and found[name].site is not None:
            continue
        c = _candidate(found, name, layer)
        new.append((c, new_site(c, layer.pattern, layer.lambda_w)))
    if new:
        install_sites(model, new)
    schedule(
        {ref.name: ref for ref in iter_sites(model)},
        layers,
        {name: tensors[MASK + name] for name in layers if layers[name].state == "frozen"},
    )


def schedule(
    refs: Mapping[str, SiteRef], layers: Mapping[str, Layer], masks: Mapping[str, Tensor]
) -> None:
    """Gives sparsified layers their patterns, lambdas and fixed masks."""
    thawed = [refs[name] for name in layers if refs[name].site.state == "frozen"]
    free_masks(thawed)
    fixed = []
    for name, layer in layers.items():
        ref = refs[name]
        if layer.pattern != ref.site.pattern:
            change_pattern(ref, layer.pattern)
        ref.site.lambda_w = layer.lambda_w
        ref.refresh_control()
        if layer.state == "frozen":
            weight = ref.parameter
            place = masks[name].device if weight.is_meta else weight.device
            fixed.append((ref, masks[name].to(place, copy=True)))
    fix_masks(fixed)


def _remark(model: nn.Module, spec: Spec) -> None:
    """What the report tells; replaces what it told before."""
    for module in model.modules():
        for key in (SKIPPED, MEASURED):
            marks_of(module).pop(key, None)
    for c in find_candidates(model):
        if c.name in spec.reasons:
            marks_of(c.host).setdefault(SKIPPED, {})[c.path] = spec.reasons[c.name]
        if c.name in spec.measured:
            marks_of(c.host).setdefault(MEASURED, {})[c.path] = spec.measured[c.name]
    for key, value in ((NOTES, spec.notes), (MADE_ON, spec.made_on)):
        marks_of(model).pop(key, None)
        if value:
            marks_of(model)[key] = value
