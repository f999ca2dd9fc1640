"""Start a run from a model that exists: its weights become the checkpoint of step 0 that pretrain.py resumes from.

The model is what `lime_dist.checkpoint.export` wrote, of any architecture, or a Hugging Face LLaMA. From a LLaMA, a `lime` run
must start as LLaMA does (routes: kv, router_init: identity), so that its first loss is the original's; what the original does not
have, routers and summaries, gets its initial values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lime_dist.checkpoint.reading import Weights, load_decoder, parameter_shapes
from lime_dist.checkpoint.writing import write_checkpoint
from lime_dist.config.schema import Config, ModelConfig
from lime_dist.data.blend import open_training
from lime_dist.data.files import read_json
from lime_dist.errors import LimeError
from lime_dist.export.comparison import TOLERANCE, compare_logits, first_tokens
from lime_dist.export.exported import CERTIFICATE, check_vocabulary, load_model, require_transformers, verify
from lime_dist.export.model_files import LLAMA_TYPE, MODEL_TYPE, SHAPE_KEYS, model_description
from lime_dist.model.architecture import architecture_of
from lime_dist.model.init import initialise


def import_model(folder: Path, config: Config) -> Path:
    """Write ``checkpoints/global_step0`` into the run's folder and return it.

    Raises:
        LimeError: the original is no export and no LLaMA that the trainer can express, it is not as it was written, the
            configuration is not of its shape, its tokenizer not that of the data, or the run has checkpoints already.
    """
    require_transformers()
    values = read_json(folder / "config.json", "give a folder with a Hugging Face model")
    certificate = verify(folder) if (folder / CERTIFICATE).exists() or values.get("model_type") == MODEL_TYPE else None
    if values.get("model_type") == MODEL_TYPE:
        check_export(folder, values, config)
    else:
        check_start(config.model)
        check_shape(folder, values, config.model)
    train, order = open_training(config.data, config.model.vocab_size)
    if certificate is not None and train.tokenizer_hash is not None:
        check_vocabulary(certificate, folder, train)
    weights = read_safetensors(folder, config, fill=values["model_type"] == LLAMA_TYPE)
    tokens = first_tokens(train, config.data.sequence_length)
    if int(tokens.max()) >= config.model.vocab_size:
        raise LimeError(f"{train.path}: has tokens above model.vocab_size={config.model.vocab_size}")
    decoder, original = load_decoder(config.model, weights), load_model(folder)

    def theirs(tokens_BT: Tensor) -> Tensor:
        return original(tokens_BT, use_cache=False).logits

    for dtype in (torch.float32, torch.float64):  # as the export does: float64 decides where float32 is too coarse
        decoder.to(dtype)
        original.to(dtype)
        found = compare_logits(decoder, theirs, tokens)
        if found.relative <= TOLERANCE:
            break
    else:
        raise LimeError(
            f"{folder}: its logits differ by {found.difference:.1e} of at most {found.logit:.1e} from those of the imported "
            "model; it does something that is not in its config.json's known keys; nothing was written"
        )
    directory = Path(config.run.directory) / "checkpoints"
    path = write_checkpoint(directory, config, order.num_samples, weights)
    print(
        f"compared on {found.tokens:,} tokens of {train.path}: largest difference of logits {found.difference:.1e} "
        f"of at most {found.logit:.2f}"
    )
    return path


def check_export(folder: Path, values: dict[str, Any], config: Config) -> None:
    """Refuse a configuration whose model is not the one that was exported (LimeError)."""
    given = {"architecture": config.model.architecture, **model_description(config)}
    if given["model_type"] == MODEL_TYPE:
        wrong = [f"model.{key}={value}" for key, value in _shape(values).items() if _shape(given).get(key) != value]
    else:
        wrong = [f"model.architecture={values['architecture']}"]
    if wrong:
        raise LimeError(f"the configuration is not of the model in {folder}; set {' '.join(wrong)}")


def _shape(values: dict[str, Any]) -> dict[str, str]:
    """What decides over a model of this trainer's own, by key, as it is written on the command line."""
    found: dict[str, Any] = {"architecture": values["architecture"], **{key: values[key] for key in SHAPE_KEYS}}
    found |= {f"hyper.{key}": value for key, value in values.get("hyper", {}).items()}
    lime = {key: value for key, value in values.get("lime", {}).items() if key != "router_init"}  # a start's, long gone
    for key, value in lime.pop("history", {}).items():
        if value is not None:  # keys that the policy does not have
            found[f"lime.history.{key}"] = value
    found |= {f"lime.{key}": value for key, value in lime.items()}
    return {key: "null" if value is None else str(value).lower() for key, value in found.items()}


