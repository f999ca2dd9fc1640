"""Read and print amounts with units: 80GB, 400Gbit, 5us, 800T."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

_PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {f"{prefix}i": 1024.0**power for power, prefix in enumerate("KMGTP", 1)}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


def _units(names: dict[str, float], prefixes: dict[str, float]) -> dict[str, float]:
    return {prefix + name: scale * size for prefix, scale in prefixes.items() for name, size in names.items()}


def _reader(kind: str, units: dict[str, float], example: str, least: float) -> Callable[[str], float]:
    """A ``type`` for argparse options that reads a number with a unit as a finite amount in base units, at least ``least``."""

    def read(text: str) -> float:
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ/]*)\s*", text)
        if match is None or match[2] not in units:
            raise argparse.ArgumentTypeError(f"cannot read {text!r} as {kind}; write for example {example}")
        amount = float(match[1]) * units[match[2]]
        if not least <= amount < math.inf:
            raise argparse.ArgumentTypeError(
                f"{text!r} is too small or too large for {kind}; write for example {example}"
            )
        return amount

    return read


_BYTES = _units({"B": 1.0}, _PREFIXES | _BINARY)
_RATES = _units({"B": 1.0, "B/s": 1.0, "bit": 1 / 8, "bit/s": 1 / 8, "bps": 1 / 8}, _PREFIXES | _BINARY)
_FLOPS = _units({"": 1.0, "FLOPS": 1.0, "FLOP/s": 1.0}, _PREFIXES)

read_bytes = _reader("an amount of memory", _BYTES, "80GB or 40GiB", 1.0)
read_bandwidth = _reader("a bandwidth", _RATES, "400Gbit or 50GB (per second)", 1.0)
read_seconds = _reader("a time", _SECONDS, "5us or 0.1ms", 0.0)
read_flops = _reader("a speed", _FLOPS, "800T (FLOPs per second)", 1.0)
read_share = _reader("a fraction", {"": 1.0}, "0.4", 1e-6)


def show(amount: float, unit: str = "") -> str:
    """Three digits and a prefix, such as 12.3 GB, 512 B or 1.29 M."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if amount >= 0.9995 * scale:
            return f"{_three_digits(amount / scale)} {prefix}{unit}"
    return f"{amount:.0f} {unit}".rstrip()


def show_seconds(seconds: float) -> str:
    """Three digits and a unit, such as 12.3 s, 45.6 ms or 7.80 µs."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds * 1e9)} ns" if seconds else "0 s"


def show_hours(hours: float) -> str:
    """Three digits of hours, such as 12.3 hours; below one hour minutes, and days beside hours from two days on."""
    if hours < 1:
        return f"{_three_digits(60 * hours)} minutes"
    days = f" ({_three_digits(hours / 24)} days)" if hours >= 48 else ""
    return f"{_three_digits(hours)} hours{days}"


def _three_digits(number: float) -> str:
    digits = 0 if number >= 99.95 or number == 0 else 1 if number >= 9.995 else 2
    return f"{number:,.{digits}f}"
