"""Protects when layers are compiled, and what is said where they cannot be."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from lime_dist import build_decoder, load_config
from lime_dist.errors import LimeError
from lime_dist.model import blocks

SIZE = ["model.hidden_size=8", "model.intermediate_size=8", "model.num_attention_heads=2", "model.num_hidden_layers=2"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def compiled_parts(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, setting: Literal["auto"] | bool, obstacle: str | None
) -> tuple[int, str | None]:
    """Return how many methods would be compiled on a machine on which torch fails with ``obstacle``, and what is said."""
    layers = build_decoder(load_config(None, SIZE).model).model.layers
    made: list[object] = []
    monkeypatch.setattr(blocks, "compile_obstacle", lambda device: obstacle)
    monkeypatch.setattr(blocks, "_compiled", lambda part: made.append(part) or part)
    said = blocks.compile_layers(layers, device, setting)
    return len(made), said


def test_parts_are_compiled_by_default_on_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = load_config(None).train.compile
    assert compiled_parts(monkeypatch, CUDA, setting, None) == (4, None)
    assert compiled_parts(monkeypatch, CPU, setting, None) == (0, None)
    assert compiled_parts(monkeypatch, CPU, True, None) == (4, None)
    assert compiled_parts(monkeypatch, CUDA, False, None) == (0, None)


def test_without_triton_layers_run_uncompiled_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    count, said = compiled_parts(monkeypatch, CUDA, "auto", "Cannot find a working triton installation.")
    assert count == 0
    assert said == (
        "layers run uncompiled, which is slower: torch cannot compile for cuda:0 here (Cannot find a working triton "
        "installation.); install Triton, or set train.compile=false"
    )
    with pytest.raises(LimeError, match="train.compile=true: torch cannot compile for cuda:0 here"):
        compiled_parts(monkeypatch, CUDA, True, "Cannot find a working triton installation.")


def test_layers_with_weight_passes_run_uncompiled_with_one_line() -> None:
    assert (said := blocks.compile_layers([], CUDA, "auto", splits_backward=True)) is not None
    assert said.startswith("layers run uncompiled, which is slower: ") and "pipeline.schedule" in said
    assert blocks.compile_layers([], CUDA, False, splits_backward=True) is None
    assert blocks.compile_layers([], CPU, "auto", splits_backward=True) is None


def test_an_obstacle_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> object:
        raise RuntimeError("InvalidCxxCompiler: no C++ compiler\n\nmore lines")

    monkeypatch.setattr(blocks, "_compiled", fail)
    assert blocks.compile_obstacle(CPU) == "InvalidCxxCompiler: no C++ compiler"


def test_an_obstacle_without_a_message_has_the_name_of_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: object) -> object:
        raise NotImplementedError

    monkeypatch.setattr(blocks, "_compiled", fail)
    assert blocks.compile_obstacle(CPU) == "NotImplementedError"
