"""Datasets of the Hugging Face hub: which files a configuration has at one commit, with their sizes and SHA-256.

The commit is resolved first. Everything else is asked for at that commit, so that a new one cannot mix with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import yaml

from data_tools.sources.hub_requests import HubError, Missing, endpoint, get
from lime_dist.errors import LimeError

HUB = re.compile(r"hub:(?P<name>[^@:]+)(?:@(?P<revision>[^:]+))?(?::(?P<configuration>.+))?")
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_NEXT = re.compile(r"<([^>]+)>;\s*rel=\"next\"")
_FRONT_MATTER = re.compile(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", re.DOTALL)


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
    """The content of a small file, which is compared with its hash.

    Raises:
        HubError: it cannot be had.
    """

    def check(body: bytes) -> None:
        git_hash = hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()
        if file.sha256 != hashlib.sha256(body).hexdigest() if file.sha256 else file.git_hash != git_hash:
            raise ValueError(f"its content has not the hash that the hub says of {file.path}")

    return get(file.address, check=check).body


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
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise LimeError(f"--input {given}: HF_HUB_OFFLINE is set; unset it, or give local files")
    name, revision = match["name"], match["revision"] or "main"
    try:
        sha = _resolve(name, commit or revision)
        tree = {file.path: file for file in _tree(name, sha)}
        patterns = _patterns(tree, match["configuration"])
    except Missing as error:
        if commit is not None:
            raise LimeError(
                f"--input {given}: the output was begun with commit {commit}, which the hub no longer has ({error}); add "
                "--fresh to start again with another commit"
            ) from None
        raise LimeError(f"--input {given}: {error}; check the name, the revision and the configuration") from None
    except HubError as error:
        raise LimeError(f"--input {given}: {error}") from None
    files = tuple(tree[path] for path in sorted(tree) if any(pattern.fullmatch(path) for pattern in patterns))
    print(f"hub: {name} at commit {sha}, {len(files):,} files, {sum(file.size for file in files) / 1e6:,.1f} MB")
    return HubDataset(name, sha, files)


def _resolve(name: str, revision: str) -> str:
    answer = get(f"{endpoint()}/api/datasets/{name}/revision/{quote(revision, safe='')}", check=json.loads)
    return str(json.loads(answer.body)["sha"])


def _tree(name: str, commit: str) -> Iterator[HubFileFacts]:
    url: str | None = f"{endpoint()}/api/datasets/{name}/tree/{commit}?recursive=true"
    while url:
        answer = get(url, check=json.loads)
        for entry in json.loads(answer.body):
            if entry["type"] == "file":
                path, lfs = entry["path"], entry.get("lfs") or {}
                address = f"{endpoint()}/datasets/{name}/resolve/{commit}/{quote(path)}"
                yield HubFileFacts(path, int(entry["size"]), lfs.get("oid"), str(entry["oid"]), address)
        following = _NEXT.search(answer.headers.get("Link") or "")
        url = following[1] if following else None


def _patterns(tree: dict[str, HubFileFacts], configuration: str | None) -> list[re.Pattern[str]]:
    """What the files of the training split are called, from the README's configurations, or as `datasets` guesses."""
    configurations: dict[str, dict[str, Any]] = {}
    paths = list(tree)
    if (readme := tree.get("README.md")) is not None:
        text = whole_content(readme).decode("utf-8", "replace")
        front = _FRONT_MATTER.match(text)
        try:
            listed = (yaml.safe_load(front[1]) or {}).get("configs") if front else None
            configurations = {str(one["config_name"]): one for one in listed or []}
        except (yaml.YAMLError, AttributeError, TypeError, KeyError) as error:
            raise HubError(f"the configurations in README.md cannot be read ({type(error).__name__})") from None
    if not configurations and configuration is None:
        return _guessed_patterns(paths)
    defaults = [one for one in configurations if one == "default" or configurations[one].get("default")]
    chosen = configuration or (list(configurations)[0] if len(configurations) == 1 else (defaults or [""])[0])
    if chosen not in configurations:
        known = ", ".join(list(configurations)[:10]) or "none"
        wanted = f"no configuration {configuration!r}" if configuration else "no default configuration"
        raise Missing(f"{wanted}; it has {known}{', …' if len(configurations) > 10 else ''}")
    data_files = configurations[chosen].get("data_files")
    items = data_files if isinstance(data_files, list) else [data_files]
    globs = [one for one in items if isinstance(one, str)]
    for one in (one for one in items if isinstance(one, dict) and one.get("split") == "train"):
        globs += one["path"] if isinstance(one["path"], list) else [one["path"]]
    if not globs:
        return _guessed_patterns(paths) if data_files is None else []
    return [_glob(pattern) for pattern in globs]


def _guessed_patterns(paths: list[str]) -> list[re.Pattern[str]]:
    """All files, or those whose names contain "train", if any does."""
    train = re.compile(r"(.*[/._ -])?train(ing)?([/._ 0-9-].*)?")
    return [train] if any(train.fullmatch(path) for path in paths) else [re.compile(".*")]


def _glob(pattern: str) -> re.Pattern[str]:
    """A pattern of file names: ``*`` and ``?`` stay inside a folder, ``**`` does not."""
    words = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern.removeprefix("./"))
    return re.compile("".join(words.get(part) or (part if part.startswith("[") else re.escape(part)) for part in parts))
