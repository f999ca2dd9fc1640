"""The decoder's flat list of layers as a DeepSpeed PipelineModule. Its forward pass is ours: unpack the payload once, run the
stage's layers over it, pack once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import LayerSpec as DeepSpeedLayer
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.pipe.module import TiedLayerSpec as DeepSpeedTiedLayer
from torch import Tensor, nn

from lime_dist.config.deepspeed import batch_split
from lime_dist.config.registry import SCHEDULES
from lime_dist.config.schema import Config, ModelConfig
from lime_dist.model.architecture import architecture_of, stage_layout
from lime_dist.model.blocks import compile_layers
from lime_dist.model.cost import payload_shape
from lime_dist.model.decoder import (
    LayerSpec,
    apply_norm,
    decoder_layers,
    embed,
    later_readers,
    layer_name,
    open_history,
    run_layers,
)
from lime_dist.model.history import LayerHistory
from lime_dist.model.logits import LogitForm
from lime_dist.model.loss import projected_loss
from lime_dist.model.summaries import ChunkSummary
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.payload import pack, unpack
from lime_dist.pipeline.placement import process_grid
from lime_dist.pipeline.shared_weights import boundary_prices
from lime_dist.pipeline.wire import Wire
from lime_dist.pipeline.wire_format import WireFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


class LimePipelineModule(PipelineModule):
    """The layers of this rank's stage. The input is tokens [B, T] on the first stage, a payload [B, T, …] on the others; the
    output is a payload, on the last stage the hidden state [B, T, D] after the last norm, from which ``loss_fn`` computes logits and
    loss a piece at a time.

    Attributes:
        later_readers: copies of the routers and summaries of later stages to whose partial mixtures the stage adds.
        compile_obstacle: why layers run uncompiled although the configuration would compile them, in one line; else None.
        wire_in, wire_out: how payloads travel over the boundaries before and behind the stage; None where there is none.
    """

    def __init__(self, config: Config, verbose: bool = False) -> None:
        self.config = config
        self.bounds, self.prices = stage_bounds(config), boundary_prices(config)
        specs = decoder_layers(config.model)
        self._flat_index = {spec.name: index for index, spec in enumerate(specs)}
        device = torch.device(get_accelerator().current_device_name())
        arguments = (config.model, config.train.seed, device, DTYPES[config.precision])
        layers: list[DeepSpeedLayer] = [_Layer(spec, arguments) for spec in specs]
        if specs[-1] is specs[0]:
            layers[0] = layers[-1] = _TiedEmbedding(specs[0], arguments)
        width, _ = batch_split(config, dist.get_world_size())
        grid = process_grid(config.parallel.pipeline_stages, width, config.parallel.topology)
        with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
            super().__init__(layers, topology=grid, loss_fn=self._loss)
        self.dtype = DTYPES[config.precision]
        self.wire_in = self._wire(self.stage_id) if self.stage_id else None
        self.wire_out = self._wire(self.stage_id + 1) if not self.holds_head else None
        begin, end = self.bounds[self.stage_id], self.bounds[self.stage_id + 1]
        self.layout = stage_layout(config.model, range(begin, end), prices=self.prices)
        later = later_readers(config.model, self.layout)
        self.later_readers = nn.ModuleList(spec.build(*arguments) for spec in later)
        self.exported_parameters = self._exported_parameters(specs, later)
        layers_to_compile = (layer for layer in self._layers() if not isinstance(layer, ChunkSummary))
        splits_backward = SCHEDULES[config.pipeline.schedule].splits_backward
        self.compile_obstacle = compile_layers(layers_to_compile, device, config.train.compile, splits_backward)

    @property
    def embeds_tokens(self) -> bool:
        """Whether the stage begins with the token embedding."""
        return self.stage_id == 0

    @property
    def holds_head(self) -> bool:
        """Whether the stage ends with the last norm and the head."""
        return self.stage_id == self.num_stages - 1

    def _partition_layers(self, method: str = "ours") -> None:
        """Cut the flat list at `stage_bounds`. The embedding goes to the first stage, norm and head to the last."""
        self.parts = [0, *(self._flat_index[layer_name(bound)] for bound in self.bounds[1:-1]), self._num_layers]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def _synchronize_tied_weights(self) -> None:
        """Nothing to do: initial values are a function of seed and name, so both copies of a tied weight are equal."""

    def _exported_parameters(self, specs: Sequence[LayerSpec], later: Sequence[LayerSpec]) -> dict[str, nn.Parameter]:
        """This stage's parameters by exported name, in the order of the flat list; a tied weight appears once. Copies of later
        stages' weights follow."""
        parameters: dict[str, nn.Parameter] = {}
        own, modules = specs[self._local_start : self._local_stop], (*self.forward_funcs, *self.later_readers)
        for spec, module in zip((*own, *later), modules, strict=True):
            names = spec.exported_names(module)
            parameters.update({names[local]: parameter for local, parameter in module.named_parameters()})
        return parameters

    def _layers(self) -> Sequence[nn.Module]:
        """The stage's decoder layers with the chunk summaries between them."""
        first, last = int(self.embeds_tokens), 2 * int(self.holds_head)
        return cast(Sequence[nn.Module], self.forward_funcs[first : len(self.forward_funcs) - last])

    def payload_shape(self, boundary: int, batch: int, length: int) -> tuple[int, ...]:
        """[B, T, …] of what crosses the boundary before stage ``boundary``."""
        return payload_shape(self.config.model, self.bounds[boundary], batch, length, self.prices)

    def _wire(self, boundary: int) -> Wire:
        """How payloads travel over the boundary before stage ``boundary``."""
        wire_format = WireFormat.of(self.config, self.bounds[boundary])
        return Wire(wire_format, self.dtype, DTYPES[wire_format.dtype])

    def landing(self, batch: int, length: int) -> tuple[Tensor, LayerHistory | None]:
        """Memory for the next payload to be received into, and the history that it is part of, if it is: pass both to ``arrived``."""
        assert self.wire_in is not None
        if self.wire_in.is_identity:
            return self._payload_memory(batch, length)
        return self.wire_in.empty(self.payload_shape(self.stage_id, batch, length), self._device), None

    def arrived(
        self, received: Tensor, history: LayerHistory | None, batch: int, length: int
    ) -> tuple[Tensor, LayerHistory | None]:
        """The payload [B, T, …] that has been received into the memory of ``landing``, and the history that it is part of, if it
        is: pass both to ``forward``."""
        assert self.wire_in is not None
        if self.wire_in.is_identity:
            return received, history
        payload, history = self._payload_memory(batch, length)
        return self.wire_in.decode(received, payload), history

    def arrived_gradient(self, received: Tensor, batch: int, length: int) -> Tensor:
        """The gradient of the stage's output, which has been received from the next stage."""
        assert self.wire_out is not None
        if self.wire_out.is_identity:
            return received
        shape = self.payload_shape(self.stage_id + 1, batch, length)
        return self.wire_out.decode(received, torch.empty(shape, dtype=self.dtype, device=self._device))

    def _payload_memory(self, batch: int, length: int) -> tuple[Tensor, LayerHistory | None]:
        """Memory for a payload in the type of the run, and the history that it is part of, if it can be."""
        shape = self.payload_shape(self.stage_id, batch, length)
        if architecture_of(self.config.model).receives_in_place:
            lead = batch * length * self.config.model.hidden_size
            history = open_history(self.config.model, self.layout, batch * length, self.dtype, self._device, lead)
            assert history is not None
            return history.landing(shape), history
        return torch.empty(shape, dtype=self.dtype, device=self._device), None

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(self, inputs: Tensor, history: LayerHistory | None = None, starts_BT: Tensor | None = None) -> Tensor:
        """The stage's output. ``starts_BT``: see `run_layers`."""
        config, functions = self.config, self.forward_funcs
        if history is None:
            num_tokens = inputs.shape[:2].numel()
            history = open_history(config.model, self.layout, num_tokens, self.dtype, inputs.device)
        if self.embeds_tokens:
            hidden = embed(config.model, functions[0], inputs)
        else:
            hidden = unpack(inputs.to(self.dtype), config.model.hidden_size, history)
        checkpointing, later = config.parallel.activation_checkpointing, list(self.later_readers)
        hidden, released = run_layers(self._layers(), hidden, history, checkpointing, later, starts_BT)
        if not self.holds_head:
            return pack(hidden, released, history)
        return apply_norm(config.model, functions[-2], hidden)

    def logits(self, hidden_D: Tensor) -> Tensor:
        """The logits [..., V] of hidden states [..., D] after the last norm, on the last stage."""
        form = LogitForm.of(self.config.model)
        return form.logits(F.linear(hidden_D, cast(Tensor, self.forward_funcs[-1].weight)))

    def _loss(self, hidden_BTD: Tensor, labels_BT: Tensor, counted_share: float | None) -> Tensor:
        """The loss of a micro-batch on the last stage, in training with the z-loss. The head is an output projection or a tied
        embedding."""
        weight, z_loss = cast(Tensor, self.forward_funcs[-1].weight), self.config.train.z_loss
        form = LogitForm.of(self.config.model)
        return projected_loss(
            hidden_BTD, weight, labels_BT, counted_share, form, z_loss if torch.is_grad_enabled() else 0.0
        )


Arguments = tuple[ModelConfig, int, torch.device, torch.dtype]


class _Layer(DeepSpeedLayer):
    """Wraps our description of a layer in DeepSpeed's."""

    def __init__(self, spec: LayerSpec, arguments: Arguments) -> None:
        super().__init__(nn.Module)
        self.spec, self.arguments = spec, arguments

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build(*self.arguments)


class _TiedEmbedding(DeepSpeedTiedLayer):
    """The embedding, which is also the output projection. DeepSpeed makes a process group for the stages that hold a copy."""

    def __init__(self, spec: LayerSpec, arguments: Arguments) -> None:
        super().__init__("embedding", nn.Module)
        self.spec, self.arguments = spec, arguments

    def build(self, log: bool = False) -> nn.Module:
        return self.spec.build(*self.arguments)
