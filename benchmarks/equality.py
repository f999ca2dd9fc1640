"""Train the same steps in two ways, by the real engine and by one process without DeepSpeed: the results must be equal.

Both start from the same perturbed weights and see the same random tokens. `gpu_check.py` compares a GPU with the CPU in this
way, and the tests every pipeline with one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lime_dist.config.schema import Config
from lime_dist.data.answers import Answers, CountedLabels, CountedShares, WithinDocuments
from lime_dist.data.order import rank_positions
from lime_dist.model.architecture import architecture_of
from lime_dist.model.decoder import Decoder, build_decoder
from lime_dist.model.layers import language_model_loss

if TYPE_CHECKING:  # DeepSpeed chooses its accelerator when it is imported
    from lime_dist.model.optimizer_states import StatePart
    from lime_dist.pipeline.engine import LimeEngine
    from lime_dist.train.stage_optimizer import StageOptimizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
Result = dict[str, Any]
"""``losses``, ``norms`` and ``evaluations`` by step; by exported name ``gradients`` of the first step, ``parameters`` after the
last, and ``updates``, the total change of the master weights."""

Batch = tuple[Tensor, Tensor]
Logits = Callable[[Decoder, Tensor], Tensor]
"""From tokens [B, T] to logits [B, T, V]."""
EOS = 2
SHARES = {"training": 0.2, "validation": 0.25}
"""Assumed shares of counted tokens, which divide the loss of runs that do not count all tokens. Any constants will do."""


def random_batch(config: Config, step: int) -> Batch:
    """Return the global batch of a step: (tokens, labels) [global batch, T]."""
    generator = torch.Generator().manual_seed(1000 + step)
    size = (config.train.global_batch_size, config.data.sequence_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, size, generator=generator)
    if (counted := counted_labels(config)) is not None:
        labels = counted.labels(tokens.numpy())
        return tokens[:, :-1].contiguous(), torch.from_numpy(labels)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def counted_labels(config: Config) -> CountedLabels | None:
    """Which labels count; None: all."""
    if config.data.answer_token is not None:
        return Answers(config.data.answer_token, EOS)
    return WithinDocuments(EOS) if config.data.document_mask else None


def loss_and_documents(config: Config) -> dict[str, Any]:
    """Arguments of `build_engine`: the shares of the labels that count, and the token that ends documents."""
    shares = CountedShares() if counted_labels(config) is None else CountedShares(**SHARES)
    return {"counted_shares": shares, "eos": EOS if config.data.document_mask else None}


def document_by_document(model: Decoder, tokens_BT: Tensor) -> Tensor:
    """Logits [B, T, V] of every document of every sample alone."""
    logits = []
    for row in tokens_BT:
        ends = [0, *(torch.nonzero(row == EOS).flatten() + 1).tolist(), len(row)]
        logits.append(torch.cat([model(row[None, begin:end])[0] for begin, end in pairwise(ends) if begin < end]))
    return torch.stack(logits)


def rank_batches(config: Config, step: int, replica: int, width: int, micro_batch_size: int) -> Iterator[Batch]:
    """Yield one replica's micro-batches of a step."""
    tokens, labels = random_batch(config, step)
    for rows in rank_positions(0, config.train.global_batch_size, micro_batch_size, replica, width):
        yield tokens[rows], labels[rows]


def perturb(name: str, parameter: Tensor) -> None:
    """Add noise that depends only on the parameter's name, so that norms are not 1 and no symmetry hides an error."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter))


def train_one_process(
    config: Config,
    steps: int,
    evaluation_micro_batch_size: int = 0,
    dtype: torch.dtype | None = None,
    logits: Logits | None = None,
) -> Result:
    """Train the single-process decoder on the CPU with torch's own optimizer, clipping and schedule, without DeepSpeed.

    Args:
        evaluation_micro_batch_size: if given, each step is followed by an evaluation in micro-batches of that size.
        dtype: in which everything is computed, from weights in the precision of the run; None: in that precision.
        logits: how the decoder makes logits from tokens; None: at once, or with ``data.document_mask`` document by document.
    """
    if logits is None:
        logits = document_by_document if config.data.document_mask else Decoder.__call__
    model = build_decoder(config.model, seed=config.train.seed, dtype=DTYPES[config.precision])
    for name, parameter in model.named_parameters():
        perturb(name, parameter)
    dtype = DTYPES[config.precision] if dtype is None else dtype
    model.to(dtype)
    accumulation_dtype = torch.promote_types(dtype, torch.float32)
    masters = {name: p.detach().to(accumulation_dtype).clone().requires_grad_() for name, p in model.named_parameters()}
    before = {name: master.detach().clone() for name, master in masters.items()}
    width = config.model.hidden_size / (config.model.numerics.base_hidden_size or config.model.hidden_size)
    settings, group_of = config.optimizer, architecture_of(config.model).parameter_group
    adam = torch.optim.AdamW(
        [
            {
                "params": [masters[name]],
                "lr": {"routers": settings.router_lr, "matrices": settings.lr / width}.get(group_of(name), settings.lr),
                "weight_decay": settings.weight_decay * width if group_of(name) == "matrices" else 0.0,
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
    result: Result = {"losses": [], "norms": [], "evaluations": []}
    gradients = {name: torch.zeros_like(master) for name, master in masters.items()}
    for name, master in masters.items():
        master.grad = gradients[name]
    micro = config.train.micro_batch_size
    for step in range(steps):
        loss = _accumulate(config, model, logits, gradients, random_batch(config, step), micro)
        if step == 0:
            result["gradients"] = {name: gradient.clone() for name, gradient in gradients.items()}
        norm = torch.nn.utils.clip_grad_norm_(masters.values(), settings.max_grad_norm)
        adam.step()
        scheduler.step()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(masters[name].data)
        result["losses"].append(loss)
        result["norms"].append(float(norm))
        if evaluation_micro_batch_size:
            with torch.no_grad():
                result["evaluations"].append(_loss(config, model, logits, evaluation_micro_batch_size))
    result["updates"] = {name: master.detach() - before[name] for name, master in masters.items()}
    result["parameters"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def _mean_loss(config: Config, logits: Tensor, labels: Tensor, use: str) -> Tensor:
    """Mean loss. If not all labels count: each label's loss by itself, summed over counted labels, over their expected number."""
    z_loss = config.train.z_loss if use == "training" else 0.0
    if counted_labels(config) is None:
        return language_model_loss(logits, labels, z_loss=z_loss)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = labels.clamp(min=0).unsqueeze(-1)
    each = logits.logsumexp(-1) - logits.gather(-1, chosen).squeeze(-1) + z_loss * logits.logsumexp(-1).square()
    return torch.where(labels >= 0, each, torch.zeros_like(each)).sum() / (SHARES[use] * labels.numel())


