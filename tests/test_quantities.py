"""Protects how amounts with units are read and printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import pytest

from lime_dist.plan.quantities import (
    read_bandwidth,
    read_bytes,
    read_flops,
    read_seconds,
    read_share,
    show,
    show_seconds,
)


@pytest.mark.parametrize(
    ("read", "text", "amount"),
    [
        (read_bytes, "80GB", 80e9),
        (read_bytes, "40GiB", 40 * 2**30),
        (read_bytes, "1.5 TB", 1.5e12),
        (read_bytes, "512B", 512),
        (read_bandwidth, "400Gbit", 50e9),
        (read_bandwidth, "25GB/s", 25e9),
        (read_bandwidth, "200Mbps", 25e6),
        (read_seconds, "5us", 5e-6),
        (read_seconds, ".1ms", 1e-4),
        (read_seconds, "0s", 0),
        (read_flops, "800T", 800e12),
        (read_flops, "1e12", 1e12),
        (read_flops, "40GFLOPS", 40e9),
        (read_share, "0.4", 0.4),
    ],
)
def test_reading(read: Callable[[str], float], text: str, amount: float) -> None:
    assert read(text) == pytest.approx(amount)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (read_bytes, "80"),
        (read_bytes, "eighty GB"),
        (read_bytes, "80Gbit"),
        (read_bytes, "-80GB"),
        (read_bytes, "0GB"),
        (read_bytes, "1e999GB"),
        (read_bandwidth, "400"),
        (read_bandwidth, "400GiB/h"),
        (read_bandwidth, "0Gbit"),
        (read_seconds, "5"),
        (read_seconds, "5min"),
        (read_flops, "fast"),
        (read_flops, "0T"),
        (read_share, "0"),
        (read_share, ""),
    ],
)
def test_unreadable_amounts_are_one_line(read: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write for example") as error:
        read(text)
    assert repr(text) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (show(0, "B"), "0 B"),
        (show(512, "B"), "512 B"),
        (show(1999, "B"), "2.00 kB"),
        (show(999_600, "B"), "1.00 MB"),
        (show(80e9, "B"), "80.0 GB"),
        (show(99.97e9, "B"), "100 GB"),
        (show(12.34e12), "12.3 T"),
        (show_seconds(12.3), "12.3 s"),
        (show_seconds(0.0456), "45.6 ms"),
        (show_seconds(5e-6), "5.00 µs"),
        (show_seconds(3e-9), "3.00 ns"),
        (show_seconds(0), "0 s"),
    ],
)
def test_printing(shown: str, text: str) -> None:
    assert shown == text
