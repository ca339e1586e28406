"""nmfx.load: a file read into a model, all of it or nothing."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .capture.forms import forms_of, packed_names
from .capture.holder import move_state
from .capture.install import check_classes
from .capture.refs import iter_sites
from .capture.sharding import LOAD, refuse_sharded
from .errors import NMError
from .mask import same_values
from .save import uncompiled
from .storage.content import all_names, check_content, read_spec
from .storage.reading import Source, open_model
from .storage.restructure import restructure
from .storage.snapshot import Snapshot
from .storage.spec import Spec
from .storage.tensors import BUFFER, MASK, Slot, file_name, same_memory, slots_of
from .storage.wrapped import refuse_wrapped


def load(
    path: str | os.PathLike[str],
    into: nn.Module,
    *,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Makes a model the one that `nmfx.save` wrote, bit for bit.

    `into` is the dense model as its code builds it, with any weights or on the meta device; also
    one that is sparsified like the saved one, to continue training. Of a lowered model each layer
    gets the form that was chosen when it was lowered, on whatever machine that was; nothing is
    measured again. `nmfx.lower(nmfx.fold(model), x)` does so, for this machine.

    Parameters that stay dense keep their identity and device, and get the values. A layer that was
    packed loses its dense weight. What was attached to an optimizer stays so. Buffers that are in
    no state_dict are the code's to compute; only those on the meta device are read.

    Files of others (without a specification) are read too: their tensors must be those of `into`.
    If their zeros are N:M, `nmfx.lower` takes the result.

    Every tensor is read into memory, checked against its SHA-256 and for what it claims to be,
    before anything is changed.

    Args:
        path: "x.safetensors", an index of shards, or a folder with either.
        into: a model of the architecture and the dtypes that were saved.
        device: where those tensors go that `into` has on the meta device.

    Returns:
        `into`.

    Raises:
        NMError: a damaged file, a file of a later version, or another model. `into` is unchanged.
        FileNotFoundError: nothing is there.
    """
    with torch.inference_mode(False):  # what it makes must be good for training too
        _load(path, uncompiled(into, "load"), device)
    return into


def _load(path: str | os.PathLike[str], model: nn.Module, device: torch.device | str) -> None:
    refuse_sharded(model, "load", LOAD)
    check_classes(model)
    place = _device(device)
    source = open_model(path)
    spec, tensors = _read(source)
    named = tensors if spec is None else all_names(spec, tensors)
    _refuse_wrapped(source, model, {*named, *(() if spec is None else spec.layers)})
    snapshot, plan = Snapshot(model), None
    try:
        if spec is not None:
            restructure(model, spec, named, place)
        pending = _match(source, model, dict(named), complete=spec is not None)
        plan = pending, _fresh(pending, place)
        _finish(model, *plan)
    except BaseException:  # Ctrl-C too
        if plan is None:
            snapshot.restore()
        else:  # every value is here and checked, so the way out is forward
            _finish(model, *plan)
        raise


def _refuse_wrapped(source: Source, model: nn.Module, names: set[str]) -> None:
    own = {name for name in names if not name.startswith((BUFFER, MASK))}
    refuse_wrapped(
        [name for name, _ in model.named_parameters(remove_duplicate=False)],
        own,
        str(source.place.single),
    )


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise NMError(f"device={device!r}: {error}") from error
    return found


def _read(source: Source) -> tuple[Spec | None, dict[str, Tensor]]:
    """The specification and all tensors, checked."""
    try:
        spec = read_spec(source)
        if spec is None:
            return None, dict(source.read())
        packed = (n for n, its in spec.layers.items() if "packed" in forms_of(its.state))
        names = {key for name in packed for key in packed_names(name)}
        tensors = dict(source.read(spec.tensors, {spec.aliases.get(name, name) for name in names}))
        check_content(spec, tensors)
    except NMError as error:
        text = str(error)
        where = str(source.place.single)
        raise NMError(text if text.startswith(where) else f"{where}: {text}") from error
    return spec, tensors


