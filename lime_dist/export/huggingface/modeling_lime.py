"""The decoder for `transformers`: embedding, layers, norm and output projection, with a key/value cache and ``generate``.

These are base classes. Every architecture has a file with subclasses that define its layers and its layer history.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_lime import LimeConfig
from .layers_lime import ForwardPass, RMSNorm


class LimePreTrainedModel(PreTrainedModel):
    config: LimeConfig
    config_class = LimeConfig
    base_model_prefix = "model"
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True


class BaseModel(LimePreTrainedModel):
    """Token ids to last hidden states. Subclasses define the layers."""

    def __init__(self, config: LimeConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(self.make_layers(config))
        self.history = self.make_summaries(config)
        self.norm = self.make_norm(config)
        self._no_split_modules = sorted({type(layer).__name__ for layer in self.layers})
        self.post_init()

    def make_layers(self, config: LimeConfig) -> list[nn.Module]:
        """The decoder layers."""
        raise NotImplementedError

    def make_summaries(self, config: LimeConfig) -> nn.Module:
        """The weights of chunk summaries, if the architecture has any."""
        return nn.Module()

    def make_norm(self, config: LimeConfig) -> nn.Module:
        """The final norm: from `last_output` to [B, T, D]."""
        return RMSNorm(config.hidden_size, config.rms_norm_eps)

    def open_history(self) -> Any:
        """The layer history of one forward pass, which every layer gets; None if the architecture has no history."""
        raise NotImplementedError

    def first_input(self, x_BTD: Tensor) -> Tensor:
        """The input of the first layer, from embedded tokens."""
        return x_BTD

    def last_output(self, x: Tensor) -> Tensor:
        """The input of the final norm from the output of the last layer."""
        return x

    def shown_state(self, x: Tensor) -> Tensor:
        """What ``output_hidden_states`` gives of the input of a layer, [B, T, D]."""
        return self.last_output(x)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if self.training and any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            past_key_values, use_cache = None, False  # layers are computed again, which would write to the cache again
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DynamicCache()
        run = ForwardPass(self.config, x, attention_mask, position_ids, past_key_values, bool(output_attentions))
        x, history = self.first_input(x), self.open_history()
        states: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(self.shown_state(x))
            x = layer(x, history, run)
        x = self.norm(self.last_output(x))
        output = BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*states, x) if output_hidden_states else None,
            attentions=None if run.attentions is None else tuple(run.attentions),
        )
        return output.to_tuple() if return_dict is False else output


class BaseForCausalLM(LimePreTrainedModel, GenerationMixin):
    """Token ids to logits. Subclasses set ``model_class``."""

    model_class: type[BaseModel]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LimeConfig) -> None:
        super().__init__(config)
        self.model = self.model_class(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self._no_split_modules = self.model._no_split_modules
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
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with ``labels`` the loss.

        Args:
            labels: token ids as in ``input_ids``; they are shifted here.
            logits_to_keep: number of last tokens whose logits to return (0: all), or the indices of these tokens.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept]) * self.config.logit_scale
        if (softcap := self.config.numerics.get("logit_softcap")) is not None:
            logits = (logits / softcap).tanh() * softcap
        loss: torch.Tensor | None = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        causal = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=output.past_key_values, hidden_states=output.hidden_states,
            attentions=output.attentions,
        )  # fmt: skip
        return causal.to_tuple() if return_dict is False else causal
