"""Megatron's .bin/.idx format: a writer and a reader of whole pairs.

The .bin file holds the tokens of all sequences, little-endian, one after the other. The .idx file holds a header (`HEADER`),
the length of each sequence in tokens (int32), its offset in the .bin file in bytes (int64), and the bounds of documents in
sequences (int64, one more than there are documents).
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from lime_dist.data.files import sync_folder
from lime_dist.errors import LimeError

MAGIC = b"MMIDIDX\0\0"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in enumerate(("<u1", "<i1", "<i2", "<i4", "<i8", "<f8", "<f4", "<u2"), start=1)
}
UINT16_VOCAB_LIMIT = 65500  # Megatron's own limit: smaller vocabularies are stored as uint16
DAMAGED = "the pair is truncated, stale or damaged: write it again"


def smallest_dtype(vocab_size: int) -> np.dtype[Any]:
    """The token type that Megatron uses for a vocabulary: uint16 for fewer than 65,500 entries, else int32."""
    return DTYPES[8] if vocab_size < UINT16_VOCAB_LIMIT else DTYPES[4]


def pair_paths(prefix: str | Path) -> tuple[Path, Path]:
    """The paths of the .bin and the .idx file of a prefix, which may contain dots."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def is_pair(prefix: str | Path) -> bool:
    """Whether a path is the prefix of a pair, or of what is left of one, and not a folder."""
    return not Path(prefix).is_dir() and any(path.exists() for path in pair_paths(prefix))


