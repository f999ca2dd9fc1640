"""The decoder for `transformers`: embedding, layers, norm and output projection, with a key/value cache and ``generate``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_lime import LimeConfig
from .history_lime import HiddenHistory, HiddenRouter, KeyValueHistory, KeyValueRouter, Reads, Summaries
from .hyper_lime import HyperLayer
from .layers_lime import MLP, Attention, ForwardPass, RMSNorm, rms_normalise


class PreNormLayer(nn.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: LimeConfig, layer: int, router: nn.Module | None) -> None:
        super().__init__()
        self.layer = layer
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, router)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def finish(self, x_BTD: Tensor, q_BHTd: Tensor, k_BGTd: Tensor, v_BGTd: Tensor, run: ForwardPass) -> Tensor:
        """The layer's output, once keys and values are there."""
        x_BTD = x_BTD + run.attend(self.layer, self.self_attn, q_BHTd, k_BGTd, v_BGTd)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class KeyValueLayer(PreNormLayer):
    """``routes: kv``: keys and values are mixed with those of earlier layers before they are rotated."""

    def __init__(self, config: LimeConfig, layer: int, reads: Reads) -> None:
        router = KeyValueRouter(config.num_key_value_heads, reads.by_layer[layer]) if layer else None
        super().__init__(config, layer, router)

    def forward(self, x_BTD: Tensor, history: KeyValueHistory, run: ForwardPass) -> Tensor:
        attention, normed = self.self_attn, self.input_layernorm(x_BTD)
        key, value = history.mix(self.layer, attention.router, *attention.keys_and_values(normed))
        return self.finish(x_BTD, attention.queries(normed), key, value, run)


class HiddenLayer(PreNormLayer):
    """``routes: hidden``: each head's keys and values are projected from its own mixture of earlier layers' inputs."""

    def __init__(self, config: LimeConfig, layer: int, reads: Reads) -> None:
        is_reader = layer >= config.lime["start_layer"]
        super().__init__(config, layer, HiddenRouter(config, reads.by_layer[layer]) if is_reader else None)
        self.history_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps) if is_reader else None

    def forward(self, x_BTD: Tensor, history: HiddenHistory, run: ForwardPass) -> Tensor:
        attention, norm = self.self_attn, self.history_layernorm
        state = rms_normalise(x_BTD, self.input_layernorm.eps)
        normed = state * self.input_layernorm.weight
        found = history.read(self.layer, attention, None if norm is None else norm.weight, x_BTD, state)
        key, value = attention.keys_and_values(normed) if found is None else found
        return self.finish(x_BTD, attention.queries(normed), key, value, run)


class LimePreTrainedModel(PreTrainedModel):
    config: LimeConfig
    config_class = LimeConfig
    base_model_prefix = "model"
    _no_split_modules = ["LimeModel"]  # layers read what other layers left: they stay on one device
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True


class LimeModel(LimePreTrainedModel):
    """Token ids to last hidden states."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.reads = Reads(config)
        layers: list[nn.Module] = []
        for layer in range(config.num_hidden_layers):
            if config.architecture == "hyper":
                layers.append(HyperLayer(config, layer))
            else:
                kind = KeyValueLayer if config.lime["routes"] == "kv" else HiddenLayer
                layers.append(kind(config, layer, self.reads))
        self.layers = nn.ModuleList(layers)
        self.history = Summaries(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        run = ForwardPass(self.config, x, attention_mask, position_ids, past_key_values)
        history: Any = None
        if self.config.architecture == "hyper":
            x = x.unsqueeze(-2).expand(-1, -1, self.config.hyper["rate"], -1)
        elif self.config.lime["routes"] == "kv":
            history = KeyValueHistory(self.reads, self.history)
        else:
            history = HiddenHistory(self.reads, self.history, self.config.rms_norm_eps)
        states: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(self._one_stream(x))
            x = layer(x, history, run)
        x = self.norm(self._one_stream(x))
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if output_hidden_states else None,
        )
        return output.to_tuple() if return_dict is False else output

    def _one_stream(self, x: Tensor) -> Tensor:
        return x.sum(-2) if x.dim() == 4 else x


class LimeForCausalLM(LimePreTrainedModel, GenerationMixin):
    """Token ids to logits."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LimeConfig) -> None:
        super().__init__(config)
        self.model = LimeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """``logits_to_keep``: only of so many last tokens (0: of all), or of these. ``labels`` are shifted in here."""
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        loss: torch.Tensor | None = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=found.past_key_values, hidden_states=found.hidden_states
        )
        return output.to_tuple() if return_dict is False else output
