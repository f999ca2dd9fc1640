"""Start a run from an existing model: its weights become the checkpoint of step 0, from which pretrain.py resumes.

The original is an export of any architecture, written by `lime_dist.checkpoint.export`, or a Hugging Face LLaMA. A run that
starts from a LLaMA must have the LLaMA's first loss (see `Architecture.check_llama_start`). Routers and chunk summaries, which a
LLaMA does not have, get their initial values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lime_dist.checkpoint.reading import Weights, load_decoder, parameter_shapes
from lime_dist.checkpoint.writing import write_checkpoint
from lime_dist.config.flat import flattened, shown
from lime_dist.config.schema import Config, ModelConfig, NumericsConfig
from lime_dist.data.blend import open_training
from lime_dist.data.files import read_json
from lime_dist.data.identity import DataIdentity
from lime_dist.errors import LimeError, first_line
from lime_dist.export.comparison import TOLERANCE, Comparison, compare_logits, first_tokens
from lime_dist.export.exported import CERTIFICATE, check_vocabulary, load_model, require_transformers, verify
from lime_dist.export.model_files import LLAMA_TYPE, MODEL_TYPE, SHAPE_KEYS, model_description
from lime_dist.export.rope import read_scaling
from lime_dist.model.architecture import architecture_of
from lime_dist.model.init import initialise

INITIAL_ONLY = frozenset({"lime.router_init"})
"""Keys of ``model`` that an import does not compare: they choose initial values, which trained weights have replaced."""


def import_model(folder: Path, config: Config) -> Path:
    """Write ``checkpoints/global_step0`` into the run's folder and return its path.

    Raises:
        LimeError: the original is neither an export nor a LLaMA that the trainer supports, its files have changed since the
            export, the configuration describes another model, the data was tokenized with another tokenizer, or the run
            already has checkpoints.
    """
    require_transformers()
    values = read_json(folder / "config.json", "give a folder with a Hugging Face model")
    certificate = verify(folder) if (folder / CERTIFICATE).exists() else None
    if values.get("model_type") == MODEL_TYPE:  # without a certificate: saved again by `save_pretrained`
        check_export(folder, completed(folder, values), config)
    else:
        check_start(config.model)
        check_shape(folder, values, config.model)
    train, _ = open_training(config.data, config.model.vocab_size)
    if certificate is not None and train.tokenizer_hash is not None:
        check_vocabulary(certificate, folder, train)
    weights = read_safetensors(folder, config, fill=values["model_type"] == LLAMA_TYPE)
    tokens = first_tokens(train, config.data.sequence_length)
    if int(tokens.max()) >= config.model.vocab_size:
        raise LimeError(f"{train.path}: has token ids beyond model.vocab_size={config.model.vocab_size}")
    comparison = check_logits(folder, config, weights, tokens)
    directory = Path(config.run.directory) / "checkpoints"
    path = write_checkpoint(directory, config, DataIdentity.of(train, config.data.sequence_length), weights)
    print(
        f"compared on {comparison.tokens:,} tokens of {train.path}: logits differ by at most {comparison.difference:.1e}; "
        f"the largest logit is {comparison.logit:.2f}"
    )
    return path


def check_logits(folder: Path, config: Config, weights: Weights, tokens_NT: Tensor) -> Comparison:
    """Compare the original's logits with those of the trainer's decoder, in float32 and, if these are too far apart, in float64.

    Raises:
        LimeError: they differ by more than TOLERANCE.
    """
    decoder, original = load_decoder(config.model, weights), load_model(folder)

    def original_logits(tokens_BT: Tensor) -> Tensor:
        return original(tokens_BT, use_cache=False).logits

    for dtype in (torch.float32, torch.float64):
        decoder.to(dtype)
        original.to(dtype)
        comparison = compare_logits(decoder, original_logits, tokens_NT)
        if comparison.relative <= TOLERANCE:
            return comparison
    raise LimeError(
        f"{folder}: its logits differ from those of the imported model by up to {comparison.difference:.1e}; the largest "
        f"logit is {comparison.logit:.1e}; the model computes something that its config.json does not mention; nothing was "
        "written"
    )


def completed(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The content of an export's config.json with the keys that `save_pretrained` leaves out, which have their defaults."""
    if (folder / CERTIFICATE).exists():
        return values
    from transformers import AutoConfig

    try:
        loaded = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    except Exception as error:  # transformers raises many types
        raise LimeError(f"{folder / 'config.json'}: transformers cannot read it ({first_line(error)})") from None
    missing = [key for key in ("architecture", *SHAPE_KEYS) if not hasattr(loaded, key)]
    if missing:
        raise LimeError(f"{folder / 'config.json'}: has no {missing[0]}; give a folder that save_pretrained wrote")
    return {**{key: getattr(loaded, key) for key in ("architecture", *SHAPE_KEYS)}, **values}


