"""The files of a Hugging Face model folder: configuration, weights, modelling code, model card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lime_dist.config.schema import Config, ModelConfig
from lime_dist.data.files import json_bytes
from lime_dist.errors import LimeError
from lime_dist.export.tokenizer_files import CODE
from lime_dist.model.layout import Chunk, summarised_chunks
from lime_dist.model.policies import Entry, make_policy

MODEL_CODE = ("configuration_lime.py", "layers_lime.py", "history_lime.py", "hyper_lime.py", "modeling_lime.py")

CARD = """---
library_name: transformers
pipeline_tag: text-generation
---

# {title}

Exported by lime_dist from step {step} ({tokens:,} tokens of training). {layers} layers, hidden size {hidden_size}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}"{trust})
tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0]))
```

`certificate.json` says how far its logits are from the trainer's, and holds the SHA-256 of every file.
"""


def write_configuration(folder: Path, config: Config, special_ids: dict[str, int]) -> None:
    """config.json, generation_config.json and, but for LLaMA, the modelling code."""
    values = {**model_description(config), **special_ids}
    (folder / "config.json").write_bytes(json_bytes(values))
    (folder / "generation_config.json").write_bytes(json_bytes(special_ids))
    if config.model.architecture != "llama":
        for name in MODEL_CODE:
            shutil.copyfile(CODE / name, folder / name)


def model_description(config: Config) -> dict[str, Any]:
    """The content of config.json. The reads of every layer stand there, so that the modelling code knows no policies."""
    model = config.model
    shape = model.model_dump(mode="json", exclude={"architecture", "lime", "hyper"})
    shape |= {
        "num_key_value_heads": model.key_value_heads,
        "max_position_embeddings": config.data.sequence_length,
        "dtype": "float32",
    }
    if model.architecture == "llama":
        fixed = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "head_dim": model.head_size}
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape, **fixed}
    description = {
        "architectures": ["LimeForCausalLM"],
        "model_type": "lime",
        "auto_map": {
            "AutoConfig": "configuration_lime.LimeConfig",
            "AutoModel": "modeling_lime.LimeModel",
            "AutoModelForCausalLM": "modeling_lime.LimeForCausalLM",
        },
        "architecture": model.architecture,
        **shape,
    }
    if model.architecture == "hyper":
        return {**description, "hyper": model.hyper.model_dump(mode="json")}
    return {**description, "lime": model.lime.model_dump(mode="json"), **_history(model)}


def _history(model: ModelConfig) -> dict[str, Any]:
    policy = make_policy(model.lime)
    chunks = summarised_chunks(policy, model.num_hidden_layers)
    return {
        "reads": [_runs(policy.reads(layer), chunks) for layer in range(model.num_hidden_layers)],
        "chunks": [[chunk.layers.start, chunk.layers.stop, chunk.num_rows] for chunk in chunks],
    }


def _runs(entries: Sequence[Entry], chunks: Sequence[Chunk]) -> list[list[Any]]:
    """Entries in their order as runs, [kind, first, end]; rows of summaries are counted over all chunks."""
    rows = [row for chunk in chunks for row in chunk.rows]
    runs: list[list[Any]] = []
    for entry in entries:
        kind, index = ("summaries", rows.index(entry)) if entry.is_summary else ("slots", entry.layer)
        if runs and runs[-1][0] == kind and runs[-1][2] == index:
            runs[-1][2] = index + 1
        else:
            runs.append([kind, index, index + 1])
    return runs


def write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: str) -> None:
    """model.safetensors, or shards with their index if it would be larger than ``max_shard_size``.

    Raises:
        LimeError: the size cannot be read.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    try:
        plan = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    except ValueError:
        raise LimeError(f"--max-shard-size {max_shard_size}: is no size; write for example 5GB or 500MB") from None
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: weights[name].contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_bytes(json_bytes(index))


def write_card(folder: Path, name: str, config: Config, step: int, consumed_samples: int) -> None:
    """README.md."""
    model = config.model
    titles = {"llama": "LLaMA", "lime": "LIMe", "hyper": "Hyper-Connections"}
    card = CARD.format(
        title=titles[model.architecture],
        step=step,
        tokens=consumed_samples * config.data.sequence_length,
        layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        name=name,
        trust="" if model.architecture == "llama" else ", trust_remote_code=True",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
