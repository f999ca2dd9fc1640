"""One of the two processes of `gpu_check_pipeline.py`: train every configuration and save the results."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from equality import train_stage
from gpu_check_engine import groups_of_an_engine
from gpu_check_errors import EVALUATION_MICRO_BATCH_SIZE, STEPS
from gpu_check_machine import exact_float32

from lime_dist.config.load import make_config
from lime_dist.distributed import quiet, start_processes


def main() -> None:
    settings, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    start_processes()
    exact_float32()
    from lime_dist.train.build import build_engine

    rank = dist.get_rank()
    for index, text in enumerate(settings["configs"]):
        config = make_config(yaml.safe_load(text), "the check")
        print(f"rank {rank}: configuration {index}", flush=True)
        with groups_of_an_engine():
            with quiet():
                engine, optimizer = build_engine(config)
            result = train_stage(engine, optimizer, config, STEPS, EVALUATION_MICRO_BATCH_SIZE)
            torch.save(on_cpu(result), Path(settings["results"]) / f"{index}-{rank}.pt")
            del engine, optimizer, result
            gc.collect()
            dist.barrier()
    (folder / f"{rank}.json").write_text("{}")
    dist.barrier()


def on_cpu(value: Any) -> Any:
    """A result with all tensors on the CPU."""
    if isinstance(value, dict):
        return {key: on_cpu(each) for key, each in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


if __name__ == "__main__":
    main()
