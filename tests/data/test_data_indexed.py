"""Tests of the .bin/.idx format: existing corpora are read as they are, and damaged pairs are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lime_dist.data.indexed import IndexedDataset, IndexedWriter, smallest_dtype
from lime_dist.errors import LimeError


def write_pair(prefix: Path, dtype: str = "<u2") -> list[np.ndarray]:
    documents = [np.arange(5), np.arange(7) + 100, np.arange(0), np.arange(3) + 65000]
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return documents


def by_hand(magic: bytes = b"MMIDIDX\0\0", version: int = 1, code: int = 4) -> bytes:
    """An .idx file, field by field: three sequences of 2, 1 and 3 int32 tokens, in two documents."""
    parts = [magic, struct.pack("<Q", version), struct.pack("<B", code), struct.pack("<Q", 3), struct.pack("<Q", 3)]
    parts += [struct.pack("<i", length) for length in (2, 1, 3)]
    parts += [struct.pack("<q", offset) for offset in (0, 8, 12)]
    parts += [struct.pack("<q", bound) for bound in (0, 2, 3)]
    return b"".join(parts)


@pytest.mark.parametrize("dtype", ["<u2", "<i4", "<i8"])
def test_what_is_written_reads_back(tmp_path: Path, dtype: str) -> None:
    documents = write_pair(tmp_path / "a.b", dtype)
    data = IndexedDataset(tmp_path / "a.b")
    assert len(data) == len(documents) and data.dtype == np.dtype(dtype)
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(data.document(i), document)
    np.testing.assert_array_equal(data.tokens, np.concatenate(documents))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.b.bin", "a.b.idx"]
    with pytest.raises(IndexError):
        data.document(4)


def test_a_file_written_byte_by_byte_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.idx").write_bytes(by_hand())
    (tmp_path / "x.bin").write_bytes(struct.pack("<6i", 1, -2, 70000, 4, 5, 6))
    data = IndexedDataset(tmp_path / "x")
    assert data.dtype == np.dtype("<i4") and data.lengths.tolist() == [2, 1, 3]
    assert data.offsets.tolist() == [0, 8, 12] and data.document_bounds.tolist() == [0, 2, 3]
    assert data.document(0).tolist() == [1, -2, 70000] and data.document(1).tolist() == [4, 5, 6]


def test_what_is_written_has_the_documented_bytes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.asarray([7, 258]))
        writer.add_document(np.asarray([3]))
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, 2, 3)
    expected = header + struct.pack("<2i", 2, 1) + struct.pack("<2q", 0, 4) + struct.pack("<3q", 0, 1, 2)
    assert (tmp_path / "x.idx").read_bytes() == expected
    assert (tmp_path / "x.bin").read_bytes() == b"\x07\x00\x02\x01\x03\x00"


def test_every_dtype_code_of_the_format(tmp_path: Path) -> None:
    for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1):
        size = np.dtype(name).itemsize
        index = by_hand(code=code)[:46] + struct.pack("<3q", 0, 2 * size, 3 * size) + struct.pack("<3q", 0, 2, 3)
        (tmp_path / "x.idx").write_bytes(index)
        (tmp_path / "x.bin").write_bytes(np.arange(6).astype(f"<{name}").tobytes())
        assert IndexedDataset(tmp_path / "x").document(1).tolist() == [3, 4, 5]


def damage(prefix: Path, how: str) -> None:
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    index, tokens = bytearray(idx_path.read_bytes()), bin_path.read_bytes()
    if how == "truncated bin":
        bin_path.write_bytes(tokens[:-1])
    elif how == "long bin":
        bin_path.write_bytes(tokens + b"\0\0")
    elif how == "no bin":
        bin_path.unlink()
    elif how == "no idx":
        idx_path.unlink()
    elif how == "empty idx":
        idx_path.write_bytes(b"")
    elif how == "short header":
        idx_path.write_bytes(index[:20])
    elif how == "truncated idx":
        idx_path.write_bytes(index[:-3])
    elif how == "magic":
        idx_path.write_bytes(b"PK" + index[2:])
    elif how == "version":
        idx_path.write_bytes(index[:9] + struct.pack("<Q", 2) + index[17:])
    elif how == "dtype":
        idx_path.write_bytes(index[:17] + b"\x63" + index[18:])
    elif how == "huge count":
        idx_path.write_bytes(index[:18] + struct.pack("<Q", 2**63) + index[26:])
    elif how == "lengths":  # one token moved from document 1 to document 0: the sum stays, the offsets disagree
        idx_path.write_bytes(index[:34] + struct.pack("<2i", 6, 6) + index[42:])
    elif how == "bounds":
        idx_path.write_bytes(index[:-8] + struct.pack("<q", 3))
    else:
        raise AssertionError(how)


@pytest.mark.parametrize(
    ("how", "file", "says"),
    [
        ("truncated bin", "s.bin", "has 29 bytes, but its .idx lists 30"),
        ("long bin", "s.bin", "has 32 bytes"),
        ("no bin", "s.bin", "no such file"),
        ("no idx", "s.idx", "no such file"),
        ("empty idx", "s.idx", "no indexed shard"),
        ("short header", "s.idx", "header alone needs 34"),
        ("truncated idx", "s.idx", "document bounds need"),
        ("magic", "s.idx", "no indexed shard"),
        ("version", "s.idx", "format version 2"),
        ("dtype", "s.idx", "dtype code 99"),
        ("huge count", "s.idx", "document bounds need"),
        ("lengths", "s.idx", "offsets do not follow"),
        ("bounds", "s.idx", "document bounds do not run"),
    ],
)
def test_a_damaged_pair_is_one_clear_line(tmp_path: Path, how: str, file: str, says: str) -> None:
    write_pair(tmp_path / "s")
    damage(tmp_path / "s", how)
    with pytest.raises(LimeError) as caught:
        IndexedDataset(tmp_path / "s")
    message = str(caught.value)
    assert says in message and f"{tmp_path / file}: " in message and "\n" not in message and ";" in message


def test_only_whole_files_get_their_name(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_document(np.arange(4))
        assert not (tmp_path / "s.bin").exists()
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_rewritten_pair_replaces_the_old_one(tmp_path: Path) -> None:
    write_pair(tmp_path / "s")
    with IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_document(np.arange(2))
    assert len(IndexedDataset(tmp_path / "s")) == 1


def test_an_id_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="do not fit"), IndexedWriter(tmp_path / "s", np.uint16) as writer:
        writer.add_document(np.asarray([1, 65536]))


def test_smallest_dtype_is_megatrons_choice() -> None:
    assert [smallest_dtype(size).name for size in (100, 65499, 65500, 10**6)] == ["uint16", "uint16", "int32", "int32"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_core_reads_what_we_write_and_we_what_it_writes(tmp_path: Path, dtype: type) -> None:
    megatron = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed (extra test, on Linux)"
    )
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, 60000, size).astype(dtype) for size in (5, 1, 3000, 0, 12)]
    with IndexedWriter(tmp_path / "ours", dtype) as writer:
        for document in documents:
            writer.add_document(document)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == 5 and theirs.document_indices.tolist() == list(range(6))
    assert theirs.sequence_lengths.tolist() == [5, 1, 3000, 0, 12]
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(theirs[i], document)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for sequences in ([0, 1], [2], [4]):  # documents of several sequences, as sentence-split corpora have them
        for i in sequences:
            builder.add_item(torch.from_numpy(documents[i].astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    pair = IndexedDataset(tmp_path / "theirs")
    assert len(pair) == 3 and pair.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(pair.document(0), np.concatenate(documents[:2]))
    np.testing.assert_array_equal(pair.document(2), documents[4])
