"""Checkpoints and exported models for tests, and a worker case that saves the same state from any number of stages."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.equality import perturb
from lime_dist.checkpoint.writing import write_checkpoint
from lime_dist.config.load import make_config
from lime_dist.config.schema import Config, ModelConfig
from lime_dist.data.identity import DataIdentity
from lime_dist.export.huggingface.configuration_lime import LimeConfig
from lime_dist.export.huggingface.modeling_lime import BaseForCausalLM
from lime_dist.export.model_files import model_description
from lime_dist.model.architecture import architecture_of
from lime_dist.model.decoder import Decoder, build_decoder

PROMPT = torch.tensor([[5, 9, 2, 7, 7, 1]])


def run_values(dataset: Path, directory: Path, **model: Any) -> dict[str, Any]:
    """The configuration of a run of a small model."""
    return {
        "run": {"directory": str(directory)},
        "model": {
            "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, **model,
        },
        "data": {"path": str(dataset), "sequence_length": 16},
        "train": {
            "steps": 3, "global_batch_size": 4, "micro_batch_size": 1, "evaluation_samples": 8, "evaluation_interval": 0,
        },
        "optimizer": {"warmup_steps": 1},
    }  # fmt: skip


def write_random(values: dict[str, Any]) -> tuple[Config, Decoder]:
    """Write a checkpoint of step 0 with random weights that all differ from their initial values."""
    config = make_config(values, "a test")
    decoder = perturbed(config.model)
    weights = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    write_checkpoint(Path(config.run.directory) / "checkpoints", config, DataIdentity(100), weights)
    return config, decoder


def perturbed(model: ModelConfig, dtype: torch.dtype = torch.float32) -> Decoder:
    """A decoder whose weights all differ from their initial values."""
    decoder = build_decoder(model, dtype=dtype)
    for name, parameter in decoder.named_parameters():
        perturb(name, parameter)
    return decoder.eval()


def exported_in_memory(model: ModelConfig, decoder: Decoder) -> BaseForCausalLM:
    """The model that loading an export of the decoder gives, made without files."""
    config = make_config({"model": model.model_dump()}, "a test")
    class_keys = {"auto_map", "architectures", "model_type", "dtype"}
    values = {key: value for key, value in model_description(config).items() if key not in class_keys}
    export_format = architecture_of(model).export_format
    module = import_module(f"lime_dist.export.huggingface.{str(export_format.code).removesuffix('.py')}")
    exported = getattr(module, export_format.causal_class)(LimeConfig(**values)).to(next(decoder.parameters()).dtype)
    missing, unexpected = exported.load_state_dict(decoder.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    exported.tie_weights()
    return exported.eval()


def generate(model: Any, prompt: torch.Tensor, tokens: int, **options: Any) -> torch.Tensor:
    """Greedy continuation of exactly ``tokens`` tokens, [B, tokens]."""
    options = {"attention_mask": torch.ones_like(prompt), **options}
    ids = model.generate(
        prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0, **options
    )
    return ids[:, prompt.shape[1] :]


def train_without_updates(values: dict[str, Any]) -> str:
    """Train as pretrain.py does, but without changing the weights, so that every stage count saves the same state."""
    from support.runs import run

    from lime_dist.train.stage_optimizer import StageOptimizer

    update = StageOptimizer.step

    def keep_weights(self: StageOptimizer) -> torch.Tensor:
        self.flat_gradients.zero_()
        return torch.ones(2)

    StageOptimizer.step = keep_weights
    try:
        return run(values)
    finally:
        StageOptimizer.step = update
