"""The decoder's flat list of layers as a DeepSpeed PipelineModule. Its forward pass is ours: unpack the payload once, run the
stage's layers over it, pack once."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
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
from lime_dist.model.crossing import Cut
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
from lime_dist.model.mean_weights import MeanWeights
from lime_dist.model.summaries import ChunkSummary
from lime_dist.pipeline.partition import stage_bounds
from lime_dist.pipeline.payload import pack, unpack
from lime_dist.pipeline.placement import process_grid
from lime_dist.pipeline.shared_weights import boundary_prices
from lime_dist.pipeline.wire import Wire
from lime_dist.pipeline.wire_format import WireFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


@dataclass(frozen=True)
class Part:
    """One of the parts of the decoder that a stage holds.

    Attributes:
        index: among the parts of all stages.
        layers: its decoder layers.
        modules: these, with the chunk summaries between them.
        embeds_tokens: whether it begins with the token embedding.
        holds_head: whether it ends with the last norm and the head.
        wire_in, wire_out: how payloads travel over the boundaries before and behind it; None where there is none.
    """

    index: int
    layers: range
    modules: Sequence[nn.Module]
    embeds_tokens: bool
    holds_head: bool
    wire_in: Wire | None
    wire_out: Wire | None


class LimePipelineModule(PipelineModule):
    """The layers of this rank's stage, in one or several parts. The input of a part is tokens [B, T] for the first part of all, a payload
    [B, T, …] for the others; the output is a payload, of the last part of all the hidden state [B, T, D] after the last norm, from
    which ``loss_fn`` computes logits and loss a piece at a time.

    Attributes:
        bounds: `partition.stage_bounds`.
        stage_parts: the parts of this stage.
        later_readers: copies of the routers and summaries of later stages to whose partial mixtures the stage adds.
        mean_weights: where histories that are made from now on add the weights of reads (`LayerHistory.mean_weights`); else None.
        compile_obstacle: why layers run uncompiled although the configuration would compile them, in one line; else None.
    """

    def __init__(self, config: Config, verbose: bool = False) -> None:
        self.config = config
        self.bounds = stage_bounds(config)
        self.prices = boundary_prices(config, self.bounds)
        self._cut = Cut(tuple(self.bounds), config.parallel.pipeline_stages)
        specs = decoder_layers(config.model)
        flat_index = {spec.name: index for index, spec in enumerate(specs)}
        cuts = [0, *(flat_index[layer_name(bound)] for bound in self.bounds[1:-1]), len(specs)]
        by_part = [specs[begin:end] for begin, end in pairwise(cuts)]
        self._of_stages = [list(chain(*by_part[stage :: self._cut.stages])) for stage in range(self._cut.stages)]
        device = torch.device(get_accelerator().current_device_name())
        arguments = (config.model, config.train.seed, device, DTYPES[config.precision])
        layers: list[DeepSpeedLayer] = [_Layer(spec, arguments) for spec in chain(*self._of_stages)]
        if specs[-1] is specs[0]:
            layers[0] = layers[-1] = _TiedEmbedding(specs[0], arguments)
        width, _ = batch_split(config, dist.get_world_size())
        grid = process_grid(config.parallel.pipeline_stages, width, config.parallel.topology)
        with contextlib.nullcontext() if verbose else contextlib.redirect_stdout(io.StringIO()):
            super().__init__(layers, topology=grid, loss_fn=self._loss)
        self.dtype = DTYPES[config.precision]
        self.mean_weights: MeanWeights | None = None
        self.stage_parts = self._make_parts([len(part) for part in by_part])
        self.layout = stage_layout(config.model, *self._cut.of_stage(self.stage_id), prices=self.prices)
        later = later_readers(config.model, self.layout)
        self.later_readers = nn.ModuleList(spec.build(*arguments) for spec in later)
        self.exported_parameters = self._exported_parameters(later)
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
        """Divide the flat list, in which the layers of a stage follow each other: the parts at `stage_bounds`, the embedding with the
        first of all, norm and head with the last."""
        self.parts = [0, *accumulate(map(len, self._of_stages))]
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(self.parts[stage], self.parts[stage + 1])

    def _make_parts(self, sizes: Sequence[int]) -> list[Part]:
        """The parts of this stage.

        Args:
            sizes: elements of the flat list, by part of all stages.
        """
        last, begin, made = len(sizes) - 1, 0, []
        for index in range(self.stage_id, len(sizes), self.num_stages):
            end, first = begin + sizes[index], index == 0
            modules = self.forward_funcs[begin + first : end - 2 * (index == last)]
            wire_in = None if first else self._wire(index)
            wire_out = None if index == last else self._wire(index + 1)
            layers = self._cut.parts[index]
            made.append(
                Part(index, layers, cast(Sequence[nn.Module], modules), first, index == last, wire_in, wire_out)
            )
            begin = end
        return made

    def _synchronize_tied_weights(self) -> None:
        """Nothing to do: initial values are a function of seed and name, so both copies of a tied weight are equal."""

    def _exported_parameters(self, later: Sequence[LayerSpec]) -> dict[str, nn.Parameter]:
        """This stage's parameters by exported name, in the order of the flat list; a tied weight appears once. Copies of later
        stages' weights follow."""
        parameters: dict[str, nn.Parameter] = {}
        own, modules = self._of_stages[self.stage_id], (*self.forward_funcs, *self.later_readers)
        for spec, module in zip((*own, *later), modules, strict=True):
            names = spec.exported_names(module)
            parameters.update({names[local]: parameter for local, parameter in module.named_parameters()})
        return parameters

    def _layers(self) -> Sequence[nn.Module]:
        """The stage's decoder layers with the chunk summaries between them."""
        return [module for part in self.stage_parts for module in part.modules]

    def payload_shape(self, boundary: int, batch: int, length: int) -> tuple[int, ...]:
        """[B, T, …] of what crosses the boundary before part ``boundary`` of all."""
        return payload_shape(self.config.model, self.bounds[boundary], batch, length, self.prices)

    def _wire(self, boundary: int) -> Wire:
        """How payloads travel over the boundary before part ``boundary`` of all."""
        wire_format = WireFormat.of(self.config, self.bounds[boundary], self.prices)
        return Wire(wire_format, self.dtype, DTYPES[wire_format.dtype])

    def new_history(self, batch: int, length: int, lead: int = 0) -> LayerHistory | None:
        """An empty history of one micro-batch; None for models without one. ``lead``: see `Architecture.make_history`."""
        history = open_history(self.config.model, self.layout, batch * length, self.dtype, self._device, lead)
        if history is not None:
            history.mean_weights = self.mean_weights
        return history

    def landing(self, batch: int, length: int, part: int = 0) -> tuple[Tensor, LayerHistory | None]:
        """Memory for the next payload to be received into, for a part of this stage, and the history that it is part of, if it is: pass
        both to ``arrived``."""
        wire_in = self.stage_parts[part].wire_in
        assert wire_in is not None
        if wire_in.is_identity:
            return self._payload_memory(batch, length, part)
        return wire_in.empty(self._received_shape(batch, length, part), self._device), None

    def arrived(
        self, received: Tensor, history: LayerHistory | None, batch: int, length: int, part: int = 0
    ) -> tuple[Tensor, LayerHistory | None]:
        """The payload [B, T, …] that has been received into the memory of ``landing``, and the history that it is part of, if it
        is: pass both to ``forward``."""
        wire_in = self.stage_parts[part].wire_in
        assert wire_in is not None
        if wire_in.is_identity:
            return received, history
        payload, history = self._payload_memory(batch, length, part)
        return wire_in.decode(received, payload), history

    def arrived_gradient(self, received: Tensor, batch: int, length: int, part: int = 0) -> Tensor:
        """The gradient of a part's output, which has been received from the next stage."""
        own = self.stage_parts[part]
        assert own.wire_out is not None
        if own.wire_out.is_identity:
            return received
        shape = self.payload_shape(own.index + 1, batch, length)
        return own.wire_out.decode(received, torch.empty(shape, dtype=self.dtype, device=self._device))

    def gradient_landing(self, batch: int, length: int, part: int = 0) -> Tensor:
        """Memory for the gradient of a part's output to be received into."""
        own = self.stage_parts[part]
        assert own.wire_out is not None
        return own.wire_out.empty(self.payload_shape(own.index + 1, batch, length), self._device)

    def _received_shape(self, batch: int, length: int, part: int) -> tuple[int, ...]:
        return self.payload_shape(self.stage_parts[part].index, batch, length)

    def _payload_memory(self, batch: int, length: int, part: int) -> tuple[Tensor, LayerHistory | None]:
        """Memory for a payload in the type of the run, and the history that it is part of, if it can be. A later part of the stage finds
        its history made, and copies what it receives."""
        shape = self._received_shape(batch, length, part)
        if part == 0 and architecture_of(self.config.model).receives_in_place:
            history = self.new_history(batch, length, batch * length * self.config.model.hidden_size)
            assert history is not None
            return history.landing(shape), history
        return torch.empty(shape, dtype=self.dtype, device=self._device), None

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def forward(
        self, inputs: Tensor, history: LayerHistory | None = None, part: int = 0, starts_BT: Tensor | None = None
    ) -> Tensor:
        """The output of a part of the stage. Its parts share one history of a micro-batch. ``starts_BT``: see `run_layers`."""
        config, functions, own = self.config, self.forward_funcs, self.stage_parts[part]
        if history is None:
            history = self.new_history(*inputs.shape[:2])
        elif part:
            history.begin_part(part)
        if own.embeds_tokens:
            hidden = embed(config.model, functions[0], inputs)
        else:
            hidden = unpack(inputs.to(self.dtype), config.model.hidden_size, history)
        checkpointing, later = config.parallel.checkpointing_of(self.stage_id), list(self.later_readers)
        hidden, released = run_layers(own.modules, hidden, history, checkpointing, later, starts_BT)
        if not own.holds_head:
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