class IndexedWriter:
    """Writes documents of token ids to ``prefix``.bin and ``prefix``.idx; one document is one sequence.

    Both files are written under temporary names and renamed by `close`, or at the end of a ``with`` block, the .bin file first.
    An exception in the block deletes them.

    Attributes:
        tokens: number of tokens added so far.
        bin_bytes, idx_bytes, bin_sha256, idx_sha256: sizes and hashes of both files, after `close`.
    """

    def __init__(self, prefix: str | Path, dtype: Any) -> None:
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, known in DTYPES.items() if known == self.dtype]
        if not codes:
            raise ValueError(f"dtype {dtype} has no code in the indexed format")
        self._code = codes[0]
        self._paths = pair_paths(prefix)
        self._temporary = tuple(path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in self._paths)
        self._lengths = array("i")
        self._bin = open(self._temporary[0], "wb")
        self._bin_hash = hashlib.sha256()
        self.tokens = 0
        self.bin_bytes = self.idx_bytes = 0
        self.bin_sha256 = self.idx_sha256 = ""

    @property
    def documents(self) -> int:
        """Number of documents added so far."""
        return len(self._lengths)

    def add_document(self, ids: np.ndarray) -> None:
        """Append a document.

        Args:
            ids: token ids [tokens] of any integer type.

        Raises:
            ValueError: an id does not fit the type of the shard.
        """
        if ids.ndim != 1:
            raise ValueError(f"a document is a flat array of ids, not one of shape {ids.shape}")
        if ids.dtype != self.dtype and ids.size and self.dtype.kind in "iu":
            limits = np.iinfo(self.dtype)
            if int(ids.min()) < limits.min or int(ids.max()) > limits.max:
                raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit {self.dtype}")
        data = np.ascontiguousarray(ids, dtype=self.dtype).data
        self._bin.write(data)
        self._bin_hash.update(data)
        self._lengths.append(ids.size)
        self.tokens += ids.size

    def close(self) -> None:
        """Flush both files to disk and rename them. An old .idx file is deleted first, so that it never goes with the new .bin."""
        lengths = np.asarray(self._lengths, dtype="<i4")
        sizes = lengths.astype("<i8") * self.dtype.itemsize
        offsets = np.zeros(lengths.size, dtype="<i8")
        np.cumsum(sizes[:-1], out=offsets[1:])
        bounds = np.arange(lengths.size + 1, dtype="<i8")
        header = HEADER.pack(MAGIC, VERSION, self._code, lengths.size, lengths.size + 1)
        index = header + lengths.tobytes() + offsets.tobytes() + bounds.tobytes()
        try:
            self._bin.flush()
            os.fsync(self._bin.fileno())
            self._bin.close()
            with open(self._temporary[1], "wb") as file:
                file.write(index)
                file.flush()
                os.fsync(file.fileno())
            self._paths[1].unlink(missing_ok=True)
            for temporary, path in zip(self._temporary, self._paths, strict=True):
                os.replace(temporary, path)
            sync_folder(self._paths[0].parent)
        except BaseException:
            self.abort()
            raise
        self.bin_bytes, self.idx_bytes = int(sizes.sum()), len(index)
        self.bin_sha256, self.idx_sha256 = self._bin_hash.hexdigest(), hashlib.sha256(index).hexdigest()

    def abort(self) -> None:
        """Delete what was written."""
        self._bin.close()
        for temporary in self._temporary:
            temporary.unlink(missing_ok=True)

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class IndexedDataset:
    """A memory-mapped .bin/.idx pair of S sequences.

    Attributes:
        dtype: type of a token.
        lengths: int32 [S], in tokens.
        offsets: int64 [S], in bytes.
        document_bounds: int64 [documents + 1], in sequences.
        tokens: all tokens of the .bin file.

    Raises:
        LimeError: a file is missing, damaged or of another format.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.bin_path, self.idx_path = pair_paths(prefix)
        for path in (self.idx_path, self.bin_path):
            if not path.is_file():
                raise LimeError(f"{path}: no such file; a shard is a .bin and an .idx of one name, give their prefix")
        idx_size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise LimeError(
                f"{self.idx_path}: no indexed shard: it starts with {header[: len(MAGIC)]!r}, not {MAGIC!r}; "
                "give the prefix of a Megatron .bin/.idx pair"
            )
        if len(header) < HEADER.size:
            raise LimeError(f"{self.idx_path}: has {idx_size} bytes, its header alone needs {HEADER.size}; {DAMAGED}")
        _, version, code, sequences, bounds = HEADER.unpack(header)
        if version != VERSION:
            raise LimeError(f"{self.idx_path}: format version {version}, only {VERSION} can be read; convert the shard")
        if code not in DTYPES:
            raise LimeError(f"{self.idx_path}: unknown dtype code {code}, known are 1 to {len(DTYPES)}; {DAMAGED}")
        needed = HEADER.size + 12 * sequences + 8 * bounds
        if idx_size != needed:
            raise LimeError(
                f"{self.idx_path}: has {idx_size} bytes, but {sequences} sequences and {bounds} document bounds need "
                f"{needed}; {DAMAGED}"
            )
        self.dtype = DTYPES[code]
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")[HEADER.size :]
        self.lengths = index[: 4 * sequences].view("<i4")
        self.offsets = index[4 * sequences : 12 * sequences].view("<i8")
        self.document_bounds = index[12 * sequences :].view("<i8")
        self._check_index(sequences)
        bin_size, said = self.bin_path.stat().st_size, int(self.lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if bin_size != said:
            raise LimeError(f"{self.bin_path}: has {bin_size} bytes, but its .idx lists {said}; {DAMAGED}")
        # An empty file cannot be memory-mapped.
        self.tokens = np.memmap(self.bin_path, dtype=self.dtype, mode="r") if bin_size else np.empty(0, self.dtype)

    def _check_index(self, sequences: int) -> None:
        lengths, offsets, bounds = self.lengths, self.offsets, self.document_bounds
        steps = offsets[:-1] + lengths[:-1].astype(np.int64) * self.dtype.itemsize
        if sequences and (int(lengths.min()) < 0 or offsets[0] != 0 or not np.array_equal(offsets[1:], steps)):
            raise LimeError(f"{self.idx_path}: its offsets do not follow from its lengths; {DAMAGED}")
        if not bounds.size or bounds[0] != 0 or bounds[-1] != sequences or np.any(bounds[1:] < bounds[:-1]):
            raise LimeError(f"{self.idx_path}: document bounds do not run from 0 to {sequences} sequences; {DAMAGED}")

    def __len__(self) -> int:
        """Number of documents."""
        return self.document_bounds.size - 1

    def document(self, i: int) -> np.ndarray:
        """Token ids [tokens] of document i: a view over all its sequences.

        Raises:
            IndexError: there is no such document.
        """
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        first, last = int(self.document_bounds[i]), int(self.document_bounds[i + 1])
        if first == last:
            return self.tokens[:0]
        start = int(self.offsets[first]) // self.dtype.itemsize
        end = int(self.offsets[last - 1]) // self.dtype.itemsize + int(self.lengths[last - 1])
        return self.tokens[start:end]
