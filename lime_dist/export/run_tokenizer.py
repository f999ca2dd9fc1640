"""The tokenizer of a run: by default the one that its shards were made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_tools.tokenizer import Tokenizer
from lime_dist.config.schema import Config, DataConfig, SampleTextsConfig
from lime_dist.data.dataset import read_dataset_json
from lime_dist.data.prompts import Prompts
from lime_dist.errors import LimeError


def data_folder(data: DataConfig) -> Path:
    """The dataset that names the tokenizer of a run: the only one, or the first folder of a blend."""
    return Path(next((path for path in data.paths if Path(path).is_dir()), data.paths[0]))


def open_run_tokenizer(
    config: Config, tokenizer_folder: Path | None = None, remedy: str = ""
) -> tuple[Tokenizer, dict[str, Any]]:
    """Open the given tokenizer, by default the one that the run's shards were made with.

    Args:
        remedy: ends the message that there is none.

    Returns:
        It and the description of the dataset that names it; {} if a tokenizer is given and the dataset cannot be read.

    Raises:
        LimeError: there is no tokenizer, it is not the one of the shards, or it has more pieces than the model's vocabulary.
    """
    data, is_given = data_folder(config.data), tokenizer_folder is not None
    description: dict[str, Any] = {}
    try:
        description = read_dataset_json(data)
        if tokenizer_folder is None:
            tokenizer_folder = data / description["tokenizer"]
    except LimeError as error:
        if tokenizer_folder is None:
            raise LimeError(f"the run's data do not name a tokenizer ({error}){remedy}") from None
    tokenizer = Tokenizer(tokenizer_folder)
    if description and description["tokenizer_hash"] != tokenizer.hash:
        what_to_do = "leave out --tokenizer" if is_given else "pretokenize the data again"
        raise LimeError(f"{tokenizer_folder}: is not the tokenizer that {data} was made with; {what_to_do}")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise LimeError(
            f"{tokenizer_folder}: has {tokenizer.vocab_size} pieces, but model.vocab_size={config.model.vocab_size}; "
            "give the run's own tokenizer"
        )
    return tokenizer, description


def encode_prompts(config: Config, settings: SampleTextsConfig) -> Prompts:
    """Encode the prompts of ``monitor.samples`` with the run's own tokenizer.

    Raises:
        LimeError: the data name no tokenizer, or a prompt is too long.
    """
    try:
        tokenizer, description = open_run_tokenizer(config)
    except LimeError as error:
        raise LimeError(f"monitor.samples: {error}") from None
    begin = tokenizer.bos_id if description["settings"].get("bos") else tokenizer.eos_id
    tokens = [[begin, *tokenizer.encode(text)] for text in settings.prompts]
    prompts = Prompts(settings.prompts, tokens, tokenizer.eos_id, tokenizer.vocab_size, tokenizer.decode)
    prompts.check_length(settings, config.data.sequence_length)
    return prompts
