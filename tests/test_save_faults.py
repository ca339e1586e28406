"""nmfx.load against damage of every kind: it refuses, or loads exactly what was saved."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_timer import install
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nmfx
from nmfx.kernels import semi_structured as semi
from nmfx.storage.digests import sha256_of
from nmfx.storage.spec import digest

# Each mutation is one load. `make test` tries some of them, `make test-all` all.
QUICK, ALL = 1_500, 10_000


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


def _frozen() -> nn.Module:
    model = nmfx.sparsify(Net(), {"a": "2:4", "b": "1:4", "c": None})
    nmfx.freeze(model)
    return model


def _packed() -> nn.Module:
    return nmfx.lower(nmfx.sparsify(Net(), {"a": "2:4", "b": "1:8", "c": None}), tune=False)


MODELS: dict[str, Callable[[], nn.Module]] = {"frozen": _frozen, "packed": _packed}


def state_of(model: nn.Module) -> tuple[Any, ...]:
    return (
        str(nmfx.report(model)),
        [(k, sha256_of(v.contiguous())) for k, v in model.state_dict().items()],
        [
            (k, sha256_of(v))
            for m in model.modules()
            for k, v in vars(m).items()
            if k.startswith("_nmfx_mask")
        ],
    )


def outcome(path: Path, into: nn.Module, saved: Any) -> str:
    """What became of loading a file: "refused" or "loaded"; anything else fails the test."""
    before, refusal = state_of(into), None
    try:
        nmfx.load(path, into=into)
    except nmfx.NMError as error:
        refusal = str(error)
    except FileNotFoundError:
        return "missing"
    if refusal is not None:
        assert state_of(into) == before, f"changed, although refused: {refusal}"
        assert len(refusal) > 20
        return "refused"
    assert state_of(into) == saved, "loaded, but not what was saved"
    return "loaded"


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One random damage."""
    out = bytearray(data)
    header = 8 + int.from_bytes(data[:8], "little")
    kind = chance.randrange(8)
    if kind == 0:  # a bit anywhere
        out[chance.randrange(len(out))] ^= 1 << chance.randrange(8)
    elif kind == 1:  # a bit of the header
        out[chance.randrange(header)] ^= 1 << chance.randrange(8)
    elif kind == 2:  # truncated
        del out[chance.randrange(len(out)) :]
    elif kind == 3:  # more than was written
        out += bytes(chance.randrange(256) for _ in range(chance.randrange(1, 40)))
    elif kind == 4:  # a digit of the header: offsets, shapes, versions, digests
        places = [i for i in range(8, header) if chr(out[i]).isdigit()]
        out[chance.choice(places)] = ord(chance.choice("0123456789"))
    elif kind == 5:  # a huge or small declared header
        out[:8] = chance.choice([2**63, 2**40, 10**8, 0, 1, 7, header]).to_bytes(8, "little")
    elif kind == 6:  # two blocks swapped
        a, b = (chance.randrange(header, len(out) - 32) for _ in range(2))
        out[a : a + 32], out[b : b + 32] = out[b : b + 32], out[a : a + 32]
    else:  # a run of zeros
        place = chance.randrange(len(out))
        end = min(len(out), place + chance.randrange(1, 64))
        out[place:end] = bytes(end - place)
    return bytes(out)


