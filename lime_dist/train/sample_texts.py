"""Texts that the model writes during training: ``monitor.samples``.

The first replica continues all prompts together, through its pipeline. Each token takes the forward passes of micro-batches of the
training shape, as a validation does: no kernel is new to the device, and no stage holds more than in a validation. Nothing is
cached, so use few prompts and tokens. The other replicas wait for each token, so that `pipeline.timeout` bounds one token, not all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lime_dist.config.schema import SampleTextsConfig
from lime_dist.data.prompts import Prompts
from lime_dist.pipeline.engine import LimeEngine


class Sampler:
    """Continues prompts with the model of an engine. All ranks call its methods together."""

    def __init__(self, engine: LimeEngine, prompts: Prompts, settings: SampleTextsConfig) -> None:
        self._engine, self._prompts, self._settings = engine, prompts, settings
        self._works = engine.grid.get_data_parallel_rank() == 0
        self._source = int(engine.grid.stage_to_global(engine.num_stages - 1, data=0))
        config = engine.lime_config
        size, length = config.train.micro_batch_size, config.data.sequence_length
        self._micro_batches = -(-len(prompts.tokens) // size)
        self._rows = torch.full((self._micro_batches * size, length), prompts.eos)
        self._begins = [len(each) for each in prompts.tokens]
        for row, tokens in zip(
            self._rows, prompts.tokens, strict=False
        ):  # rows that fill a micro-batch up have no prompt
            row[: len(tokens)] = torch.tensor(tokens)

    @property
    def interval(self) -> int:
        """Steps between samples."""
        return self._settings.interval

    def texts(self, step: int) -> dict[str, str]:
        """On rank 0, the continuation of each prompt after ``step`` steps, by prompt; {} on other ranks."""
        continued = self.continuations(step)
        if self._engine.global_rank:
            return {}
        return {
            prompt: self._prompts.decode(tokens) for prompt, tokens in zip(self._prompts.texts, continued, strict=True)
        }

    def continuations(self, step: int) -> list[list[int]]:
        """The tokens that follow each prompt, without the final eos. With a temperature they are drawn anew at each ``step``."""
        engine, settings = self._engine, self._settings
        rows, continued = self._rows.clone(), [list[int]() for _ in self._begins]
        generator = torch.Generator().manual_seed(step)
        open_rows = set(range(len(continued)))
        while open_rows:
            lengths = [begin + len(tokens) for begin, tokens in zip(self._begins, continued, strict=True)]
            with engine.watching(f"the sample texts after step {step}"):
                tokens = self._next_tokens(rows, lengths, generator)
            for row in list(open_rows):
                if tokens[row] == self._prompts.eos:
                    open_rows.remove(row)
                    continue
                rows[row, lengths[row]] = tokens[row]
                continued[row].append(tokens[row])
                if len(continued[row]) == settings.tokens:
                    open_rows.remove(row)
        return continued

    def _next_tokens(self, rows_NT: Tensor, lengths: Sequence[int], generator: torch.Generator) -> list[int]:
        """The token that follows the first ``lengths[n]`` tokens of each row, on all ranks."""
        engine, size = self._engine, self._engine.lime_config.train.micro_batch_size
        chosen = torch.zeros(len(lengths), dtype=torch.int64)
        begins: Iterator[int] = iter(range(0, len(rows_NT), size))

        def read(hidden_BTD: Tensor) -> None:
            begin = next(begins)
            for row in range(begin, min(begin + size, len(lengths))):
                logits_V = engine.module.logits(hidden_BTD[row - begin, lengths[row] - 1])
                chosen[row] = self._choose(logits_V[: self._prompts.vocab_size].float().cpu(), generator)

        if self._works:
            batches = ((tokens_BT, tokens_BT) for tokens_BT in rows_NT.split(size))
            engine.read_outputs(batches, self._micro_batches, read)
        on_device = chosen.to(engine.device)
        dist.broadcast(on_device, self._source)
        tokens: list[int] = on_device.tolist()
        return tokens

    def _choose(self, logits_V: Tensor, generator: torch.Generator) -> Tensor:
        if not self._settings.temperature or not logits_V.isfinite().all():
            return logits_V.argmax()
        shares_V = ((logits_V - logits_V.max()) / self._settings.temperature).softmax(-1)
        return torch.multinomial(shares_V, 1, generator=generator)[0]
