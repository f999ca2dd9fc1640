"""One of the processes of `boundary_cost.py`: build both forms, run the rounds, write the measurements."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from boundary_cost import FORMS, make_config
from copying import random_batch
from torch import Tensor
from training_step import LiveBytes

from lime_dist.distributed import quiet, start_processes
from lime_dist.pipeline.engine import LimeEngine
from lime_dist.train.build import build_engine


def main() -> None:
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    start_processes()
    engines: dict[str, LimeEngine] = {}
    for form in FORMS:
        with quiet():
            engines[form], _ = build_engine(make_config(settings, form))
    result: dict[str, dict[str, Any]] = {form: {"seconds": []} for form in FORMS}
    for turn in range(settings["rounds"] + 1):
        for form in FORMS[:: 1 if turn % 2 else -1]:
            before = sent(engines[form])
            dist.barrier()
            begin = time.perf_counter()
            engines[form].train_step(batches(settings))
            dist.barrier()
            if turn:
                result[form]["seconds"].append(time.perf_counter() - begin)
            result[form]["sent"] = sent(engines[form]) - before
    for form in FORMS:
        with LiveBytes() as count:
            engines[form].train_step(batches(settings))
        result[form]["peak"] = count.peak
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()


def batches(settings: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield random_batch(1, settings["length"], 1024, "cpu")


def sent(engine: LimeEngine) -> int:
    """Return the bytes that this process has sent so far, in both directions."""
    return sum(stats.bytes for name, stats in engine.transfer_stats().items() if name.startswith("sent"))


if __name__ == "__main__":
    main()