def fuzz(name: str, folder: Path, count: int, seed: int) -> Counter[str]:
    model = MODELS[name]()
    (path,) = nmfx.save(model, folder / "model.safetensors")
    data, saved = path.read_bytes(), state_of(model)
    chance, counts = random.Random(seed), Counter[str]()
    for _ in range(count):
        path.write_bytes(mutated(data, chance))
        counts[outcome(path, Net(), saved)] += 1
    assert sorted(p.name for p in folder.iterdir()) == [path.name]
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_random_damage_is_refused_or_harmless(name: str, tmp_path: Path) -> None:
    counts = fuzz(name, tmp_path, QUICK // 2, seed=0)
    assert counts["refused"] > 0.8 * QUICK // 2


@pytest.mark.deep
@pytest.mark.parametrize("name", MODELS)
def test_ten_thousand_random_damages(name: str, tmp_path: Path) -> None:
    counts = fuzz(name, tmp_path, ALL // 2, seed=1)
    print(name, counts)
    assert counts["refused"] > 0.8 * ALL // 2


# --- digests computed again after the damage ----------------------------------------------------


def _content(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        spec = json.loads(file.metadata()["nmfx"])
    return spec, load_file(path)


def _forge(path: Path, spec: Any, tensors: dict[str, Tensor]) -> None:
    """Writes a file whose digests are right."""
    if isinstance(spec, dict) and isinstance(spec.get("tensors"), dict):
        for name, tensor in tensors.items():
            spec["tensors"][name] = {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "sha256": sha256_of(tensor),
            }
    text = json.dumps(spec)
    save_file(tensors, path, {"nmfx": text, "nmfx_sha256": digest(text)})


def _tensor_damages() -> dict[str, Callable[[dict[str, Tensor]], Any]]:
    def field(t: dict[str, Tensor], value: int) -> None:
        t["a.weight_index"].view(-1)[0] = value

    def swap(t: dict[str, Tensor]) -> None:
        t["a.weight_values"], t["b.weight_values"] = t["b.weight_values"], t["a.weight_values"]

    return {
        "indices that fall": lambda t: field(t, 0),
        "all bits": lambda t: field(t, -1),
        "a dtype": lambda t: t.update({"a.weight_index": t["a.weight_index"].long()}),
        "another float": lambda t: t.update({"a.weight_values": t["a.weight_values"].half()}),
        "a shape": lambda t: t.update({"a.weight_values": t["a.weight_values"][:, :-1].clone()}),
        "swapped": swap,
        "one gone": lambda t: t.pop("a.weight_index"),
        "one more": lambda t: t.update({"d.weight": torch.ones(3)}),
        "rows of padding": lambda t: t["a.weight_values"][-1, :, -1].fill_(1.0),
        "a bias": lambda t: t.update({"a.bias": torch.ones(9)}),
    }


@pytest.mark.parametrize("damage", _tensor_damages())
def test_damaged_tensors_with_the_right_digests_are_refused(damage: str, tmp_path: Path) -> None:
    model = _packed()
    (path,) = nmfx.save(model, tmp_path / "model.safetensors")
    spec, tensors = _content(path)
    _tensor_damages()[damage](tensors)
    if damage == "one gone":
        del spec["tensors"]["a.weight_index"]
    _forge(path, spec, tensors)
    assert outcome(path, Net(), state_of(model)) == "refused"


# --- semi-structured weights, which CUTLASS runs and plain torch can read ------------------------


class Wide(nn.Module):
    """One layer whose outputs are filled up, and one whose inputs are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 60), nn.Linear(60, 64), nn.Linear(64, 2)
        self.d = nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.d(self.b(self.a(x))))


def _wide() -> nn.Module:
    return Wide().bfloat16().eval()


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A lowered model; until the test ends every machine "has" CUTLASS."""
    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUTLASS)
    ms = {"dense": 3.0, "prepacked": 3.0, "packed": 2.0, "semi_structured": 1.0}
    install(monkeypatch, ms)
    rules = {"a": "2:4", "b": "1:4", "c": None, "d": "1:2"}
    model = nmfx.lower(nmfx.sparsify(_wide(), rules), (torch.ones(2, 64).bfloat16(),))
    states = [row.state for row in nmfx.report(model)]
    assert states == ["semi_structured", "semi_structured", "dense", "semi_structured"]
    return model


def _values(t: dict[str, Tensor], name: str) -> Tensor:
    return t[f"{name}.weight_compressed"].view(torch.bfloat16)


def _meta_byte(t: dict[str, Tensor], value: int, at: int = 0) -> None:
    t["a.weight_meta"].view(-1)[at] = value


def _four_in_a_row(t: dict[str, Tensor]) -> None:
    """Places that 2:4 allows and 1:2 does not: 0 and 1 of every group."""
    t["d.weight_meta"].fill_(0x44)
    _values(t, "d").fill_(1.0)


COMPRESSED_DAMAGES: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "zeros": lambda t: _meta_byte(t, 0),
    "a place twice, low": lambda t: _meta_byte(t, 0x4A, at=17),
    "a place twice, high": lambda t: _meta_byte(t, 0xF4, at=-1),
    "places in the other order": lambda t: _meta_byte(t, 0x41),
    "a value below the last row": lambda t: _values(t, "a")[60, 3].fill_(1.0),
    "NaN below the last row": lambda t: _values(t, "a")[-1, -1].fill_(torch.nan),
    "a value behind the last column": lambda t: _values(t, "b")[5, 30].fill_(1e-40),
    "more than 1:4": lambda t: _values(t, "b")[63, 28:30].fill_(1.0),
    "more than 1:2": _four_in_a_row,
    "one dimension": lambda t: t.update({"a.weight_meta": t["a.weight_meta"].flatten()}),
    "another shape": lambda t: t.update({"a.weight_meta": t["a.weight_meta"].view(8, -1)}),
    "a row less": lambda t: t.update(
        {"a.weight_compressed": t["a.weight_compressed"][:-1].clone()}
    ),
    "no metadata": lambda t: t.update({"a.weight_meta": t["a.weight_meta"][:0].clone()}),
    "bytes with a sign": lambda t: t.update({"a.weight_meta": t["a.weight_meta"].view(torch.int8)}),
    "another name": lambda t: t["a.weight_format"][-1:].add_(1),
    "swapped": lambda t: t.update(
        {"a.weight_compressed": t["d.weight_compressed"], "a.weight_meta": t["b.weight_meta"]}
    ),
}


@pytest.mark.parametrize("damage", COMPRESSED_DAMAGES)
def test_damaged_semi_structured_weights_are_refused(
    damage: str, compressed: nn.Module, tmp_path: Path
) -> None:
    (path,) = nmfx.save(compressed, tmp_path / "model.safetensors")
    spec, tensors = _content(path)
    before = copy.deepcopy(tensors)
    COMPRESSED_DAMAGES[damage](tensors)
    if damage == "swapped":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    _forge(path, spec, tensors)
    assert outcome(path, _wide(), None) == "refused"
    _forge(path, spec, before)
    assert outcome(path, _wide(), state_of(compressed)) == "loaded", "it was the damage"


@pytest.mark.parametrize("value", [0x44, 0x8D, 0xE9, 0xCE])
def test_legal_places_are_loaded(value: int, compressed: nn.Module, tmp_path: Path) -> None:
    (path,) = nmfx.save(compressed, tmp_path / "model.safetensors")
    spec, tensors = _content(path)
    _meta_byte(tensors, value)
    _forge(path, spec, tensors)
    into: Any = nmfx.load(path, into=_wide())
    assert into.a.weight_meta.view(-1)[0] == value
    assert nmfx.is_nm(into.a.weight, "2:4", 1)


COMPRESSED_LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "dtype": lambda layer: layer.update(dtype="float16"),
    "a wide dtype": lambda layer: layer.update(dtype="float32"),
    "no dtype": lambda layer: layer.update(dtype=None),
    "pattern": lambda layer: layer.update(pattern="1:4"),
    "shape": lambda layer: layer.update(shape=[64, 64]),
    "fewer columns": lambda layer: layer.update(shape=[60, 60]),
    "dim": lambda layer: layer.update(dim=0),
    "state": lambda layer: layer.update(state="packed"),
    "format": lambda layer: layer.update(format="CUTLASS"),
}


