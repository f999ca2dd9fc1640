"""A decoder layer with Attention Residuals (arXiv 2603.15031): every sub-layer reads a softmax over earlier outputs, [B, T, D]."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_lime import LimeConfig
from .layers_lime import ForwardPass, Handed, PreNormLayer, RMSNorm, rms_normalise
from .modeling_lime import BaseForCausalLM, BaseModel


class DepthAttention(nn.Module):
    """A softmax over outputs v of wᵀ·RMSNorm(v), and their mixture. The query w starts at 0: the mean."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(config.hidden_size))
        self.key_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """The mixture [B, T, D] of outputs of the same shape."""
        wide = self._wide(outputs)
        mixture = torch.zeros_like(wide[0])
        for weights, one in zip(self.weights(wide), wide, strict=True):
            mixture = mixture + weights.unsqueeze(-1) * one
        return mixture.to(outputs[0].dtype)

    def weights(self, outputs: list[Tensor]) -> Tensor:
        """The softmax [outputs, B, T], in at least float32."""
        query, wide = self.query * self.key_layernorm(), self._wide(outputs)
        scores = torch.stack([rms_normalise(one, self.key_layernorm.eps) @ query.to(one.dtype) for one in wide])
        return scores.softmax(0)

    def _wide(self, outputs: list[Tensor]) -> list[Tensor]:
        """The outputs where the query is, in at least float32."""
        accumulation_dtype = torch.promote_types(self.query.dtype, torch.float32)
        return [output.to(self.query.device, accumulation_dtype) for output in outputs]


class AttentionResidualsLayer(PreNormLayer):
    """Attention and SwiGLU. What the layer takes and returns is the sum of the outputs of the block that is not finished."""

    def __init__(self, config: LimeConfig, layer: int) -> None:
        super().__init__(config, layer, None)
        self.block_size = int(config.attention_residuals["block_size"])
        self.attn_residual = DepthAttention(config) if layer > 0 else None
        self.mlp_residual = DepthAttention(config)
        self.output_residual = DepthAttention(config) if layer == config.num_hidden_layers - 1 else None

    def forward(self, x_BTD: Tensor, finished: Handed, run: ForwardPass) -> Tensor:
        blocks = finished.tensors
        for sublayer, read in ((2 * self.layer, self.attn_residual), (2 * self.layer + 1, self.mlp_residual)):
            begins = sublayer % self.block_size == 0
            if begins:
                blocks.append(x_BTD)
            mixed = x_BTD if read is None else read(blocks if begins else [*blocks, x_BTD])
            part = self._feed_forward if sublayer % 2 else self._attend
            out = self.checkpointed(part, run, mixed)
            x_BTD = out if begins else x_BTD + out
        return x_BTD if self.output_residual is None else self.output_residual([*blocks, x_BTD])

    def _attend(self, run: ForwardPass, mixed_BTD: Tensor) -> Tensor:
        normed, attention = self.input_layernorm(mixed_BTD), self.self_attn
        return run.attend(self.layer, attention, attention.queries(normed), *attention.keys_and_values(normed))

    def _feed_forward(self, run: ForwardPass, mixed_BTD: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(mixed_BTD))


class LimeModel(BaseModel):
    """Token ids to last hidden states. Depth attention needs the outputs of the tokens at hand alone, so the cache is LLaMA's."""

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        return [AttentionResidualsLayer(config, layer) for layer in range(config.num_hidden_layers)]

    def open_history(self) -> Handed:
        """The outputs of finished blocks."""
        return Handed()


class LimeForCausalLM(BaseForCausalLM):
    """Token ids to logits."""

    model_class = LimeModel
