"""Datasets of the Hugging Face hub: which files a configuration has at one commit, with their sizes and SHA-256.

The commit is resolved first. Everything else is asked for at that commit, so that a new one cannot mix with it.
"""

from __future__ import annotations

import hashlib
import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

from data_tools.sources.hub_requests import HubError, Missing, get, use_patient_client
from lime_dist.errors import LimeError, first_line

HUB = re.compile(r"hub:(?P<name>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<configuration>.+))?")
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class HubFileFacts:
    """A file of a dataset at a commit.

    Attributes:
        path: inside the repository.
        sha256: of its content; None for small files, of which the hub knows only git's hash.
        git_hash: of the content of a small file, or of a pointer to a large one.
    """

    path: str
    size: int
    sha256: str | None
    git_hash: str
    address: str


def whole_content(file: HubFileFacts) -> bytes:
    """The content of a small file, which is compared with git's hash of it.

    Raises:
        HubError: it cannot be had.
    """

    def check(answer: httpx2.Response) -> None:
        body = answer.content
        git_hash = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        if git_hash != file.git_hash:
            raise ValueError(f"its content has not the hash that the hub says of {file.path}")

    return get(file.address, check).content


@dataclass(frozen=True)
class HubDataset:
    """The files of the training split of a dataset at a commit."""

    name: str
    commit: str
    files: tuple[HubFileFacts, ...]


def hub_dataset(given: str, commit: str | None = None) -> HubDataset:
    """List the training files of ``hub:OWNER/NAME[@REVISION][:CONFIGURATION]``.

    Args:
        commit: the one to use, whatever the revision is by now.

    Raises:
        LimeError: the dataset, revision or configuration does not exist, or the hub cannot be reached.
    """
    match = HUB.fullmatch(given)
    if match is None or not _NAME.fullmatch(match["name"]):
        raise LimeError(
            f"--input {given}: give hub:OWNER/NAME[@REVISION][:CONFIGURATION]; for a folder of this machine leave out hub:"
        )
    import huggingface_hub

    if huggingface_hub.is_offline_mode():
        raise LimeError(f"--input {given}: HF_HUB_OFFLINE is set; unset it, or give local files")
    name = match["name"]
    use_patient_client()
    try:
        with _quiet_libraries():
            sha = str(huggingface_hub.HfApi().dataset_info(name, revision=commit or match["revision"] or "main").sha)
            paths = _training_paths(name, sha, match["configuration"])
            tree = {file.path: file for file in _tree(name, sha)}
        files = tuple(tree[path] for path in sorted(paths))
    except Missing as error:
        if commit is not None:
            raise LimeError(
                f"--input {given}: the output was begun with commit {commit}, which the hub no longer has ({error}); add "
                "--fresh to start again with another commit"
            ) from None
        raise LimeError(f"--input {given}: {error}; check the name, the revision and the configuration") from None
    except HubError as error:
        raise LimeError(f"--input {given}: {error}") from None
    print(f"hub: {name} at commit {sha}, {len(files):,} files, {sum(file.size for file in files) / 1e6:,.1f} MB")
    return HubDataset(name, sha, files)


def _training_paths(name: str, commit: str, configuration: str | None) -> list[str]:
    """The paths of a configuration's training split, as `datasets` knows them.

    Raises:
        HubError: `datasets` does not know the configuration or cannot read the description of the dataset.
    """
    import datasets

    place = f"hf://datasets/{name}"  # never a local folder of that name
    try:
        with (
            tempfile.TemporaryDirectory() as empty
        ):  # a dataset in the cache must not stand in for one that cannot be read
            builder = datasets.load_dataset_builder(place, name=configuration, revision=commit, cache_dir=empty)
            paths = [str(path) for path in (builder.config.data_files or {}).get("train", [])]
    except HubError:
        raise
    except Exception as error:  # those of `datasets` come from half a dozen libraries
        raise HubError(f"{first_line(error).rstrip('.')}; check the configuration") from None
    root = f"{place}@{commit}/"
    if others := [path for path in paths if not path.startswith(root)]:
        raise HubError(
            f"{others[0]} is not a file of {name} at commit {commit}; download it and give it as a local one"
        )
    return [path.removeprefix(root) for path in paths]


def _tree(name: str, commit: str) -> Iterator[HubFileFacts]:
    import huggingface_hub

    kind = "dataset"
    for file in huggingface_hub.HfApi().list_repo_tree(name, repo_type=kind, revision=commit, recursive=True):
        if isinstance(file, huggingface_hub.RepoFile):
            address = huggingface_hub.hf_hub_url(name, file.path, repo_type=kind, revision=commit)
            yield HubFileFacts(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id, address)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Leave out progress bars and warnings; what counts comes as an exception."""
    import datasets
    import huggingface_hub

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # counts at another host, which may be out of reach
    datasets.disable_progress_bars()
    huggingface_hub.utils.disable_progress_bars()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