def check_export(folder: Path, values: dict[str, Any], config: Config) -> None:
    """Refuse a configuration whose model is not the exported one (LimeError)."""
    given = {"architecture": config.model.architecture, **model_description(config)}
    if MODEL_TYPE == given["model_type"] or values["architecture"] == given["architecture"]:
        wrong = [f"model.{key}={value}" for key, value in _shape(values).items() if _shape(given).get(key) != value]
    else:
        wrong = [f"model.architecture={values['architecture']}"]
    if wrong:
        raise LimeError(f"the configuration does not describe the model in {folder}; set {' '.join(wrong)}")


def _shape(values: dict[str, Any]) -> dict[str, str]:
    """What an export's config.json says of ``model``: the value of every key, as on the command line."""
    settings: dict[str, Any] = {"architecture": values["architecture"], **{key: values[key] for key in SHAPE_KEYS}}
    settings |= _section_settings("rope_scaling", read_scaling("config.json", values).model_dump())
    settings |= _section_settings("numerics", NumericsConfig().model_dump())
    for key, value in values.items():
        if key in ModelConfig.model_fields and isinstance(value, dict):
            settings |= _section_settings(key, value)
    return {key: shown(value) for key, value in settings.items() if key not in INITIAL_ONLY}


def _section_settings(name: str, section: dict[str, Any]) -> dict[str, Any]:
    """The keys of a section of ``model`` with their dotted names, those of subsections first."""
    settings: dict[str, Any] = {}
    for subsection, values in section.items():
        if isinstance(values, dict):
            # A subsection has null for the keys that its own choice, such as the policy, does not use.
            settings |= {f"{name}.{subsection}.{key}": value for key, value in values.items() if value is not None}
    return settings | {f"{name}.{key}": value for key, value in section.items() if not isinstance(value, dict)}


def check_start(model: ModelConfig) -> None:
    """Refuse a model whose first loss would not be that of the LLaMA it starts from (LimeError)."""
    try:
        architecture_of(model).check_llama_start()
    except ValueError as error:
        raise LimeError(str(error)) from None


def check_shape(folder: Path, values: dict[str, Any], model: ModelConfig) -> None:
    """Refuse a model that is not a plain LLaMA, and a configuration of another shape (LimeError)."""
    if values.get("model_type") != LLAMA_TYPE:
        raise LimeError(
            f"{folder}: has model_type {values.get('model_type')!r}; only 'llama' and exports of lime_dist.checkpoint.export can be "
            "imported"
        )
    from transformers import AutoConfig

    try:
        original = AutoConfig.from_pretrained(folder)
    except Exception as error:  # transformers raises many types
        raise LimeError(f"{folder / 'config.json'}: transformers cannot read it ({first_line(error)})") from None
    rope = getattr(original, "rope_parameters", None) or {"rope_theta": getattr(original, "rope_theta", None)}
    scaling = read_scaling(str(folder / "config.json"), original.to_dict())
    fixed = {
        "hidden_act": (original.hidden_act, "silu"),
        "attention_bias": (original.attention_bias, False),
        "mlp_bias": (original.mlp_bias, False),
        "head_dim": (original.head_dim, original.hidden_size // original.num_attention_heads),
    }
    for key, (value, supported) in fixed.items():
        if value != supported:
            raise LimeError(f"{folder / 'config.json'}: {key}={value} is not supported, only {key}={supported}")
    theirs = {key: getattr(original, key, None) for key in SHAPE_KEYS} | {"rope_theta": rope["rope_theta"]}
    theirs |= _section_settings("rope_scaling", scaling.model_dump())
    theirs |= _section_settings("numerics", NumericsConfig().model_dump())
    ours = {**flattened(model.model_dump(mode="json")), "num_key_value_heads": model.key_value_heads}
    wrong = [key for key in theirs if theirs[key] != ours[key]]
    if wrong:
        settings = " ".join(f"model.{key}={shown(theirs[key])}" for key in wrong)
        raise LimeError(f"the configuration has another shape than the model in {folder}; set {settings}")


def read_safetensors(folder: Path, config: Config, fill: bool) -> Weights:
    """The original's weights in float32.

    Args:
        fill: give routers and chunk summaries that the original lacks their initial values.

    Raises:
        LimeError: a file is missing or damaged, or a weight is missing or has another shape.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index, "")["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    stored: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise LimeError(f"{folder / name}: no such file; weights must be stored as safetensors")
        try:
            with safe_open(folder / name, framework="pt") as file:
                stored.update({key: file.get_tensor(key).float() for key in file.keys()})
        except SafetensorError as error:
            raise LimeError(f"{folder / name}: is damaged ({error})") from None
    group_of = architecture_of(config.model).parameter_group
    weights: Weights = {}
    for name, shape in parameter_shapes(config.model).items():
        if name in stored:
            weights[name] = stored[name]
        elif fill and group_of(name) == "routers":
            weights[name] = torch.empty(shape)
            initialise(name, weights[name], config.model, config.train.seed)
        if name not in weights or weights[name].shape != shape:
            raise LimeError(f"{folder}: has no {name} of shape {list(shape)}")
    return weights