class _Pending:
    """One tensor of a model, all its places, and the value that it gets."""

    def __init__(self, slot: Slot, value: Tensor) -> None:
        self.slots, self.value = [slot], value


def _match(
    source: Source, model: nn.Module, named: dict[str, Tensor], *, complete: bool
) -> list[_Pending]:
    """Finds the value of each tensor of a model; checks names, shapes and dtypes.

    Args:
        source: for messages.
        model: as it will be.
        named: what the file holds.
        complete: whether each name must be in the file; else one name of a shared tensor is enough.
    """
    where = source.place.single
    slots = slots_of(model)
    adopted = {id(value) for value in named.values()}
    pending: dict[Any, _Pending] = {}
    missing: dict[Any, str] = {}
    used: set[str] = set()
    for name, slot in slots.items():
        tensor, key = slot.tensor, same_memory(slot.tensor)
        if not slot.persistent and not tensor.is_meta:
            continue
        value = named.get(file_name(name, slot))
        if value is None:
            if complete or not slot.persistent:
                raise NMError(_absent(where, name, slot))
            missing[key] = name
            continue
        used.add(file_name(name, slot))
        if id(tensor) in adopted:
            continue  # it is the file's already
        _check_writable(name, tensor)
        if value.shape != tensor.shape or value.dtype != tensor.dtype:
            raise NMError(
                f"{where}: {name} is {value.dtype} {tuple(value.shape)} there and {tensor.dtype} "
                f"{tuple(tensor.shape)} in the model"
            )
        if key not in pending:
            pending[key] = _Pending(slot, value)
            continue
        other = pending[key]
        if other.value is not value and not same_values(other.value, value):
            raise NMError(f"{where}: {name} shares its memory in the model, but not in the file")
        other.slots.append(slot)
    for key, name in missing.items():
        if key not in pending:
            raise NMError(_absent(where, name, slots[name]))
    odd = sorted(name for name in named.keys() - used if not name.startswith((BUFFER, MASK)))
    if odd:
        raise NMError(
            f"{where}: it holds {odd[0]}, which the model has not (and {len(odd) - 1} more); build "
            f"the model that was saved"
        )
    return list(pending.values())


def _check_writable(name: str, tensor: Tensor) -> None:
    if tensor.is_inference():
        raise NMError(
            f"{name}: it was made in torch.inference_mode(); build the model outside of it"
        )
    if any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise NMError(f"{name}: its elements share memory (an expanded tensor); clone it first")


def _absent(where: Any, name: str, slot: Slot) -> str:
    if slot.persistent:
        return f"{where}: it has no {name}, which the model has; build the model that was saved"
    return (
        f"{name}: this buffer is in no state_dict, the model has it on the meta device, and "
        f"{where} does not hold it; build that module on a real device"
    )


def _fresh(pending: list[_Pending], device: torch.device) -> dict[int, Tensor]:
    """New tensors for places on the meta device, by the id of their `_Pending`."""
    fresh: dict[int, Tensor] = {}
    used: set[int] = set()  # a value that several get is copied: they are not tied
    for one in pending:
        old = one.slots[0].tensor
        if old.is_meta:
            value = one.value.to(device, copy=id(one.value) in used)
            used.add(id(one.value))
            is_parameter = isinstance(old, nn.Parameter)
            fresh[id(one)] = nn.Parameter(value, old.requires_grad) if is_parameter else value
    return fresh


@torch.no_grad()
def _finish(model: nn.Module, pending: list[_Pending], fresh: Mapping[int, Tensor]) -> None:
    """Gives every tensor its value; called again after an interruption, it does the rest."""
    while pending:
        one = pending[-1]
        new = fresh.get(id(one))
        if new is None:
            one.slots[0].tensor.copy_(one.value)
        else:
            for slot in one.slots:
                slot.table[slot.key] = new
        pending.pop()
    # Control tensors and masks of layers that were on the meta device follow their weights.
    for ref in iter_sites(model):
        if not ref.site.lowered:
            move_state(ref.store, functools.partial(torch.Tensor.to, device=ref.parameter.device))
