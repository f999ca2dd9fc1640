"""The data of a run: training samples and their order, validation samples, and which labels the loss counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lime_dist.config.schema import Config
from lime_dist.config.sections.train import EVALUATION_SAMPLES
from lime_dist.data.answers import MEASURED_SAMPLES, Answers, CountedLabels, CountedShares, find_counted
from lime_dist.data.blend import open_training, open_validation
from lime_dist.data.dataset import Samples
from lime_dist.data.documents import MASK, find_eos
from lime_dist.data.identity import DataIdentity
from lime_dist.data.loader import TrainBatches, ValidationBatches
from lime_dist.data.order import Order
from lime_dist.data.ramp import BatchSizes
from lime_dist.data.validation_sets import ValidationSet, fitting_samples, open_validation_sets
from lime_dist.distributed import together
from lime_dist.errors import LimeError


@dataclass(frozen=True)
class RunData:
    """The opened and checked data of a run; `open_run_data` makes it.

    Attributes:
        training: the training samples.
        order: which training sample comes when.
        batch_sizes: of the global batch, by consumed samples.
        validation: the validation samples; None: the run has no validation.
        counted: which labels the loss counts; None: all.
        counted_shares: of all labels, those that the loss counts.
        eos: the token that ends every document; None: attention and positions do not stop there.
        sequence_length: tokens of a sample.
        evaluation_samples: samples of a validation.
        replicas: data-parallel width.
        identity: of the training data.
        validation_sets: those of ``data.validation``; none if the run has no validation.
    """

    training: Samples
    order: Order
    batch_sizes: BatchSizes
    validation: Samples | None
    counted: CountedLabels | None
    counted_shares: CountedShares
    eos: int | None
    sequence_length: int
    micro_batch_size: int
    evaluation_samples: int
    replicas: int
    identity: DataIdentity
    validation_sets: tuple[ValidationSet, ...] = ()

    def settled(self, config: Config) -> Config:
        """The configuration with the number of validation samples that the run uses. It stays as it is if only the sets of
        ``data.validation`` have samples: 0 would mean no validation."""
        if self.validation is None and self.validation_sets:
            return config
        train = config.train.model_copy(update={"evaluation_samples": self.evaluation_samples})
        return config.model_copy(update={"train": train})

    @property
    def counts_answers_only(self) -> bool:
        return isinstance(self.counted, Answers)

    def train_batches(
        self, replica: int, consumed_samples: int, pinned_for: torch.device | None = None
    ) -> TrainBatches:
        """The training stream of a replica, from the step after ``consumed_samples`` samples on, pinned for a GPU."""
        return TrainBatches(
            self.training, self.order, self.sequence_length, self.batch_sizes, self.micro_batch_size, replica,
            self.replicas, consumed_samples, self.counted, pinned_for,
        )  # fmt: skip

    def validation_batches(self, replica: int, pinned_for: torch.device | None = None) -> ValidationBatches | None:
        """The validation micro-batches of a replica, pinned for a GPU; None: the run has no validation.

        Raises:
            LimeError: the samples do not divide among the replicas, or the split has too few.
        """
        if self.validation is None:
            return None
        return ValidationBatches(
            self.validation, self.sequence_length, self.evaluation_samples, self.micro_batch_size, replica,
            self.replicas, self.counted, pinned_for,
        )  # fmt: skip


def open_run_data(config: Config, replicas: int) -> RunData:
    """Open the data of a run and check that they fit its configuration; all ranks must call it.

    Raises:
        LimeError: on all ranks, if any rank cannot read the data or they do not fit.
    """
    return together(lambda: read_run_data(config, replicas))


def read_run_data(config: Config, replicas: int) -> RunData:
    """`open_run_data` in one process, without a process group.

    Raises:
        LimeError: the data cannot be read, or they do not fit.
    """
    settings, length, vocab_size = config.train, config.data.sequence_length, config.model.vocab_size
    training, order = open_training(config.data, vocab_size)
    _check_vocabulary(vocab_size, training.vocab_size, str(training.path))
    counted = find_counted(training, config.data)
    validation, evaluation_samples = _open_validation(config, replicas, counted)
    sets: tuple[ValidationSet, ...] = ()
    if settings.evaluation_samples != 0:
        wanted = evaluation_samples or settings.evaluation_samples_or_default
        sets = open_validation_sets(config, training, counted, wanted, replicas)
    shares = CountedShares()
    if counted is not None:
        shares = CountedShares(
            counted.share(training, length, order.num_samples, MEASURED_SAMPLES),
            None if validation is None else counted.share(validation, length, evaluation_samples),
        )
    return RunData(
        training=training,
        order=order,
        batch_sizes=BatchSizes(settings.global_batch_size, settings.batch_ramp),
        validation=validation,
        counted=counted,
        counted_shares=shares,
        eos=find_eos(training, config.data.eos_token, MASK) if config.data.document_mask else None,
        sequence_length=length,
        micro_batch_size=settings.micro_batch_size,
        evaluation_samples=evaluation_samples,
        replicas=replicas,
        identity=DataIdentity.of(training, length),
        validation_sets=sets,
    )


def _open_validation(config: Config, replicas: int, counted: CountedLabels | None) -> tuple[Samples | None, int]:
    """The validation split and how many of its samples a validation has; None and 0 without validation."""
    settings, length = config.train, config.data.sequence_length
    samples, wide = settings.evaluation_samples, settings.micro_batch_size * replicas
    if samples == 0:
        return None, 0
    split = open_validation(config.data, config.model.vocab_size)
    if config.data.validation and not _has_samples(split, length):
        return None, 0
    if samples is None:
        samples = fitting_samples(EVALUATION_SAMPLES, split.num_samples(length), wide)
        if not samples:
            return None, 0
    ValidationBatches(split, length, samples, settings.micro_batch_size, 0, replicas, counted)
    return split, samples


def _has_samples(split: Samples, length: int) -> bool:
    try:
        return split.num_samples(length) > 0
    except LimeError:
        return False


def describe_evaluation(config: Config, evaluation_samples: int, replicas: int) -> str | None:
    """A line about how many samples a validation has, if the configuration leaves that open and it is not the usual number."""
    if config.train.evaluation_samples is not None or evaluation_samples == EVALUATION_SAMPLES:
        return None
    each = f"train.micro_batch_size={config.train.micro_batch_size} × {replicas} replicas"
    if not evaluation_samples:
        missing = "validation on data.validation only" if config.data.validation else "no validation"
        return f"{missing}: the validation split has no full micro-batch of all replicas ({each}); give more validation text"
    return f"validations have {evaluation_samples} samples, a multiple of {each} that the split allows"


def _check_vocabulary(model_size: int, tokenizer_size: int | None, path: str) -> None:
    if tokenizer_size is not None and tokenizer_size > model_size:
        raise LimeError(
            f"model.vocab_size={model_size} is smaller than the {tokenizer_size} pieces of the tokenizer "
            f"that made {path}; set model.vocab_size={tokenizer_size} or more"
        )
