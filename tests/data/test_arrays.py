"""Arrays of an .npz that anybody may have written."""

from __future__ import annotations

import io
import resource
import zipfile

import numpy as np
import pytest

from cmt_fast.data import arrays


def header(shape: tuple[int, ...], descr: str = "<f8") -> bytes:
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
    return out.getvalue()


def written(path, how=zipfile.ZIP_DEFLATED, **members: bytes):
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, body in members.items():
            archive.writestr(f"{name}.npy", body)
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_writes_is_read_as_numpy_reads_it(tmp_path, save):
    dice = np.random.default_rng(0)
    held = {"a": dice.normal(size=(3, 4)), "b": np.asfortranarray(dice.integers(9, size=(5, 2))), "text": np.array("é"),
            "big": np.array(["a\U0010ffff", ""], ">U2"), "empty": np.array(""),
            "scalar": np.int64(5), "zeros": np.zeros((300, 300)), "none": np.zeros((0, 3), np.uint8)}  # fmt: skip
    save(tmp_path / "x.npz", **held)
    found = arrays.read(tmp_path / "x.npz", {**dict.fromkeys(held, 1 << 20), "absent": 1})
    assert found.keys() == held.keys()
    assert all(np.array_equal(found[k], held[k]) and found[k].dtype == np.asarray(held[k]).dtype for k in held)


@pytest.mark.parametrize(
    "body, said",
    [
        (header((1 << 40,)), "promises 8796093022208 bytes"),
        (header((2,)) + bytes(15), "promises 16 bytes"),
        (header((2,)) + bytes(17), "promises 16 bytes"),
        (header((1,), "|O") + bytes(8), "objects"),
        (header((2,), ">U1") + b"\x00\x00\x00a\x00\x11\x00\x00", "text of no characters"),
        (b"PK no array", "magic"),
        (b"\x93NUMPY\x07\x00" + bytes(20), "version"),
        (header((1 << 14,)) + bytes(1 << 17), "at most 99"),
    ],
)
def test_a_header_that_promises_more_than_the_file_holds_takes_no_memory(tmp_path, body, said):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(arrays.NoArrays, match=said):
        arrays.read(written(tmp_path / "x.npz", a=body), {"a": 99})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes


def test_an_object_is_never_unpickled_and_other_files_are_told(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.array([{}], dtype=object))
    for file in (tmp_path / "x.npz", written(tmp_path / "y.npz", zipfile.ZIP_BZIP2, a=header((0,))), tmp_path):
        with pytest.raises(arrays.NoArrays):
            arrays.read(file, ("a",))
    with pytest.raises(FileNotFoundError):
        arrays.read(tmp_path / "none.npz", ("a",))
