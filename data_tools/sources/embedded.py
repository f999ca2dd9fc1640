"""The embedded corpus: Python's help topics and the docstrings of all installed packages, as parquet.

Source files are parsed, never imported. A document is either one help topic, or the docstrings of one module with its
classes and functions, in source order. Of a docstring that occurs several times, only the first is kept. Help topics
come first, then files ordered by a hash of their names, so that any prefix samples all packages. The columns are
FineWeb-Edu's; ``language``, ``language_score``, ``score`` and ``int_score`` are constants, not measurements.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import io
import multiprocessing
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.common import disk_errors, progress_bar, start_worker
from lime_dist.data.files import json_bytes, lock_folder, read_json, sha256_file, write_atomic
from lime_dist.errors import LimeError
from lime_dist.paths import expand

FORMAT = "lime_dist embedded corpus 1"
ABOUT = (  # part of the files: another text changes their bytes
    "Python's help topics and the docstrings of all installed packages. language, language_score, score and int_score are "
    "constants, not measurements."
)
MANIFEST = "corpus.json"
TOPICS = "pydoc_data/topics.py"
OWN_PACKAGES = ("lime_dist", "data_tools")
MIN_DOCUMENT = 200  # characters
MIN_CORPUS = 5e6  # bytes
MIN_DENSITY = 0.1
"""Share of a source file inside triple quotes. Sparser files give 7 % of the text for 45 % of the parsing time."""

MAX_SOURCE = 2_000_000  # bytes
FILE_TEXT_BYTES, ROW_GROUP_ROWS, FILES_AT_ONCE = 8_000_000, 512, 16
QUOTED = re.compile(rb"\"\"\".*?\"\"\"|'''.*?'''", re.DOTALL)
CONSTANTS: dict[str, Any] = {"dump": "embedded", "language": "en", "language_score": 1.0, "score": 3.0, "int_score": 3}
SCHEMA = pa.schema(
    {
        "text": pa.string(),
        "id": pa.string(),
        "dump": pa.string(),
        "url": pa.string(),
        "file_path": pa.string(),
        "language": pa.string(),
        "language_score": pa.float64(),
        "token_count": pa.int64(),
        "score": pa.float64(),
        "int_score": pa.int64(),
    },
    metadata={"about": ABOUT, "token_count": "words separated by white space"},
)
Documents = list[tuple[str, list[str]]]  # (url, docstrings) of one source file


def source_files() -> list[tuple[str, str]]:
    """(name relative to its root, path) of every Python file of the standard library and the installed packages.

    Links are followed, each folder once. A folder that cannot be read is listed like a file.
    """
    paths = sysconfig.get_paths()
    path_of: dict[str, str] = {}
    visited: set[str] = set()

    def unreadable(error: OSError) -> None:
        path_of[str(error.filename)] = str(error.filename)

    for root in dict.fromkeys((paths["stdlib"], paths["purelib"], paths["platlib"])):
        for folder, inner, names in os.walk(root, onerror=unreadable, followlinks=True):
            if (real := os.path.realpath(folder)) in visited:
                inner.clear()
                continue
            visited.add(real)
            top = folder == root
            inner[:] = [
                name
                for name in inner
                if name not in ("__pycache__", "site-packages", "dist-packages") and not (top and name in OWN_PACKAGES)
            ]
            for name in names:
                if name.endswith(".py"):
                    path = os.path.join(folder, name)
                    path_of.setdefault(os.path.relpath(path, root).replace(os.sep, "/"), path)
    order = sorted(path_of, key=lambda name: (name != TOPICS, hashlib.sha256(name.encode()).digest()))
    return [(name, path_of[name]) for name in order]


def read_source(name: str, path: str) -> Documents | str:
    """Return the documents of one source file, or the reason why it has none."""
    try:
        with open(path, "rb") as file:
            source = file.read()
        if name == TOPICS:
            return [(f"pydoc_data.topics#{topic}", [text.strip()]) for topic, text in _help_topics(source).items()]
        if len(source) > MAX_SOURCE:
            return "too large"
        if sum(map(len, QUOTED.findall(source))) < MIN_DENSITY * len(source):
            return "few docstrings"
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"not readable ({type(error).__name__})"
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = sorted((n for n in ast.walk(tree) if isinstance(n, owners)), key=lambda n: getattr(n, "lineno", 0))
    docstrings = [text for node in nodes if (text := ast.get_docstring(node))]
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return [(module, docstrings)] if docstrings else "few docstrings"


def _help_topics(source: bytes) -> dict[str, str]:
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            return dict(sorted(ast.literal_eval(statement.value).items()))
    return {}


def _read_sources(files: list[tuple[str, str]]) -> list[Documents | str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's sources
        return [read_source(name, path) for name, path in files]


def collect(max_bytes: int, workers: int, skipped: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield rows of the corpus, at most ``max_bytes`` of text in all; ``skipped`` counts what is left out, by reason."""
    files = source_files()
    batches = [files[start : start + FILES_AT_ONCE] for start in range(0, len(files), FILES_AT_ONCE)]
    seen: set[bytes] = set()
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start_worker, initargs=(os.getpid(),))
    try:
        with progress_bar(max_bytes, "embedded corpus") as bar:
            for batch, results in zip(batches, pool.map(_read_sources, batches), strict=True):
                for (name, _), documents in zip(batch, results, strict=True):
                    if isinstance(documents, str):
                        skipped[documents] += 1
                        continue
                    for url, docstrings in documents:
                        text = _distinct_text(docstrings, seen)
                        if len(text) < MIN_DOCUMENT:
                            skipped["short or repeated"] += 1
                            continue
                        size = len(text.encode())
                        if bar.n + size > max_bytes:
                            return
                        bar.update(size)
                        yield _row(text, url, name)
            bar.total = bar.n
    finally:
        pool.shutdown(cancel_futures=True)


