"""Cases to begin with: a sound file of every kind for a fuzzer to damage, and files that were written to do harm.

What found a fault once is in tests/fixtures/seeds/TARGET and is begun with too.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import save

from bench.safety.guard import CANARY
from bench.safety.packing import packed, tarred, zipped
from cmt_fast.config import loading, recipes
from cmt_fast.storage import checkpoint
from tests.fixtures import archives as hostile_archives
from tests.fixtures import hostile_pickles, stores, synthetic
from tests.fixtures import pickled as pickles_of_others

KEPT = Path(__file__).parents[2] / "tests" / "fixtures" / "seeds"
SAFETENSORS = save({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}, {"format": "pt"})
HEADER = SAFETENSORS[8 : 8 + struct.unpack("<Q", SAFETENSORS[:8])[0]].rstrip()


def kept(target: str) -> dict[str, bytes]:
    """Name -> case, of those that found a fault."""
    return {p.name: p.read_bytes() for p in sorted((KEPT / target).glob("*"))}


def npy(values: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, values, allow_pickle=False)
    return out.getvalue()


@functools.cache
def store() -> dict[str, bytes]:
    """The files of a store of six rows in two shards, by name."""
    with tempfile.TemporaryDirectory() as folder:
        stores.make_store(Path(folder) / "store", 6, (2, 2, 2), classes=3, shard=4)
        return {p.name: p.read_bytes() for p in (Path(folder) / "store").iterdir() if p.is_file()}


def _packed(*parts: tuple[str, bytes]) -> bytes:
    return packed(list(parts))


def configs() -> list[bytes]:
    texts = [p.read_bytes() for name, p in recipes.recipes().items() if name in ("digits", "imagenet512", "toy")]
    texts += [f"model: !!python/object/apply:{CANARY}.run [x]\n".encode(), f"model: {{kind: {CANARY}.Net}}\n".encode()]
    texts += [b"a: &a [1]\nb: [*a, *a]\n", b"<<: {a: 1}\n", b"? [a]\n: b\n", b"%TAG ! tag:x,2000:\n--- !y 1\n"]
    words = ["mid.lr=1e-4\npre.batch=8", "data={kind: npz, path: x}", "mid.ema=[{kind: power, sigma_rel: 0.1}]"]
    words += ["model.kind=dit\nmodel.size=S", "a=!!python/name:os.system", "pre.lr=0x10\nmid.batch=1_0\nseed=010"]
    return [b"\0" + t for t in texts] + [b"\1" + w.encode() for w in words]


def words() -> list[bytes]:
    return [text[1:] for text in configs()] + [b"{a: [1, 2.5e3, ~, yes]}", b"[1:30, 0o10, .inf]", b'"\\x1b[31m": 1']


def manifests() -> list[bytes]:
    entry = {"bytes": len(SAFETENSORS), "xxh3_128": xxhash.xxh3_128_hexdigest(SAFETENSORS)}
    body = {"format": 1, "step": 1, "stage": "mid", "nimg": 8, "done": True, "config": "x", "recipe": "digits"}
    body |= {"files": {"ema-0.safetensors": entry}, "pruned": {"model.safetensors": entry}, "wall": {"train_s": 0.0}}
    odd = [{**body, "files": files} for files in ([], {"a": []}, {"../x": entry}, {"ema-0.safetensors": {}})]
    texts = [checkpoint.signed(body), *map(json.dumps, (body, *odd)), "[" * 3000, '{"format": 1e999}']
    return [how + t.encode() for t in texts for how in (b"\0", b"\1")]


def tensors() -> list[bytes]:
    odd = [
        {"a": {"dtype": "F32", "shape": [2**31, 2**31], "data_offsets": [0, 64]}},
        {"__metadata__": [], "a": {}},
        [],
        {"a": 1},
    ]
    odd += [
        {"a": {"dtype": "F32", "shape": [-4, -4], "data_offsets": [0, 64]}},
        {"__metadata__": {"class": f"{CANARY}.Net"}},
    ]
    return [b"\0" + SAFETENSORS, b"\1" + HEADER, *(b"\1" + json.dumps(o).encode() for o in odd)]


def headers() -> list[bytes]:
    sound = store()
    tree = json.loads(sound["index.json"])
    odd = [
        {**tree, "shards": []},
        {**tree, "rows": 2**40},
        {**tree, "shape": [4, 1 << 20, 1 << 20]},
        {**tree, "class_names": ["\x1b[31m"] * 3},
    ]
    texts = [json.dumps(t).encode() for t in (tree, *odd)]
    return [
        b"\0" + sound["index.json"],
        *(b"\1" + t for t in texts),
        b"\2" + sound["labels.npy"],
        b"\3" + sound["checksums.npy"],
    ]


def archives() -> list[bytes]:
    row = npy(np.random.default_rng(0).normal(size=(4, 2, 2)).astype(np.float32))
    labels = json.dumps({"labels": [["00000/img00000000.npy", 3], ["00000/img00000001.npy", 0]]}).encode()
    picture = images()[0]
    sets = [
        _packed(("00000/img00000000.npy", row), ("00000/img00000001.npy", row), ("dataset.json", labels)),
        _packed(("x_features/0.npy", row), ("x_labels/0.npy", npy(np.array([1])))),
        _packed(("a/0.npy", row), ("b/1.npy", row)),
        _packed(("a/0.png", picture), ("a/1.png", picture)),
    ]
    whole = [b"\0" + made(s) for s in sets for made in (zipped, tarred)]
    return whole + [how + s for s in sets for how in (b"\1", b"\2", b"\3")]


def shards() -> list[bytes]:
    file = save({"latents": torch.randn(3, 2, 2, 2), "labels": torch.arange(3)})
    head = file[8 : 8 + struct.unpack("<Q", file[:8])[0]]
    return [b"\0" + file, b"\1" + head, b"\1" + head.replace(b"I64", b"BOOL"), b"\1" + head.replace(b"F32", b"F8_E4M3")]


def statistics() -> list[bytes]:
    mu, sigma = np.zeros(3), np.eye(3)
    about = [("extractor.npy", npy(np.array("x"))), ("num_images.npy", npy(np.int64(5)))]
    arrays = [("mu.npy", npy(mu)), ("sigma.npy", npy(sigma))]
    sets = [
        _packed(*arrays, *about),
        _packed(*arrays),
        _packed(*arrays, *about, ("features.npy", npy(np.ones((4, 3))))),
    ]
    sets += [
        _packed(("mu.npy", npy(np.array([1 + 1j]))), *arrays[1:], *about),
        _packed(*arrays, ("extractor.npy", npy(mu))),
    ]
    plain = save({"mu": torch.zeros(3), "sigma": torch.eye(3)}, {"extractor": "x", "num_images": "5"})
    edm2 = pickle.dumps(
        {"num_images": 5, "fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu, "sigma": sigma}}, 4
    )
    return [b"\0" + zipped(sets[0]), *(b"\1" + s for s in sets), b"\2" + plain, b"\3" + edm2]


def npzs() -> list[bytes]:
    dice = np.random.default_rng(0)
    sound = _packed(
        ("images.npy", npy(dice.integers(255, size=(4, 1, 4, 4)).astype("uint8"))), ("labels.npy", npy(np.arange(4)))
    )
    hot = _packed(("images.npy", npy(dice.normal(size=(4, 3, 4, 4)).astype("f4"))), ("labels.npy", npy(np.eye(4))))
    return [b"\0" + zipped(sound), b"\1" + sound, b"\1" + hot]


def labels() -> list[bytes]:
    counts, numbers = _packed(("counts.npy", npy(np.arange(10)))), npy(np.arange(10))
    return [b"\0" + zipped(counts), b"\1" + counts, b"\1" + _packed(("labels.npy", numbers)), b"\2" + numbers]


@functools.cache
def _pickles() -> tuple[bytes, ...]:
    with tempfile.TemporaryDirectory() as folder:
        for protocol in (2, 4):
            pickles_of_others.network(Path(folder) / f"{protocol}.pkl", protocol=protocol)
        sound = [p.read_bytes() for p in sorted(Path(folder).glob("*.pkl"))]
    return (*sound, *(b for b in hostile_pickles.cases(f"{CANARY}.txt").values() if len(b) < 4096))


def pickled() -> list[bytes]:
    return list(_pickles())


def imports() -> list[bytes]:
    sound = [hostile_archives.saved(hostile_archives.SOUND), SAFETENSORS]
    sound += [hostile_archives.saved(hostile_archives.SOUND["ema"], _use_new_zipfile_serialization=False)]
    digits = loading.dump(loading.load("digits"))
    for model in ({"kind": f"{CANARY}.Net"}, digits["model"]):
        about = {"run": {**digits, "model": model}, "lineage": {"stage": "pre", "step": 1}}
        sound.insert(0, save({"net.a": torch.ones(2)}, {"cmt-fast": json.dumps(about)}))
    hostile = hostile_archives.cases(f"{CANARY}.txt").values()
    return [*sound, *_pickles()[:2], *(b for b in hostile if len(b) < 4096)]


def weights() -> list[bytes]:
    return [b"\1" + SAFETENSORS, *(b"\0" + case for case in imports())]


def images() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(255, size=(8, 8, 3)).astype("uint8")
    made = [synthetic.encoded(pixels, mode, k)[0] for mode in ("RGB", "L") for k in range(4)]
    return [b for b in made if len(b) < 4096]
