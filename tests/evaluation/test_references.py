"""Reference files of our own, ADM's, EDM's and EDM2's: numbers of strangers are checked, nothing in them is run."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cmt_fast.config.errors import ConfigError
from cmt_fast.evaluation import distances, references


class Marked:
    """Leaves a file where it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (open, (str(self.file), "w"))


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(references, "WIDTHS", {"fid": 8, "fd_dinov2": 4})
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return distances.moments(x)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_our_files_come_back_as_they_were(tmp_path, narrow, suffix):
    made = references.Reference(narrow, "own statistics", "net@12ab, uint8", 40, torch.arange(16.0).view(2, 8))
    references.write(tmp_path / f"r{suffix}", made)
    back = references.read(tmp_path / f"r{suffix}", "fid", rows=True)
    assert torch.equal(back.moments.mean, narrow.mean) and torch.equal(back.features, made.features)
    assert torch.allclose(back.moments.covariance, narrow.covariance, rtol=0, atol=1e-15)
    assert (back.extractor, back.n, back.source) == ("net@12ab, uint8", 40, "own statistics")
    assert references.read(tmp_path / f"r{suffix}", "fid").features is None


def test_adm_and_edm_files(tmp_path, narrow):
    mu, sigma = narrow.mean.numpy(), narrow.covariance.numpy()
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mu, sigma=sigma, mu_s=mu, sigma_s=sigma, arr_0=images)
    np.savez_compressed(tmp_path / "edm.npz", mu=mu.astype(np.float32), sigma=sigma.astype(np.float32))
    adm = references.read(tmp_path / "adm.npz", "fid", rows=True)
    assert distances.frechet(adm.moments, narrow) < 1e-9 and adm.images.shape == (3, 4, 4, 3) and not adm.extractor
    assert distances.frechet(references.read(tmp_path / "edm.npz", "fid").moments, narrow) < 1e-5
    for metric in ("fd_dinov2", "frechet"):
        with pytest.raises(ConfigError, match="names no extractor and has 8 features"):
            references.read(tmp_path / "edm.npz", metric)


def test_edm2_files_go_through_the_reader_that_runs_nothing(tmp_path, narrow):
    parts = {"mu": narrow.mean.numpy(), "sigma": narrow.covariance.numpy()}
    (tmp_path / "img.pkl").write_bytes(pickle.dumps({"num_images": 1281167, "fid": parts}))
    found = references.read(tmp_path / "img.pkl", "fid")
    assert (found.source, found.n) == ("EDM2", 1281167) and distances.frechet(found.moments, narrow) < 1e-9
    with pytest.raises(ConfigError, match="holds no fd_dinov2; it holds fid"):
        references.read(tmp_path / "img.pkl", "fd_dinov2")
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": {**parts, "more": Marked(tmp_path / "ran")}}))
    with pytest.raises(ConfigError, match="is no file of EDM2's statistics"):
        references.read(tmp_path / "bad.pkl", "fid")
    assert not (tmp_path / "ran").exists()


def _lying_header() -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f8", "fortran_order": False, "shape": (1 << 40,)})
    return out.getvalue() + b"\0" * 64


def _zip(path, members: list[tuple[str, bytes]]) -> None:
    with zipfile.ZipFile(path, "w") as z, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, content in members:
            z.writestr(name, content)


def _npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def _skewed(s):
    s = s.copy()
    s[0, 1] += 1e-3
    return s


EYE = np.eye(8)
HOSTILE = {
    "mean not finite": ({"mu": np.full(8, np.nan), "sigma": EYE}, "not finite"),
    "covariance infinite": ({"mu": np.zeros(8), "sigma": np.full((8, 8), np.inf)}, "not finite"),
    "not symmetric": ({"mu": np.zeros(8), "sigma": _skewed(EYE)}, "not symmetric"),
    "negative eigenvalue": ({"mu": np.zeros(8), "sigma": np.diag([1.0] * 7 + [-1e-3])}, "eigenvalue -0.001"),
    "negative definite": ({"mu": np.zeros(8), "sigma": -EYE}, "eigenvalue"),
    "shapes apart": ({"mu": np.zeros(8), "sigma": np.eye(7)}, r"\(8,\) and sigma \(7, 7\)"),
    "mean a matrix": ({"mu": EYE, "sigma": EYE}, r"not \(F,\)"),
    "empty": ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"not \(F,\)"),
    "integers": ({"mu": np.zeros(8, int), "sigma": EYE}, "not floating point"),
    "complex": ({"mu": np.zeros(8, complex), "sigma": EYE}, "not floating point"),
    "text": ({"mu": np.array(["a"] * 8), "sigma": EYE}, "no array of numbers"),
    "no mean": ({"sigma": EYE}, "no array called 'mu'"),
    "features of another width": ({"mu": np.zeros(8), "sigma": EYE, "features": np.zeros((2, 7))}, "features of"),
    "images of floats": ({"mu": np.zeros(8), "sigma": EYE, "arr_0": np.zeros((2, 4, 4, 3))}, "arr_0"),
}


@pytest.mark.parametrize("arrays, text", HOSTILE.values(), ids=HOSTILE)
def test_numbers_that_cannot_be_statistics_are_refused(tmp_path, narrow, arrays, text):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ConfigError, match=text) as caught:
        references.read(tmp_path / "r.npz", "fid", rows=True)
    assert "r.npz" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "members",
    [
        [("mu.npy", _lying_header()), ("sigma.npy", _npy(EYE))],
        [("mu.npy", _npy(np.zeros(8))), ("mu.npy", _npy(np.ones(8))), ("sigma.npy", _npy(EYE))],
        [("mu.npy", _npy(np.zeros(8))[:-9]), ("sigma.npy", _npy(EYE))],
        [("mu.npy", b"no array"), ("sigma.npy", _npy(EYE))],
        [("mu.npy", b"\x93NUMPY\x01\x00\xff\xff{'descr': '<f8'"), ("sigma.npy", _npy(EYE))],
    ],
    ids=["terabytes promised", "twice", "short", "noise", "torn header"],
)
def test_archives_that_lie_are_refused(tmp_path, narrow, members):
    _zip(tmp_path / "r.npz", members)
    with pytest.raises(ConfigError, match="no sound .npz"):
        references.read(tmp_path / "r.npz", "fid")


def test_objects_in_archives_are_not_loaded(tmp_path, narrow):
    np.savez(tmp_path / "r.npz", mu=np.array([Marked(tmp_path / "ran")] * 8, object), sigma=EYE)
    with pytest.raises(ConfigError, match="no sound .npz"):
        references.read(tmp_path / "r.npz", "fid")
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path, narrow):
    for name, content in (("a.txt", b""), ("b.npz", b"no zip"), ("c.safetensors", b"\xff" * 40), ("d.npz", None)):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(ConfigError, match=name):
            references.read(file, "fid")
    save_file({"mu": torch.zeros(8), "sigma": torch.eye(8)}, tmp_path / "e.safetensors", {"num_images": "9"})
    with pytest.raises(ConfigError, match="names no extractor"):
        references.read(tmp_path / "e.safetensors", "fid")
