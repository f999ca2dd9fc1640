"""Keep the measurements of a stopped benchmark, in results.json of its output folder, which is whole or absent; and open matplotlib."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from lime_dist.errors import LimeError


def read_results(output: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the results of earlier calls with the same settings, by name; {} if there are none.

    Raises:
        LimeError: the folder cannot be used, or its results were measured with other settings.
    """
    path = output / "results.json"
    try:
        output.mkdir(parents=True, exist_ok=True)
        content = json.loads(path.read_text()) if path.exists() else {"settings": settings, "results": {}}
    except (OSError, ValueError) as error:
        raise LimeError(f"--output {output}: {error}; give another folder") from None
    if content["settings"] != settings:
        differ = sorted(key for key in settings if content["settings"].get(key) != settings[key])
        raise LimeError(f"{path} was measured with other settings ({', '.join(differ)}); give another --output")
    results: dict[str, Any] = content["results"]
    return results


def write_results(output: Path, settings: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the results so far."""
    machine = f"{platform.node()}, torch {torch.__version__}"
    text = json.dumps({"settings": settings, "machine": machine, "results": results}, indent=1)
    write(output / "results.json", text + "\n")


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def plotting() -> Any | None:
    """Return matplotlib's pyplot, which draws into files only; None, after a line that says how to install it, if it is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: pip install -c constraints.txt -e '.[analysis]'")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