def _accumulate(
    config: Config, model: Decoder, logits: Logits, gradients: dict[str, Tensor], batch: Batch, micro: int
) -> float:
    """Set ``gradients`` to those of the mean loss over micro-batches, summed in their own precision; return the loss."""
    tokens, labels = batch
    parts = len(tokens) // micro
    for gradient in gradients.values():
        gradient.zero_()
    total = 0.0
    for part_tokens, part_labels in zip(tokens.split(micro), labels.split(micro), strict=True):
        loss = _mean_loss(config, logits(model, part_tokens), part_labels, "training")
        (loss / parts).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name] += parameter.grad
            parameter.grad = None
        total += loss.item() / parts
    return total


def _loss(config: Config, model: Decoder, logits: Logits, micro: int) -> float:
    parts = zip(*(x.split(micro) for x in random_batch(config, 100)), strict=True)
    losses = [_mean_loss(config, logits(model, tokens), labels, "validation").item() for tokens, labels in parts]
    return sum(losses) / len(losses)


def train_stage(
    engine: LimeEngine, optimizer: StageOptimizer, config: Config, steps: int, evaluation_micro_batch_size: int = 0
) -> Result:
    """Train this rank's stage; all ranks call it. The result holds this rank's parameters, and its ``rates`` by step.

    Args:
        evaluation_micro_batch_size: as in `train_one_process`.
    """
    with torch.no_grad():
        for name, parameter in optimizer.parameters.items():
            perturb(name, parameter)
        for name in optimizer.local_names():
            for part in optimizer.state(name):
                part.values["weight"].copy_(_elements(optimizer.parameters[name], part.elements))
    replica, width = engine.grid.get_data_parallel_rank(), engine.dp_world_size
    result: Result = {
        "stage": engine.stage_id,
        "replica": replica,
        "losses": [],
        "norms": [],
        "evaluations": [],
    }
    result["rates"] = []
    before = _whole(optimizer, lambda name, part: part.values["weight"])
    update = optimizer.step

    def recorded_update() -> Tensor:
        if "gradients" not in result:
            result["gradients"] = _whole(
                optimizer, lambda name, part: _elements(optimizer.gradient(name), part.elements)
            )
        return update()

    optimizer.step = recorded_update  # type: ignore[method-assign]  # the update clears the gradients
    for step in range(steps):
        result["rates"].append(optimizer.learning_rates())
        result["losses"].append(
            engine.train_step(rank_batches(config, step, replica, width, config.train.micro_batch_size))
        )
        result["norms"].append(optimizer.gradient_norm)
        if size := evaluation_micro_batch_size:
            batches = rank_batches(config, 100, replica, width, size)
            parts = config.train.global_batch_size // size // width
            result["evaluations"].append(engine.evaluate(batches, parts, size))
    result["parameters"] = {name: p.detach().clone() for name, p in optimizer.parameters.items()}
    after = _whole(optimizer, lambda name, part: part.values["weight"])
    result["updates"] = {name: after[name] - weight for name, weight in before.items()}
    return result


def _elements(tensor: Tensor, elements: range) -> Tensor:
    return tensor.detach().reshape(-1)[elements.start : elements.stop]


def _whole(optimizer: StageOptimizer, values_of: Callable[[str, StatePart], Tensor]) -> dict[str, Tensor]:
    """Values of the parameters that this rank updates, in their shapes; of those that replicas divide, the values of all of them."""
    whole: dict[str, Tensor] = {}
    for name, parameter in optimizer.parameters.items():
        parts = optimizer.state(name)
        whole[name] = torch.zeros_like(parameter, dtype=optimizer.flat_gradients.dtype).detach()
        for part in parts:
            whole[name].view(-1)[part.elements.start : part.elements.stop] = values_of(name, part)
        if optimizer.is_sharded:
            dist.all_reduce(whole[name], group=optimizer.replicas.group)
    return whole
