"""Protects that an architecture is one object: a toy in this file goes through training, plan, cost and export.

The toy's layers read the mean of their input and the embedding: x ← ½x + ½x₀. So x₀ crosses every stage boundary beside the hidden
state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pipeline.test_equality import check_equal
from pipeline.test_equality import settings as equality_settings
from support.exports import run_values, write_random
from support.workers import WorkerGroup
from torch import Tensor, nn

from lime_dist import build_decoder, load_config
from lime_dist.checkpoint.export import main as export
from lime_dist.config.registry import ARCHITECTURES
from lime_dist.config.schema import ModelConfig
from lime_dist.errors import LimeError
from lime_dist.model import cost
from lime_dist.model.architecture import Architecture, ExportFormat, architecture_of
from lime_dist.model.architectures.llama.architecture import Llama
from lime_dist.model.architectures.llama.layer import LlamaLayer
from lime_dist.model.history import LayerHistory
from lime_dist.model.layers import Positions
from lime_dist.model.layout import StageLayout
from lime_dist.model.policies import FirstLastHistory
from lime_dist.plan import __main__ as plan

NAME = "embedding_skip"
Workers = Callable[[int], WorkerGroup]

MODELLING_CODE = """
from torch import nn

from .configuration_lime import LimeConfig
from .layers_lime import PreNormLayer
from .modeling_lime import BaseForCausalLM, BaseModel


class SkipLayer(PreNormLayer):
    def __init__(self, config, layer):
        super().__init__(config, layer, None)

    def forward(self, x, first, run):
        if first:
            x = (x + first[0]) / 2
        else:
            first.append(x)
        normed, attention = self.input_layernorm(x), self.self_attn
        key, value = attention.keys_and_values(normed)
        return self.finish(x, attention.queries(normed), key, value, run)


class SkipModel(BaseModel):
    def make_layers(self, config):
        return [SkipLayer(config, layer) for layer in range(config.num_hidden_layers)]

    def open_history(self):
        return []


class SkipForCausalLM(BaseForCausalLM):
    model_class = SkipModel