def check_start(model: ModelConfig) -> None:
    """Refuse a run that would not start as LLaMA (LimeError)."""
    try:
        architecture_of(model).check_llama_start()
    except ValueError as error:
        raise LimeError(str(error)) from None


def check_shape(folder: Path, values: dict[str, Any], model: ModelConfig) -> None:
    """Refuse what is no plain LLaMA, and a configuration of another shape (LimeError)."""
    if values.get("model_type") != LLAMA_TYPE:
        raise LimeError(
            f"{folder}: is a {values.get('model_type')!r}; only 'llama', and what lime_dist.checkpoint.export wrote, can be imported"
        )
    from transformers import AutoConfig

    try:
        original = AutoConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers says of a configuration that makes no sense
        reason = str(error).strip().splitlines()[0]
        raise LimeError(f"{folder / 'config.json'}: transformers cannot read it ({reason})") from None
    rope = getattr(original, "rope_parameters", None) or {"rope_theta": getattr(original, "rope_theta", None)}
    unknown = {
        "rope_type": (rope.get("rope_type", "default"), "default"),
        "rope_scaling": (values.get("rope_scaling"), None),
        "hidden_act": (original.hidden_act, "silu"),
        "attention_bias": (original.attention_bias, False),
        "mlp_bias": (original.mlp_bias, False),
        "head_dim": (original.head_dim, original.hidden_size // original.num_attention_heads),
    }
    for key, (found, known) in unknown.items():
        if found != known:
            raise LimeError(f"{folder / 'config.json'}: {key}={found} is not in this trainer's models ({known} is)")
    theirs = {key: getattr(original, key, None) for key in SHAPE_KEYS} | {"rope_theta": rope["rope_theta"]}
    ours = {**model.model_dump(), "num_key_value_heads": model.key_value_heads}
    wrong = [key for key in SHAPE_KEYS if theirs[key] != ours[key]]
    if wrong:
        settings = " ".join(f"model.{key}={str(theirs[key]).lower()}" for key in wrong)
        raise LimeError(f"the configuration is not of the shape of {folder}; set {settings}")


def read_safetensors(folder: Path, config: Config, fill: bool) -> Weights:
    """The original's weights in float32, and with ``fill`` initial values for what a LLaMA lacks.

    Raises:
        LimeError: a file or a weight is missing, or has another shape.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index, "")["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise LimeError(f"{folder / name}: no such file; weights are read from safetensors")
        try:
            with safe_open(folder / name, framework="pt") as file:
                found.update({key: file.get_tensor(key).float() for key in file.keys()})
        except SafetensorError as error:
            raise LimeError(f"{folder / name}: is damaged ({error})") from None
    weights: Weights = {}
    for name, shape in parameter_shapes(config.model).items():
        if name in found:
            weights[name] = found[name]
        elif fill and (".router." in name or name.startswith("model.history.")):
            weights[name] = torch.empty(shape)
            initialise(name, weights[name], config.model, config.train.seed)
        if name not in weights or weights[name].shape != shape:
            raise LimeError(f"{folder}: has no {name} of shape {list(shape)}")
    return weights
