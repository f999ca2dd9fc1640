"""How far a training on the device is from float64, measured by how far the CPU is in the same precision.

Two devices round differently, and the difference grows from step to step; no fixed bound fits all models and parameters. The
reference is the single-process decoder in float64, from the same weights. The CPU's decoder in the precision of the run
has some error too, and the device may have a few times that. A parameter is compared together with its like in all layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from equality import Result, train_one_process
from torch import Tensor

from lime_dist.config.schema import Config

STEPS = 3
EVALUATION_MICRO_BATCH_SIZE = 2
"""Differs from training."""
FACTOR = 4.0
FLOOR = {"fp32": 3e-5, "bf16": 5e-2}
"""Errors below this always pass. TF32 would give 5e-4 and more in fp32."""
SMALLEST = 1e-3
"""Tensors that are smaller than this part of the largest of their kind are measured by that: they are sums that nearly cancel."""
NUMBERS = ("losses", "evaluations", "norms")
TENSORS = ("gradients", "parameters", "updates")
KINDS = (*NUMBERS, *TENSORS)
Errors = dict[str, dict[str, float]]
"""By kind, the largest relative error of each group: of numbers |Δ| / |x|, of tensors ‖Δ‖∞ / ‖x‖∞; infinite if not finite."""


@dataclass(frozen=True)
class Worst:
    """The group of a kind that is closest to its bound, or farthest beyond it."""

    name: str
    error: float
    own: float
    bound: float

    @property
    def cell(self) -> str:
        return f"{self.error:.0e} ({self.own:.0e})"


class Comparison:
    """Compares results of one configuration with the CPU's."""

    def __init__(self, config: Config) -> None:
        self._floor = FLOOR[config.precision]
        self._reference = train_one_process(config, STEPS, EVALUATION_MICRO_BATCH_SIZE, torch.float64)
        if min(self._reference["norms"]) <= config.optimizer.max_grad_norm:
            raise AssertionError("every step must clip, otherwise clipping is not tested")
        self._own = errors(train_one_process(config, STEPS, EVALUATION_MICRO_BATCH_SIZE), self._reference)

    def check(self, results: list[Result]) -> tuple[list[str], list[str]]:
        """Compare the results of all ranks.

        Returns:
            A cell "error (the CPU's error)" for each kind, and a line for each kind that is too far off.
        """
        worst = self.worst(results)
        problems = [
            f"{each.name} are off by {each.error:.1e}, the CPU's by {each.own:.1e}"
            for kind, each in worst.items()
            if not each.error <= each.bound
        ]
        missing = set(self._reference["gradients"]).difference(*(result["gradients"] for result in results))
        if missing:
            problems.append(f"{len(missing)} parameters were not compared, such as {min(missing)}")
        return [worst[kind].cell for kind in KINDS], problems

    def worst(self, results: list[Result]) -> dict[str, Worst]:
        """By kind, the worst group over all ranks."""
        worst: dict[str, Worst] = {}
        for result in results:
            for kind, groups in errors(result, self._reference).items():
                for group, error in groups.items():
                    own = self._own[kind][group]
                    name = kind if group == kind else f"{kind} of {group}"
                    each = Worst(name, error, own, max(self._floor, FACTOR * own))
                    if kind not in worst or each.error / each.bound > worst[kind].error / worst[kind].bound:
                        worst[kind] = each
        return worst


def errors(result: Result, reference: Result) -> Errors:
    """The errors of a result. A group is a number's kind, or the parameters whose names differ in the layer only."""
    measured: Errors = {kind: {} for kind in KINDS}
    for kind in NUMBERS:
        pairs = zip(result[kind], reference[kind], strict=True)
        measured[kind][kind] = max(_finite(abs(own - wanted) / abs(wanted)) for own, wanted in pairs)
    for kind in TENSORS:
        least = SMALLEST * max(_size(tensor) for tensor in reference[kind].values())
        for name, tensor in result[kind].items():
            wanted = reference[kind][name].double()
            error = _finite(_size(tensor.detach().cpu().double() - wanted) / max(least, _size(wanted)))
            group = re.sub(r"\d+", "*", name)
            measured[kind][group] = max(measured[kind].get(group, 0.0), error)
    return measured


def _size(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def _finite(error: float) -> float:
    return error if error < float("inf") else float("inf")  # nan becomes infinite