"""


class FirstInput(LayerHistory):
    """Keeps x₀ in the autograd graph, [B, T, D]; no buffer, no routers."""

    def __init__(self, layout: StageLayout) -> None:
        self.layout, self.is_recomputing = layout, False
        self.first: Tensor | None = None

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        batch, length, width = payload_BTC.shape
        parts = payload_BTC.flatten().split([batch * length * size for size in (hidden_size, width - hidden_size)])
        hidden, self.first = (part.view(batch, length, -1) for part in parts)
        return hidden

    def open(self, routing: Sequence[Tensor | None], others: Sequence[Tensor]) -> None:
        assert not others and set(routing) <= {None}

    def release(self) -> list[Tensor]:
        assert self.first is not None
        first, self.first = self.first, self.first.detach()
        return [first]

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        parts = torch.cat([hidden_BTD.flatten(), *(first.flatten() for first in released)])
        return parts.view(*hidden_BTD.shape[:2], -1)


class SkipLayer(LlamaLayer):
    def forward(self, x_BTD: Tensor, history: FirstInput, positions: Positions) -> Tensor:
        if self.layer > 0:
            assert history.first is not None
            x_BTD = (x_BTD + history.first) / 2
        elif not history.is_recomputing:
            history.first = x_BTD
        return self.compute(x_BTD, positions)


class EmbeddingSkip(Llama):
    """LLaMA with one entry of history, x₀, that all layers read."""

    title = "Embedding skip"
    policy = FirstLastHistory(first=1, last=0)
    router_map_obstacle = "its weights are fixed"
    code: ClassVar[Path]

    @property
    def entry_width(self) -> int:
        return self.config.hidden_size

    def slots_kept(self, layer: int) -> int:
        return int(layer == 0)

    def make_layer(self, layer: int) -> nn.Module:
        return SkipLayer(self.config, layer)

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        return FirstInput(layout)

    @property
    def export_format(self) -> ExportFormat:
        return ExportFormat("SkipForCausalLM", {"architecture": NAME}, "SkipModel", self.code)

    def check_llama_start(self) -> None:
        raise ValueError(f"model.architecture={NAME} cannot start from a LLaMA")


@contextmanager
def registered() -> Iterator[None]:
    """Within, the architecture is registered in this process."""
    ARCHITECTURES.register(NAME)(EmbeddingSkip)
    try:
        yield
    finally:
        ARCHITECTURES.unregister(NAME)


def call_registered(case: str, **arguments: Any) -> Any:
    """Worker case: call ``module.function`` while the architecture is registered."""
    module, _, name = case.rpartition(".")
    with registered():
        return getattr(import_module(module), name)(**arguments)


def train_registered(**arguments: Any) -> Any:
    """Worker case: training steps."""
    return call_registered("support.cases.train_steps", **arguments)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with registered():
        yield


def model_config(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"architecture": NAME, "num_hidden_layers": 6, "hidden_size": 32, "vocab_size": 64, **changes})


def test_one_process_computes_the_equation() -> None:
    """Compares with a loop over the layers of a LLaMA with the same weights."""
    model = model_config(num_key_value_heads=2)
    decoder = build_decoder(model, dtype=torch.float64)
    tokens = torch.arange(12).view(2, 6)
    llama = build_decoder(model.model_copy(update={"architecture": "llama"}), dtype=torch.float64)
    llama.load_state_dict(decoder.state_dict())
    x = first = llama.model.embed_tokens(tokens)
    positions = llama.model.layers[0].self_attn.positions(x, None)
    for layer in llama.model.layers:
        x = layer(0.5 * x + 0.5 * first, None, positions)
    torch.testing.assert_close(
        decoder(tokens), llama.model.embed_tokens.logits(llama.model.norm(x)), rtol=0, atol=1e-12
    )
    assert not torch.equal(decoder(tokens), llama(tokens))


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_stages_equal_one_process(workers: Workers, stages: int) -> None:
    values = equality_settings("llama", 2, True, "fp64", pipeline_stages=stages, activation_checkpointing=stages == 3)
    values["model"]["architecture"] = NAME
    check_equal(values, workers(stages), worker="model.test_new_architecture.train_registered")


def test_two_replicas_of_two_stages_equal_one_process(workers: Workers) -> None:
    values = equality_settings("llama", 2, False, "fp64", pipeline_stages=2, zero_stage=1)
    values["model"]["architecture"] = NAME
    check_equal(values, workers(4), worker="model.test_new_architecture.train_registered")


def test_costs_follow() -> None:
    model = model_config(num_key_value_heads=2)
    assert cost.count_parameters(model) == sum(p.numel() for p in build_decoder(model).parameters())
    width = 32 + 32
    assert [cost.payload_bytes(model, boundary, 10, 4) for boundary in (1, 3, 5)] == 3 * [width * 10 * 4]
    assert architecture_of(model).parameter_group("model.layers.0.mlp.up_proj.weight") == "matrices"


def test_plans_follow(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan names the architecture and counts what crosses; the sweep has no history policies to try."""
    arguments = [f"model.architecture={NAME}", "parallel.pipeline_stages=2"]
    command = ["plan", "--config", "configs/quickstart.yaml", *arguments]
    monkeypatch.setattr("sys.argv", command)
    plan.main()
    printed = capsys.readouterr().out
    assert NAME in printed and "over LLaMA" in printed
    config = load_config("configs/quickstart.yaml", arguments)
    llama = load_config("configs/quickstart.yaml", ["model.architecture=llama"])
    extra = cost.payload_bytes(config.model, 8, 1, 4) - cost.payload_bytes(llama.model, 8, 1, 4)
    assert extra == 4 * config.model.hidden_size
    monkeypatch.setattr("sys.argv", [*command, "--processes", "2", "--sweep"])
    plan.main()
    assert "settings tried" in capsys.readouterr().out


def test_exports_follow(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The export carries the modelling code; its logits and cached continuation equal the trainer's."""
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    EmbeddingSkip.code = tmp_path / "embedding_skip_lime.py"
    EmbeddingSkip.code.write_text(MODELLING_CODE)
    write_random(run_values(dataset, tmp_path / "run", architecture=NAME))
    export(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "exported")])
    assert f"exported {NAME}, step 0" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "exported").glob("*.py")}
    shared = {"configuration_lime.py", "layers_lime.py", "modeling_lime.py"}
    assert files == {"embedding_skip_lime.py", *shared}
    assert "# Embedding skip" in (tmp_path / "exported/README.md").read_text()


def test_the_name_is_a_choice_of_the_configuration() -> None:
    with pytest.raises(LimeError, match="model.architecture='resformer' must be .*'embedding_skip', .*'llama'"):
        load_config(None, ["model.architecture=resformer"])


def test_a_missing_member_is_an_error_at_registration() -> None:
    class Incomplete(Architecture):
        def check(self) -> None: ...

    with pytest.raises(TypeError, match=r"'incomplete' lacks activation_bytes, .*title"):
        ARCHITECTURES.register("incomplete")(Incomplete)
    assert "incomplete" not in ARCHITECTURES
