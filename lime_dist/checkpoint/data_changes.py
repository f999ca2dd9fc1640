"""Whether a run's training data are those of its checkpoint, and if not, what going on with them means for their order."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lime_dist.config.schema import Config, DataConfig
from lime_dist.data.blend import Pattern
from lime_dist.data.identity import DataIdentity, DatasetIdentity

ACCEPT = "data.accept_change=true"


@dataclass(frozen=True)
class DataComparison:
    """What comparing data has shown.

    Attributes:
        problem: why the checkpoint cannot go on with these data; None: it can.
        notes: what the user should know if it does, in lines.
    """

    problem: str | None = None
    notes: tuple[str, ...] = ()


def compare_data(
    path: Path, manifest: dict[str, Any], config: Config, data: DataIdentity, key: str = "run.directory"
) -> DataComparison:
    """Compare the data of a run with those that a checkpoint has read. Where they lie does not matter.

    Args:
        path, manifest: of the checkpoint.
        config, data: of the run.
        key: the configuration key that led to the checkpoint.
    """
    saved = Config.model_validate(manifest["config"]).data
    there = DataIdentity.recorded(manifest["num_samples"], manifest.get("data"))
    known, notes = bool(there.datasets and data.datasets), []
    if data.datasets and not there.datasets:
        notes.append(
            f"{path} does not say which data it has read, since an earlier version wrote it: they are taken to be these"
        )
    differences = _differences(saved, there, config.data, data)
    if not differences:
        return DataComparison(notes=tuple(notes))
    if config.data.accept_change:
        step, consumed = (manifest["state"][key] for key in ("step", "consumed_samples"))
        notes.append(f"{ACCEPT}: {path} has read other data up to step {step} ({'; '.join(differences)})")
        return DataComparison(notes=(*notes, *_consequences(saved, there, config.data, data, consumed)))
    if known and Counter(one.content for one in there.datasets) == Counter(one.content for one in data.datasets):
        advice = f"write {_source(saved, there, data)} to go on as it began"
    else:
        advice = f"give the data that it has read, or another {key}"
    return DataComparison(
        f"{path} is of another run ({'; '.join(differences)}); {advice}, or {ACCEPT} to go on with these: the run then says "
        "what it reads again and what it leaves out"
    )


def _differences(saved: DataConfig, there: DataIdentity, config: DataConfig, here: DataIdentity) -> list[str]:
    differences = []
    if there.num_samples != here.num_samples:
        differences.append(f"training samples: {there.num_samples:,} there, {here.num_samples:,} here")
    if there.datasets and here.datasets:
        if len(there.datasets) != len(here.datasets):
            differences.append(f"datasets: {len(there.datasets)} there, {len(here.datasets)} here")
        differences += [
            f"dataset {number}: {one} there ({one.path}), {other} here ({other.path})"
            for number, (one, other) in enumerate(zip(there.datasets, here.datasets, strict=False), start=1)
            if one.content != other.content
        ]
    if _shares(saved) != _shares(config):
        differences.append(f"data.blend: {_weights(saved)} there, {_weights(config)} here")
    return differences


def _weights(config: DataConfig) -> list[float] | None:
    return None if config.blend is None else [entry.weight for entry in config.blend]


def _shares(config: DataConfig) -> list[int] | None:
    """The share of each dataset in the order of samples; None without a blend, whose single dataset has an order of its own."""
    weights = _weights(config)
    return None if weights is None else Pattern(weights, config.seed).counts.tolist()


def _source(saved: DataConfig, there: DataIdentity, here: DataIdentity) -> str:
    """The overrides with which a run reads the datasets ``here`` as the checkpoint has read them."""
    paths = {one.content: one.path for one in here.datasets}
    if saved.blend is None:
        return f"data.blend=null {shlex.quote(f'data.path={paths[there.datasets[0].content]}')}"
    entries = [
        {"path": paths[one.content], "weight": entry.weight}
        for one, entry in zip(there.datasets, saved.blend, strict=True)
    ]
    return shlex.quote(f"data.blend={json.dumps(entries)}")


def _read(config: DataConfig, consumed: int) -> list[int]:
    """Number of samples that the first ``consumed`` positions have read of each dataset."""
    weights = _weights(config)
    return [consumed] if weights is None else Pattern(weights, config.seed).read(consumed)


def _consequences(
    saved: DataConfig, there: DataIdentity, config: DataConfig, here: DataIdentity, consumed: int
) -> list[str]:
    """A line per dataset: what of it is read again or left out, since positions go on where the checkpoint stopped."""
    lines, left = [], dict(enumerate(there.datasets))
    read_there, same_kind = _read(saved, consumed), (saved.blend is None) == (config.blend is None)
    for number, (dataset, read) in enumerate(zip(here.datasets, _read(config, consumed), strict=True)):
        match = next((k for k in sorted(left, key=lambda k: k != number) if left[k].content == dataset.content), None)
        if match is not None:
            del left[match]
        before = None if match is None else read_there[match]
        same_order = match == number and same_kind
        lines.append(f"{dataset.path}: {_consequence(dataset, config.sequence_length, before, read, same_order)}")
    return [*lines, *(f"{dataset.path}: is no longer read" for dataset in left.values())]


def _consequence(dataset: DatasetIdentity, length: int, before: int | None, read: int, same_order: bool) -> str:
    """What follows for a dataset of which ``before`` samples have been read (None: it is new) and ``read`` count as read."""
    samples = max(1, (dataset.tokens - 1) // length)
    if before is None:
        return f"is new; {read % samples:,} of its {samples:,} samples are left out in its current epoch"
    if not same_order:
        old, new = before % samples, read % samples
        again, out = round(old * (samples - new) / samples), round(new * (samples - old) / samples)
        return (
            f"has another order; of its {samples:,} samples, about {again:,} are read again in its current epoch and about "
            f"{out:,} are left out"
        )
    if read == before:
        return "goes on where it was"
    return f"{abs(read - before):,} samples are {'left out' if read > before else 'read again'}"
