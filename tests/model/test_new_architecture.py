"""Protects that an architecture is one object: a toy in this file goes through training, plan, cost and export.

Value residual (ResFormer, arXiv 2410.17897): a layer's values are v ← ½v + ½v₀, where v₀ are the values of layer 0. So v₀ crosses
every stage boundary beside the hidden state.
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
from lime_dist.model.blocks import PreNormLayer
from lime_dist.model.history import LayerHistory
from lime_dist.model.layout import StageLayout
from lime_dist.model.policies import FirstLastHistory
from lime_dist.plan import __main__ as plan

NAME = "value_residual"
Workers = Callable[[int], WorkerGroup]

MODELLING_CODE = """
from torch import nn

from .configuration_lime import LimeConfig
from .layers_lime import PreNormLayer
from .modeling_lime import BaseForCausalLM, BaseModel


class ValueResidualLayer(PreNormLayer):
    def __init__(self, config, layer):
        super().__init__(config, layer, None)

    def forward(self, x, first_values, run):
        normed, attention = self.input_layernorm(x), self.self_attn
        key, value = attention.keys_and_values(normed)
        if first_values:
            value = (value + first_values[0]) / 2
        else:
            first_values.append(value)
        return self.finish(x, attention.queries(normed), key, value, run)


class ValueResidualModel(BaseModel):
    def make_layers(self, config):
        return [ValueResidualLayer(config, layer) for layer in range(config.num_hidden_layers)]

    def open_history(self):
        return []


class ValueResidualForCausalLM(BaseForCausalLM):
    model_class = ValueResidualModel
"""


class FirstValues(LayerHistory):
    """Keeps v₀ in the autograd graph, [B, T, G·d]; no buffer, no routers."""

    def __init__(self, layout: StageLayout) -> None:
        self.layout, self.is_recomputing = layout, False
        self.first: Tensor | None = None

    def unpack(self, payload_BTC: Tensor, hidden_size: int) -> Tensor:
        hidden, self.first = payload_BTC.split([hidden_size, payload_BTC.shape[-1] - hidden_size], -1)
        return hidden

    def open(self, routing: Sequence[Tensor | None], summaries: Sequence[Tensor]) -> None:
        assert not summaries and set(routing) <= {None}

    def release(self) -> list[Tensor]:
        assert self.first is not None
        first, self.first = self.first, self.first.detach()
        return [first]

    def pack(self, hidden_BTD: Tensor, released: list[Tensor]) -> Tensor:
        return torch.cat([hidden_BTD, *released], -1)


class ValueResidualLayer(PreNormLayer):
    compiled_parts: ClassVar[tuple[str, ...]] = ("project", "finish")

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer, router=None)

    def forward(self, x_BTD: Tensor, history: FirstValues) -> Tensor:
        rotary, split = self.self_attn.rotary(x_BTD), self.self_attn.split_heads
        q_BHTd, k_BTC, v_BTC = self.project(x_BTD, rotary)
        if self.layer > 0:
            assert history.first is not None
            v_BTC = (v_BTC + history.first) / 2
        elif not history.is_recomputing:
            history.first = v_BTC
        return self.finish(x_BTD, q_BHTd, split(k_BTC), split(v_BTC), rotary)


class ValueResidual(Llama):
    """LLaMA with one entry of history, v₀, that all layers read."""

    title = "Value residual"
    policy = FirstLastHistory(first=1, last=0)
    router_map_obstacle = "its weights are fixed"
    code: ClassVar[Path]

    @property
    def entry_width(self) -> int:
        return self.config.key_value_heads * self.config.head_size

    def make_layer(self, layer: int) -> nn.Module:
        return ValueResidualLayer(self.config, layer)

    def make_history(
        self, layout: StageLayout, num_tokens: int, dtype: torch.dtype, device: torch.device, lead: int = 0
    ) -> LayerHistory:
        return FirstValues(layout)

    @property
    def export_format(self) -> ExportFormat:
        return ExportFormat("ValueResidualForCausalLM", {"architecture": NAME}, "ValueResidualModel", self.code)

    def check_llama_start(self) -> None:
        raise ValueError(f"model.architecture={NAME} cannot start from a LLaMA")


@contextmanager
def registered() -> Iterator[None]:
    """Within, the architecture is registered in this process."""
    ARCHITECTURES.register(NAME)(ValueResidual)
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
    x, first = llama.model.embed_tokens(tokens), None
    for layer in llama.model.layers:
        rotary, split = layer.self_attn.rotary(x), layer.self_attn.split_heads
        q, k, v = layer.project(x, rotary)
        first = v if first is None else first
        v = v if layer.layer == 0 else 0.5 * v + 0.5 * first
        x = layer.finish(x, q, split(k), split(v), rotary)
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
    width = 32 + 2 * 8
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
    assert extra == 4 * config.model.key_value_heads * config.model.head_size
    monkeypatch.setattr("sys.argv", [*command, "--processes", "2", "--sweep"])
    plan.main()
    assert "settings tried" in capsys.readouterr().out


def test_exports_follow(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The export carries the modelling code; its logits and cached continuation equal the trainer's."""
    pytest.importorskip("transformers", reason="the extra `hf` is not installed")
    ValueResidual.code = tmp_path / "value_residual_lime.py"
    ValueResidual.code.write_text(MODELLING_CODE)
    write_random(run_values(dataset, tmp_path / "run", architecture=NAME))
    export(["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "exported")])
    assert f"exported {NAME}, step 0" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "exported").glob("*.py")}
    shared = {"configuration_lime.py", "layers_lime.py", "modeling_lime.py"}
    assert files == {"value_residual_lime.py", *shared}
    assert "# Value residual" in (tmp_path / "exported/README.md").read_text()


def test_the_name_is_a_choice_of_the_configuration() -> None:
    with pytest.raises(LimeError, match="model.architecture='resformer' must be .*'llama' or 'value_residual'"):
        load_config(None, ["model.architecture=resformer"])


def test_a_missing_member_is_an_error_at_registration() -> None:
    class Incomplete(Architecture):
        def check(self) -> None: ...

    with pytest.raises(TypeError, match=r"'incomplete' lacks activation_bytes, .*title"):
        ARCHITECTURES.register("incomplete")(Incomplete)
    assert "incomplete" not in ARCHITECTURES
