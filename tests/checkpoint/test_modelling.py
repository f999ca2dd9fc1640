"""Protects the modelling code of exports: the trainer's equations, a cache as large as LLaMA's, no import of lime_dist."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
import torch
from support.exports import PROMPT, exported_in_memory, generate, perturbed
from support.models import MODELS, small

from lime_dist.export import huggingface
from lime_dist.export.huggingface.key_value_lime import KeyValueHistory
from lime_dist.export.model_files import SHAPE_KEYS
from lime_dist.model.layers import language_model_loss

transformers = pytest.importorskip("transformers", reason="the extra `hf` is not installed")
OURS = [name for name in MODELS if not name.startswith("llama")]
FEW = {
    "lime kv, full": {"num_key_value_heads": 3},
    "lime kv, chunked": MODELS["lime kv, chunked"],
    "lime static, chunked": MODELS["lime static, chunked, two rows"],
    "lime top_p": MODELS["lime top_p"],
    "lime dynamic": MODELS["lime dynamic"],
    "hyper": MODELS["hyper dynamic"],
    "gated residual": MODELS["gated residual"],
    "hyper permutations": MODELS["hyper permutations"],
    "value residual": MODELS["value residual, learnable"],
    "attention residuals": MODELS["attention residuals, 3"],
    "moda": MODELS["moda, MLP, chunked, two rows"],
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", OURS)
def test_logits_and_gradients_are_the_decoders(name: str, tied: bool) -> None:
    """In float64: logits at once, in two parts with the cache, and every gradient. An export can be trained elsewhere."""
    config = small(**MODELS[name], tie_word_embeddings=tied)
    decoder = perturbed(config, torch.float64)
    exported = exported_in_memory(config, decoder)
    tokens = torch.randint(0, 31, (3, 9), generator=torch.Generator().manual_seed(5))
    wanted = decoder(tokens)
    logits = exported(tokens, use_cache=False).logits
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-11)
    first = exported(tokens[:, :5])
    second = exported(tokens[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), wanted, rtol=0, atol=1e-11)
    language_model_loss(wanted, tokens).backward()
    language_model_loss(logits, tokens).backward()
    gradients = {n: p.grad for n, p in exported.named_parameters()}
    for parameter_name, parameter in decoder.named_parameters():
        error = (gradients[parameter_name] - parameter.grad).abs().max() / parameter.grad.abs().max()
        assert error < 1e-9, f"{parameter_name}: {error:.1e}"


@pytest.mark.parametrize("name", [name for name in FEW if name != "gated residual"])  # its text is a short loop
def test_greedy_generation_with_and_without_cache_is_the_same(name: str) -> None:
    """Over 200 tokens. A batch padded on the left gives the same as its prompts one by one.

    Computed in float64, so that rounding decides no near tie. The weights are large, so that the text is not a short loop.
    """
    config = small(**FEW[name], num_hidden_layers=5, tie_word_embeddings=False)
    decoder = perturbed(config, torch.float64)
    for parameter_name, parameter in decoder.named_parameters():
        if parameter_name.endswith("_proj.weight"):
            parameter.data *= 4
    exported = exported_in_memory(config, decoder)
    alone = generate(exported, PROMPT, 200)
    assert torch.equal(alone, generate(exported, PROMPT, 200, use_cache=False))
    assert len(set(alone[0].tolist())) > 10
    short = generate(exported, PROMPT[:, 3:], 40)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), PROMPT[:, 3:]), 1)
    batch, mask = torch.cat((PROMPT, padded)), torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
    for use_cache in (True, False):
        together = generate(exported, batch, 40, attention_mask=mask, use_cache=use_cache)
        assert torch.equal(together, torch.cat((alone[:, :40], short)))


@pytest.mark.parametrize("name", FEW)
def test_logits_of_a_padded_batch_are_those_of_single_prompts(name: str) -> None:
    config = small(**FEW[name], num_hidden_layers=7)
    exported = exported_in_memory(config, perturbed(config))
    batch, mask = torch.cat((PROMPT, PROMPT)), torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    with torch.no_grad():
        logits, alone = exported(batch, attention_mask=mask).logits, exported(PROMPT[:, 2:]).logits
    torch.testing.assert_close(logits[1, 2:], alone[0], rtol=0, atol=1e-5)
    assert torch.isfinite(logits).all(), "the logits of padding do not turn a loss into NaN"


def cache_bytes(model: torch.nn.Module) -> int:
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(PROMPT, past_key_values=cache, use_cache=True)
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


@pytest.mark.parametrize("name", FEW)
def test_the_cache_has_the_size_of_llamas(name: str) -> None:
    config = small(**FEW[name], num_hidden_layers=7)
    shape = config.model_dump(include={*SHAPE_KEYS})
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
    assert cache_bytes(exported_in_memory(config, perturbed(config))) == cache_bytes(llama)


def test_entries_are_dropped_after_their_last_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bounded history needs bounded memory at any depth, in modelling code too."""
    held, mix = [], KeyValueHistory.mix

    def counted(self: KeyValueHistory, *arguments: object) -> object:
        mixed = mix(self, *arguments)
        held.append(len(self.entries))
        return mixed

    monkeypatch.setattr(KeyValueHistory, "mix", counted)
    config = small(**MODELS["lime kv, first_last"], num_hidden_layers=20)
    exported_in_memory(config, perturbed(config))(PROMPT)
    assert len(held) == 20 and max(held) == 3 and held[-1] == 0


def test_other_arguments_of_forward() -> None:
    config = small()
    exported = exported_in_memory(config, perturbed(config))
    with torch.no_grad():
        output = exported(PROMPT, labels=PROMPT, output_hidden_states=True)
        embedded = exported(inputs_embeds=exported.get_input_embeddings()(PROMPT), return_dict=False)
        last = exported(PROMPT, logits_to_keep=2).logits
        causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
        masked = exported(PROMPT, attention_mask=causal).logits
    wanted_loss = language_model_loss(output.logits[:, :-1], PROMPT[:, 1:]).item()
    assert output.loss.item() == pytest.approx(wanted_loss, rel=1e-5)
    assert len(output.hidden_states) == config.num_hidden_layers + 1
    torch.testing.assert_close(exported.lm_head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(embedded[0], output.logits)
    torch.testing.assert_close(last, output.logits[:, -2:])
    torch.testing.assert_close(masked, output.logits, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        exported(PROMPT, inputs_embeds=torch.zeros(1, 1, 24))


def test_a_model_without_loaded_weights_has_finite_logits() -> None:
    """Its routers start as the identity, and its hyper-connections as a pre-norm decoder."""
    for name in ("lime kv, chunked", "hyper dynamic", "lime static, chunked", "attention residuals, 1"):
        config = small(**MODELS[name])
        exported = exported_in_memory(config, perturbed(config))
        fresh = type(exported)(exported.config)
        with torch.no_grad():
            assert torch.isfinite(fresh(PROMPT).logits).all()


def test_it_imports_torch_and_transformers_only() -> None:
    """A file that imports lime_dist would work here but not where only transformers is installed."""
    allowed = {*sys.stdlib_module_names, "torch", "transformers", "sentencepiece"}
    files = sorted(Path(huggingface.__file__).parent.glob("*_lime.py"))
    assert len(files) == 14
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, file.name
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 1 or node.module.split(".")[0] in allowed, file.name