@pytest.mark.parametrize("lie", COMPRESSED_LIES)
def test_lies_about_semi_structured_weights_are_refused(
    lie: str, compressed: nn.Module, tmp_path: Path
) -> None:
    (path,) = nmfx.save(compressed, tmp_path / "model.safetensors")
    spec, tensors = _content(path)
    COMPRESSED_LIES[lie](spec["layers"]["a.weight"])
    _forge(path, spec, tensors)
    assert outcome(path, _wide(), None) == "refused"


def test_what_cusparselt_made_must_have_the_shape_that_torch_gives_it_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch tells the rows from the shape, and would read past the end. With stand-ins for it."""

    def product(
        compressed: Tensor, x: Tensor, bias: Tensor | None, transpose_result: bool, alg_id: int
    ) -> Tensor:
        return F.linear(x.t(), compressed, bias)

    monkeypatch.setattr(semi, "backend_of", lambda device: semi.CUSPARSELT)
    monkeypatch.setattr(semi, "format_of", lambda *args: "cuSPARSELt torch.bfloat16 702 for 9.0")
    monkeypatch.setattr(semi, "_on_gpu", lambda input: True)
    monkeypatch.setattr(semi.cusparselt, "why_not", lambda: "torch's product, in this test")
    monkeypatch.setattr(torch, "_cslt_compress", lambda filled: filled.clone())
    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(semi, "_MOST_ALGORITHMS", 1)
    install(monkeypatch, {"dense": 3.0, "prepacked": 3.0, "packed": 2.0, "semi_structured": 1.0})

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 48)).bfloat16()

    x = torch.randn(3, 32).bfloat16()
    fast = nmfx.lower(nmfx.sparsify(make(), {"?*": "2:4"}), (x,))
    assert [row.state for row in nmfx.report(fast)] == ["semi_structured"]
    (path,) = nmfx.save(fast, tmp_path)
    assert torch.equal(nmfx.load(path, into=make())(x), fast(x))
    monkeypatch.setattr(torch, "_cslt_compress", lambda filled: filled.flatten())
    into = make()
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(nmfx.NMError, match=r"0.weight: its bytes have the shape \(48, 64\), and "):
        nmfx.load(path, into=into)
    after = into.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_random_damage_to_semi_structured_weights(compressed: nn.Module, tmp_path: Path) -> None:
    (path,) = nmfx.save(compressed, tmp_path / "model.safetensors")
    data, saved = path.read_bytes(), state_of(compressed)
    chance, counts = random.Random(2), Counter[str]()
    for _ in range(QUICK // 10):
        path.write_bytes(mutated(data, chance))
        counts[outcome(path, _wide(), saved)] += 1
    assert counts["refused"] > 0.8 * QUICK // 10


@pytest.mark.parametrize("damage", ["zeros", "a value below the last row"])
def test_a_state_dict_with_damaged_semi_structured_weights(
    damage: str, compressed: nn.Module
) -> None:
    state = {name: tensor.clone() for name, tensor in compressed.state_dict().items()}
    COMPRESSED_DAMAGES[damage](state)
    before = state_of(compressed)
    with pytest.raises(nmfx.NMError, match=r"^a\.weight: .*; the file is damaged$"):
        compressed.load_state_dict(state)
    assert state_of(compressed) == before


SPEC_DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "version": lambda s: s.update(version=2),
    "version true": lambda s: s.update(version=True),
    "no version": lambda s: s.pop("version"),
    "a field gone": lambda s: s.pop("layers"),
    "a field more": lambda s: s.update(evil=1),
    "a layer's field gone": lambda s: s["layers"]["a.weight"].pop("dim"),
    "no such layer": lambda s: s["layers"].update(z=s["layers"]["a.weight"]),
    "a layer less": lambda s: s["layers"].pop("a.weight"),
    "pattern": lambda s: s["layers"]["a.weight"].update(pattern="1:2"),
    "no pattern": lambda s: s["layers"]["a.weight"].update(pattern="2:0"),
    "state": lambda s: s["layers"]["a.weight"].update(state="semi_structured"),
    "unknown state": lambda s: s["layers"]["a.weight"].update(state="magic"),
    "kernel choice": lambda s: s["layers"]["a.weight"].update(activation="exec"),
    "prepacked": lambda s: s["layers"]["a.weight"].update(state="prepacked"),
    "kind": lambda s: s["layers"]["a.weight"].update(kind="conv"),
    "capture": lambda s: s["layers"]["a.weight"].update(capture="graph"),
    "dim": lambda s: s["layers"]["a.weight"].update(dim=0),
    "dim 2": lambda s: s["layers"]["a.weight"].update(dim=2),
    "shape": lambda s: s["layers"]["a.weight"].update(shape=[8, 16]),
    "huge shape": lambda s: s["layers"]["a.weight"].update(shape=[2**47, 8]),
    "negative shape": lambda s: s["layers"]["a.weight"].update(shape=[-8, 8]),
    "groups": lambda s: s["layers"]["a.weight"].update(groups=2),
    "lambda": lambda s: s["layers"]["a.weight"].update(lambda_w=-1.0),
    "lambda text": lambda s: s["layers"]["a.weight"].update(lambda_w="1"),
    "dtype": lambda s: s["layers"]["a.weight"].update(dtype="bfloat16"),
    "norm": lambda s: s.update(norms=["a.weight"]),
    "norm nowhere": lambda s: s.update(norms=["q.weight"]),
    "identity": lambda s: s["identities"].update(b="relu"),
    "identity of all": lambda s: s["identities"].update({"": "relu"}),
    "identity nowhere": lambda s: s["identities"].update(q="relu"),
    "graph": lambda s: s["graphs"].update({"": "0"}),
    "alias": lambda s: s["aliases"].update(x="y"),
    "alias of itself": lambda s: s["aliases"].update({"a.bias": "a.bias"}),
    "measured": lambda s: s["measured"].update({"a.weight": [[1], 1.0]}),
    "digest": lambda s: s["tensors"].update(d={"dtype": "int8", "shape": [], "sha256": "0" * 64}),
    "not text": lambda s: s.update(made_on=None),
}


@pytest.mark.parametrize("damage", SPEC_DAMAGES)
def test_a_specification_that_lies_is_refused(damage: str, tmp_path: Path) -> None:
    model = _packed()
    (path,) = nmfx.save(model, tmp_path / "model.safetensors")
    spec, tensors = _content(path)
    SPEC_DAMAGES[damage](spec)
    _forge(path, spec, tensors)
    assert outcome(path, Net(), None) == "refused"


def test_wrong_masks_are_refused(tmp_path: Path) -> None:
    (path,) = nmfx.save(_frozen(), tmp_path / "model.safetensors")
    spec, tensors = _content(path)
    name = "nmfx.mask:a.weight"
    for mask in (torch.ones(8, 8).bool(), torch.ones(8, 4).bool(), torch.zeros(8, 8)):
        _forge(path, spec, tensors | {name: mask})
        assert outcome(path, Net(), None) == "refused"
    # A layer that is frozen no more, and a mask that is left.
    spec["layers"]["a.weight"]["state"] = "sparse"
    _forge(path, spec, tensors)
    assert outcome(path, Net(), None) == "refused"
    spec["layers"]["a.weight"]["state"] = "frozen"
    # Twice as many as 1:4 allows, which 2:4 would.
    spec["layers"]["a.weight"]["pattern"] = "1:4"
    _forge(path, spec, tensors)
    assert outcome(path, Net(), None) == "refused"


def test_a_folded_layer_that_is_not_is_refused(tmp_path: Path) -> None:
    model = nmfx.fold(nmfx.sparsify(Net(), {"a": "2:4", "*": None}))
    (path,) = nmfx.save(model, tmp_path / "model.safetensors")
    spec, tensors = _content(path)
    assert spec["layers"]["a.weight"]["state"] == "folded"
    tensors["a.weight"][0] = 1.0
    _forge(path, spec, tensors)
    assert outcome(path, Net(), None) == "refused"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.data())
def test_any_json_anywhere_in_a_specification(data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        model = _packed()
        (path,) = nmfx.save(model, Path(folder) / "model.safetensors")
        spec, tensors = _content(path)
        before = copy.deepcopy(spec)
        node: Any = spec
        while True:
            key = data.draw(st.sampled_from(sorted(node)))
            if not isinstance(node[key], dict) or not node[key] or data.draw(st.booleans()):
                node[key] = data.draw(JSON)
                break
            node = node[key]
        text = json.dumps(spec)
        save_file(tensors, path, {"nmfx": text, "nmfx_sha256": digest(text)})
        into = Net()
        try:
            nmfx.load(path, into=into)
        except nmfx.NMError:
            return
        # What only people read may say anything; it must not change what the model computes.
        free = ("made_on", "nmfx", "torch", "notes", "reasons", "measured", "identities", "aliases")
        changed = {key for key in before if spec.get(key) != before[key]}
        harmless = all(not spec["layers"][k].get("format") for k in spec["layers"])
        assert (changed <= {*free, "layers"} and harmless) or not changed
        x = torch.ones(2, 8)
        assert torch.equal(into(x), model(x))


# --- an index that lies -------------------------------------------------------------------------


INDEX_DAMAGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no map": lambda i: i.pop("weight_map"),
    "an empty map": lambda i: i.update(weight_map={}),
    "a list": lambda i: i.update(weight_map=[1]),
    "up": lambda i: i["weight_map"].update({"a.bias": "../model.safetensors"}),
    "absolute": lambda i: i["weight_map"].update({"a.bias": "/etc/passwd.safetensors"}),
    "backslash": lambda i: i["weight_map"].update({"a.bias": "..\\x.safetensors"}),
    "zero byte": lambda i: i["weight_map"].update({"a.bias": "x\0.safetensors"}),
    "folder": lambda i: i["weight_map"].update({"a.bias": "sub/x.safetensors"}),
    "dot": lambda i: i["weight_map"].update({"a.bias": ".x.safetensors"}),
    "a number": lambda i: i["weight_map"].update({"a.bias": 5}),
    "another shard": lambda i: i["weight_map"].update(
        {"a.bias": next(v for v in i["weight_map"].values() if v != i["weight_map"]["a.bias"])}
    ),
    "not there": lambda i: i["weight_map"].update({"a.bias": "x.safetensors"}),
    "one less": lambda i: i["weight_map"].pop("a.bias"),
    "one more": lambda i: i["weight_map"].update(z=next(iter(i["weight_map"].values()))),
    "no digest": lambda i: i["metadata"].pop("nmfx_sha256"),
    "wrong digest": lambda i: i["metadata"].update(nmfx_sha256="0" * 64),
    "spec is no text": lambda i: i["metadata"].update(nmfx={}),
    "surrogate": lambda i: i["metadata"].update(nmfx="\ud800", nmfx_sha256=digest("\ud800")),
    "no metadata": lambda i: i.update(metadata=7),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGES)
def test_an_index_that_lies_is_refused(damage: str, tmp_path: Path) -> None:
    model = _packed()
    folder = tmp_path / "in"
    folder.mkdir()
    *_, index = nmfx.save(model, folder, max_shard_size=300)
    content = json.loads(index.read_text())
    INDEX_DAMAGES[damage](content)
    index.write_text(json.dumps(content))
    assert outcome(index, Net(), None) == "refused"


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "null", "\x00", '{"weight_map": NaN}'])
def test_an_index_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    assert outcome(index, Net(), None) == "refused"
    index.write_bytes(b"\xff\xfe")
    assert outcome(index, Net(), None) == "refused"


def test_shards_of_two_models_do_not_mix(tmp_path: Path) -> None:
    model = _packed()
    *shards, index = nmfx.save(model, tmp_path, max_shard_size=300)
    (tmp_path / "other").mkdir()
    *others, _ = nmfx.save(_packed(), tmp_path / "other", max_shard_size=300)
    shards[0].write_bytes(others[0].read_bytes())
    assert outcome(index, Net(), None) == "refused"


def test_a_shard_that_is_a_link_out_of_the_folder_or_a_folder(tmp_path: Path) -> None:
    *shards, index = nmfx.save(_packed(), tmp_path, max_shard_size=300)
    shards[0].unlink()
    shards[0].mkdir()
    assert outcome(index, Net(), None) == "refused"


def test_other_kinds_of_file(tmp_path: Path) -> None:
    pickled, path = tmp_path / "model.pt", tmp_path / "model.safetensors"
    torch.save(Net().state_dict(), pickled)
    with pytest.raises(nmfx.NMError, match="named"):
        nmfx.load(pickled, into=Net())
    path.write_bytes(pickled.read_bytes())
    assert outcome(path, Net(), None) == "refused"
    path.write_bytes(b"")
    assert outcome(path, Net(), None) == "refused"
