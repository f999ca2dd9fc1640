"""The files of a Hugging Face model folder: configuration, weights, modelling code, model card."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from lime_dist.config.schema import Config, NumericsConfig
from lime_dist.data.files import json_bytes
from lime_dist.errors import LimeError
from lime_dist.export import rope
from lime_dist.export.tokenizer_files import CODE
from lime_dist.model.architecture import ExportFormat, architecture_of

MODEL_TYPE, LLAMA_TYPE = "lime", "llama"
"""Hugging Face's ``model_type`` of exports that bring modelling code, and of LLaMAs."""

SHAPE_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "rms_norm_eps", "rope_theta", "tie_word_embeddings",
)  # fmt: skip
"""Keys of ``model`` that every architecture has; Hugging Face gives them the same names."""

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

`certificate.json` records how much its logits differ from the trainer's, and the SHA-256 of every file.
"""


def write_configuration(folder: Path, config: Config, special_ids: dict[str, int], dtype: str = "float32") -> None:
    """Write config.json, generation_config.json and the architecture's modelling code, if it has any.

    Args:
        dtype: of the weights.
    """
    values = {**model_description(config), "dtype": dtype, **special_ids}
    (folder / "config.json").write_bytes(json_bytes(values))
    (folder / "generation_config.json").write_bytes(json_bytes(special_ids))
    for path in modelling_code(architecture_of(config.model).export_format):
        shutil.copyfile(path, folder / path.name)


def modelling_code(format: ExportFormat) -> list[Path]:
    """The files of an export's modelling code: the one that the architecture names, and those that it imports relatively."""
    if format.code is None:
        return []
    files, pending = [CODE / "configuration_lime.py"], [CODE / format.code]
    while pending:
        path = pending.pop()
        if path not in files:
            files.append(path)
        for name in re.findall(r"^from \.(\w+) import", path.read_text(encoding="utf-8"), re.MULTILINE):
            beside = path.with_name(f"{name}.py")
            imported = beside if beside.exists() else CODE / beside.name
            if imported not in files:
                pending.append(imported)
    return files


def model_description(config: Config) -> dict[str, Any]:
    """The content of config.json."""
    model, format = config.model, architecture_of(config.model).export_format
    shape = {key: getattr(model, key) for key in SHAPE_KEYS} | {
        "num_key_value_heads": model.key_value_heads,
        "max_position_embeddings": rope.supported_length(config.data.sequence_length, model.rope_scaling),
    }
    if model.numerics != NumericsConfig():
        shape["numerics"] = model.numerics.model_dump(mode="json")
    if scaling := rope.described(model.rope_scaling):
        shape["rope_scaling" if format.code is None else "rope_parameters"] = scaling
    description: dict[str, Any] = {"architectures": [format.causal_class], "model_type": MODEL_TYPE}
    if format.code is not None:
        module = Path(format.code).stem
        description["auto_map"] = {
            "AutoConfig": "configuration_lime.LimeConfig",
            "AutoModel": f"{module}.{format.base_class}",
            "AutoModelForCausalLM": f"{module}.{format.causal_class}",
        }
    return {**description, **shape, **format.values}


def write_weights(folder: Path, weights: dict[str, Tensor], max_shard_size: str) -> None:
    """Write model.safetensors, or shards and their index if it would be larger than ``max_shard_size``.

    Raises:
        LimeError: ``max_shard_size`` is not a size.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    try:
        plan = split_torch_state_dict_into_shards(weights, max_shard_size=max_shard_size)
    except ValueError:
        raise LimeError(f"--max-shard-size {max_shard_size}: is not a size; give for example 5GB or 500MB") from None
    for file, names in plan.filename_to_tensors.items():
        tensors = {name: weights[name].contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_bytes(json_bytes(index))


def write_card(folder: Path, name: str, config: Config, step: int, consumed_samples: int) -> None:
    """Write README.md, the model card."""
    model, architecture = config.model, architecture_of(config.model)
    card = CARD.format(
        title=architecture.title,
        step=step,
        tokens=consumed_samples * config.data.sequence_length,
        layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        name=name,
        trust="" if architecture.export_format.code is None else ", trust_remote_code=True",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
