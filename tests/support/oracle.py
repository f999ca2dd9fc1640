"""The single-process decoder trained with torch's own optimizer, clipping and schedule: what every pipeline must equal."""

from __future__ import annotations

import math
from typing import Any

import torch
from support.cases import SHARES, perturb, random_batch
from torch import Tensor

from lime_dist.config.schema import Config
from lime_dist.model.architecture import architecture_of
from lime_dist.model.decoder import build_decoder
from lime_dist.model.layers import language_model_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def train_steps(config: Config, steps: int, evaluation_micro_batch_size: int = 0) -> dict[str, Any]:
    """Return losses, norms, gradients of the first step and parameters after the last, from one process without DeepSpeed."""
    dtype = DTYPES[config.precision]
    accumulation_dtype = torch.promote_types(dtype, torch.float32)
    model = build_decoder(config.model, seed=config.train.seed, dtype=dtype)
    for name, parameter in model.named_parameters():
        perturb(name, parameter)
    masters = {name: p.detach().to(accumulation_dtype).clone().requires_grad_() for name, p in model.named_parameters()}
    before = {name: master.detach().clone() for name, master in masters.items()}
    settings, group_of = config.optimizer, architecture_of(config.model).parameter_group
    adam = torch.optim.AdamW(
        [
            {
                "params": [masters[name]],
                "lr": settings.router_lr if group_of(name) == "routers" else settings.lr,
                "weight_decay": settings.weight_decay if group_of(name) == "matrices" else 0.0,
            }
            for name in masters
        ],
        betas=settings.betas,
        eps=settings.eps,
    )

    def factor(step: int) -> float:
        floor = settings.min_lr / settings.lr
        if step < settings.warmup_steps:
            return max(floor, (step + 1) / settings.warmup_steps)
        done = (step - settings.warmup_steps) / max(1, config.train.steps - settings.warmup_steps)
        return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2

    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, factor)
    result: dict[str, Any] = {"losses": [], "norms": [], "evaluations": []}
    micro = config.train.micro_batch_size
    for step in range(steps):
        loss = _accumulate(config, model, masters, random_batch(config, step), micro)
        if step == 0:
            result["gradients"] = {name: master.grad.clone() for name, master in masters.items()}
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), settings.max_grad_norm)
        adam.step()
        scheduler.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name].data)
        result["losses"].append(loss)
        result["norms"].append(float(norm))
        if evaluation_micro_batch_size:
            with torch.no_grad():
                result["evaluations"].append(_loss(config, model, evaluation_micro_batch_size))
    result["updates"] = {name: master.detach() - before[name] for name, master in masters.items()}
    result["parameters"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def _mean_loss(config: Config, logits: Tensor, labels: Tensor, use: str) -> Tensor:
    """Mean loss. If only answers count: each label's loss by itself, summed over counted labels, over their expected number."""
    if config.data.answer_token is None:
        return language_model_loss(logits, labels)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = labels.clamp(min=0).unsqueeze(-1)
    each = logits.logsumexp(-1) - logits.gather(-1, chosen).squeeze(-1)
    return torch.where(labels >= 0, each, torch.zeros_like(each)).sum() / (SHARES[use] * labels.numel())


def _accumulate(
    config: Config, model: torch.nn.Module, masters: dict[str, Tensor], batch: tuple[Tensor, Tensor], micro: int
) -> float:
    """Add up the gradients of the mean loss over micro-batches in the masters' precision; return the loss."""
    tokens, labels = batch
    parts = len(tokens) // micro
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    total = 0.0
    for part_tokens, part_labels in zip(tokens.split(micro), labels.split(micro), strict=True):
        loss = _mean_loss(config, model(part_tokens), part_labels, "training")
        (loss / parts).backward()
        for name, parameter in model.named_parameters():
            masters[name].grad += parameter.grad
            parameter.grad = None
        total += loss.item() / parts
    return total


def _loss(config: Config, model: torch.nn.Module, micro: int) -> float:
    parts = zip(*(x.split(micro) for x in random_batch(config, 100)), strict=True)
    losses = [_mean_loss(config, model(tokens), labels, "validation").item() for tokens, labels in parts]
    return sum(losses) / len(losses)
