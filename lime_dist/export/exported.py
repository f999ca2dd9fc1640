"""Open an exported model: verify its files against the certificate, then load it with `transformers`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lime_dist.config.schema import ModelConfig
from lime_dist.data.files import read_json, sha256_file
from lime_dist.errors import LimeError, first_line
from lime_dist.export.rope import read_scaling
from lime_dist.model.architecture import BASELINE

if TYPE_CHECKING:
    from torch import Tensor

    from lime_dist.data.blend import Blend
    from lime_dist.data.dataset import TokenSplit

CERTIFICATE = "certificate.json"
FORMAT = "lime_dist export 1"


@dataclass(frozen=True)
class ExportedModel:
    """An export of `lime_dist.checkpoint.export`: model, tokenizer and certificate."""

    path: Path
    certificate: dict[str, Any]
    model: Any
    tokenizer: Any

    def logits(self, tokens_BT: Tensor, eos: int | None = None) -> Tensor:
        """Tokens [B, T], on any device -> logits [B, T, V] on the model's device.

        Args:
            eos: the token that ends every document, for attention within documents; None: attention crosses them.
        """
        tokens_BT = tokens_BT.to(self.model.device)
        places = {} if eos is None else within_documents(tokens_BT, eos)
        logits: Tensor = self.model(tokens_BT, use_cache=False, **places).logits
        return logits


def within_documents(tokens_BT: Tensor, eos: int) -> dict[str, Tensor]:
    """The arguments with which a model's attention, and its positions, stop where documents begin."""
    import torch

    from lime_dist.model.documents import document_starts

    starts_BT = document_starts(tokens_BT, eos)
    index = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    is_read = (starts_BT.unsqueeze(2) == starts_BT.unsqueeze(1)) & (index.unsqueeze(1) >= index)
    return {"position_ids": index - starts_BT, "attention_mask": is_read.unsqueeze(1)}


def open_export(path: str | Path) -> ExportedModel:
    """Verify an export and load it in float32.

    Raises:
        LimeError: the folder is not an export, its files have changed, or `transformers` is not installed.
    """
    folder = Path(path)
    return open_verified(folder, verify(folder))


def open_verified(folder: Path, certificate: dict[str, Any], device: str | None = None) -> ExportedModel:
    """Load an export that `verify` has checked.

    Args:
        device: where to, such as cpu or cuda:1; None: onto the GPU if there is one.

    Raises:
        LimeError: there is no such device.
    """
    import torch

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise LimeError(
            f"--device {device} cannot be used: {first_line(error)}; give for example cpu or cuda:0"
        ) from None
    model = load_model(folder).to(device)
    return ExportedModel(folder, certificate, model, load_tokenizer(folder))


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of an export against the certificate, and return the certificate.

    Raises:
        LimeError: names the first file that is missing or differs.
    """
    if not folder.is_dir():
        raise LimeError(f"{folder}: no such folder; give the --output of lime_dist.checkpoint.export")
    advice = "export the checkpoint again"
    certificate = read_json(
        folder / CERTIFICATE, "only the --output of lime_dist.checkpoint.export has one; give that folder"
    )
    files = certificate.get("files")
    if certificate.get("format") != FORMAT or not isinstance(files, dict):
        raise LimeError(f"{folder / CERTIFICATE}: was not written by this version; {advice}")
    for name, sha256 in files.items():
        if not (folder / name).is_file():
            raise LimeError(f"{folder / name}: missing, though {CERTIFICATE} lists it; {advice}")
        if sha256_file(folder / name) != sha256:
            raise LimeError(
                f"{folder / name}: changed since the export, its SHA-256 differs from {CERTIFICATE}; {advice}"
            )
    return certificate


def model_config(exported: ExportedModel) -> ModelConfig:
    """The section ``model`` of the run that an export comes from, as far as its config.json has the keys."""
    path = exported.path / "config.json"
    values = read_json(path, "export the checkpoint again")
    known = {name: values[name] for name in ModelConfig.model_fields if name in values}
    return ModelConfig(**{"architecture": BASELINE, **known, "rope_scaling": read_scaling(str(path), values)})


def check_vocabulary(certificate: dict[str, Any], folder: Path, split: TokenSplit | Blend) -> None:
    """Refuse a split that was tokenized with another tokenizer than the export's (LimeError).

    A Megatron pair does not say its tokenizer, which a line tells.
    """
    wanted = certificate["tokenizer"]["hash"]
    if split.tokenizer_hash is None:
        print(f"{split.path}: does not say which tokenizer made it; its ids are taken to be those of {folder}")
    elif split.tokenizer_hash != wanted:
        raise LimeError(
            f"{split.path}: was tokenized with another tokenizer ({str(split.tokenizer_hash)[:12]}) than that of {folder} "
            f"({wanted[:12]}); pretokenize the text with the run's tokenizer"
        )


def require_transformers() -> Any:
    """Import `transformers`, with warnings and progress bars turned off.

    Raises:
        LimeError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise LimeError(
            "transformers is not installed; run pip install -c constraints.txt -e '.[hf]' in lime_dist's folder"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def load_model(folder: Path) -> Any:
    """The model in a folder, in float32 on the CPU, in evaluation mode."""
    import torch

    transformers = require_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder."""
    return require_transformers().AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