def _distinct_text(docstrings: list[str], seen: set[bytes]) -> str:
    fresh = []
    for docstring in docstrings:
        key = hashlib.sha256(docstring.encode("utf-8", "surrogatepass")).digest()
        if key not in seen and (docstring.isascii() or _encodable(docstring)):
            seen.add(key)
            fresh.append(docstring)
    return "\n\n".join(fresh)


def _encodable(text: str) -> bool:
    """False for text with a lone surrogate (from an escape in a docstring), which UTF-8 cannot encode."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _row(text: str, url: str, name: str) -> dict[str, Any]:
    identifier = f"<urn:sha256:{hashlib.sha256(text.encode()).hexdigest()}>"
    words = len(text.split())
    return {"text": text, "id": identifier, "url": url, "file_path": name, "token_count": words, **CONSTANTS}


def write_corpus(output: Path, max_megabytes: float, workers: int) -> dict[str, Any]:
    """Write the corpus into a folder and return its manifest, which lists every file's size and hash and is written last.

    Raises:
        LimeError: the installed packages hold too little text.
    """
    for stale in [output / MANIFEST, *output.glob("embedded-*.parquet")]:
        stale.unlink(missing_ok=True)
    skipped: Counter[str] = Counter()
    files: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []

    def flush() -> None:
        sink = io.BytesIO()
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        pq.write_table(table, sink, row_group_size=ROW_GROUP_ROWS, compression="zstd", write_page_checksum=True)
        path, text_bytes = output / f"embedded-{len(files):05d}.parquet", sum(len(row["text"].encode()) for row in rows)
        write_atomic(path, sink.getvalue())
        facts = {"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_file(path)}
        files.append({**facts, "documents": len(rows), "text_bytes": text_bytes})
        rows.clear()

    pending = 0
    for row in collect(int(max_megabytes * 1e6), workers, skipped):
        rows.append(row)
        pending += len(row["text"])
        if pending >= FILE_TEXT_BYTES:
            flush()
            pending = 0
    if rows:
        flush()
    total = sum(file["text_bytes"] for file in files)
    if total < min(MIN_CORPUS, 0.9e6 * max_megabytes):
        raise LimeError(
            f"{output}: only {total / 1e6:.1f} MB of documentation found on this machine; first install the project's "
            "requirements (torch, deepspeed, pyarrow) into this Python environment"
        )
    manifest = {
        "format": FORMAT,
        "max_megabytes": max_megabytes,
        "documents": sum(file["documents"] for file in files),
        "text_bytes": total,
        "constant_columns": CONSTANTS,
        "sources_left_out": dict(sorted(skipped.items())),
        "files": files,
    }
    write_atomic(output / MANIFEST, json_bytes(manifest))
    return manifest


def complete(output: Path, max_megabytes: float) -> dict[str, Any] | None:
    """Return the manifest if the folder holds this corpus completely, None if it must be written.

    Raises:
        LimeError: the folder holds another corpus.
    """
    if not (output / MANIFEST).exists():
        return None
    manifest = read_json(output / MANIFEST, "add --fresh to write the corpus again")
    if manifest.get("format") != FORMAT or manifest["max_megabytes"] != max_megabytes:
        raise LimeError(
            f"{output}: holds a corpus made with --max-megabytes {manifest.get('max_megabytes')}, not {max_megabytes}; "
            "give another --output, or --fresh to replace it"
        )
    for file in manifest["files"]:
        path = output / file["name"]
        if not path.is_file() or path.stat().st_size != file["bytes"] or sha256_file(path) != file["sha256"]:
            print(f"{path} is missing or changed; writing the corpus again")
            return None
    return manifest


def add_arguments(commands: Any) -> None:
    """Add the sub-command with its options."""
    about = "Gather the docstrings of the standard library and the installed packages, without importing them."
    parser = commands.add_parser("embedded", help=about, description=about)
    parser.add_argument("--output", type=expand, required=True, help="folder for the parquet files and their manifest")
    parser.add_argument("--max-megabytes", type=float, default=20.0, help="stop at this much text (default 20)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--fresh", action="store_true", help="write the corpus again, even if the folder holds one")


def run(options: argparse.Namespace) -> None:
    """``python -m data_tools.sources embedded``."""
    if options.max_megabytes <= 0 or options.workers < 1:
        raise LimeError("--max-megabytes and --workers must be above 0")
    output = Path(options.output)
    with disk_errors("fix this and run the same command again"), lock_folder(output):
        manifest = None if options.fresh else complete(output, options.max_megabytes)
        state = "complete, reused" if manifest else "written"
        manifest = manifest or write_corpus(output, options.max_megabytes, options.workers)
    print(
        f"embedded corpus {state}: {manifest['text_bytes'] / 1e6:.1f} MB of text, {manifest['documents']:,} documents, "
        f"{len(manifest['files'])} files in {output}"
    )
