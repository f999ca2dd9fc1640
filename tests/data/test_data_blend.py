"""Tests of blends: exact proportions, every sample of each dataset once per epoch, and the same order after any resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lime_dist.config.load import make_config
from lime_dist.config.schema import DataConfig
from lime_dist.data.blend import BLOCK, BlendOrder, Pattern, open_training, open_validation
from lime_dist.data.indexed import IndexedWriter
from lime_dist.data.loader import TrainBatches, ValidationBatches
from lime_dist.errors import LimeError

LENGTH = 8


def write_pair(prefix: Path, documents: int, first_token: int, tokens: int = 40) -> Path:
    """A Megatron pair: document i is ``tokens`` times the token first_token + i."""
    with IndexedWriter(prefix, np.int32) as writer:
        for i in range(documents):
            writer.add_document(np.full(tokens, first_token + i))
    return prefix


def blend(*entries: tuple[Path, float], seed: int = 3) -> DataConfig:
    listed = [{"path": str(path), "weight": weight} for path, weight in entries]
    values = {"blend": listed, "validation_fraction": 0.2, "sequence_length": LENGTH, "seed": seed}
    return make_config({"data": values}, "a test").data


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return blend((write_pair(tmp_path / "a", 50, 0), 3.0), (write_pair(tmp_path / "b", 25, 1000), 1.0))


def test_blocks_have_exact_shares_and_every_turn_once() -> None:
    pattern = Pattern([0.5, 0.3, 0.2], seed=1)
    assert pattern.counts.tolist() == [2048, 1229, 819]
    datasets, turns = pattern.places(np.arange(3 * BLOCK))
    for dataset, count in enumerate(pattern.counts):
        np.testing.assert_array_equal(np.sort(turns[datasets == dataset]), np.arange(3 * count))
    some = np.random.default_rng(0).integers(0, 3 * BLOCK, 500)
    for whole, part in zip((datasets, turns), pattern.places(some), strict=True):
        np.testing.assert_array_equal(whole[some], part)
    # Mixed within a block: the share of any stretch is near the weight (five deviations), and blocks differ.
    shares = [np.mean(datasets[begin : begin + 512] == 0) for begin in range(0, 3 * BLOCK, 512)]
    assert max(abs(share - 0.5) for share in shares) < 5 * 0.5 / 512**0.5
    assert not np.array_equal(datasets[:BLOCK], datasets[BLOCK : 2 * BLOCK])
    with pytest.raises(LimeError, match="weight 0.0001 of 1.0001 is less than one in 4096"):
        Pattern([1.0, 0.0001], seed=1)


def test_each_dataset_has_its_own_epochs(config: DataConfig) -> None:
    samples, order = open_training(config, vocab_size=2000)
    assert isinstance(order, BlendOrder)
    sizes = [split.num_samples(LENGTH) for split in samples.splits]
    assert sizes == [40 * 40 // LENGTH - 1, 20 * 40 // LENGTH - 1] and order.num_samples == sum(sizes)
    positions = 2 * BLOCK
    samples_read = order.samples_at(np.arange(positions))
    assert order.counts(positions) == [6144, 2048] and order.counts(0) == [0, 0]
    prefix = order.counts(777)
    assert prefix == [int(np.sum(samples_read[:777] < sizes[0])), int(np.sum(samples_read[:777] >= sizes[0]))]
    for first, size, count in [(0, sizes[0], 6144), (sizes[0], sizes[1], 2048)]:
        times = np.bincount(
            samples_read[(samples_read >= first) & (samples_read < first + size)] - first, minlength=size
        )
        assert times.sum() == count and times.max() - times.min() <= 1
    assert order.shares(positions)[1] == f"2,048 of 8,192 samples (25.00%), {2048 / sizes[1]:.2f} epochs"


def test_a_blend_resumes_and_changes_its_width_without_repeats(config: DataConfig) -> None:
    samples, order = open_training(config, vocab_size=2000)

    def read(consumed: int, steps: int, width: int) -> list[list[int]]:
        streams = [TrainBatches(samples, order, LENGTH, 16, 4, rank, width, consumed) for rank in range(width)]
        samples_read = []
        for _ in range(steps):
            rows = [row for stream in streams for _ in range(stream.micro_batches) for row in next(stream)[0].tolist()]
            samples_read.append(sorted(map(tuple, rows)))
        for stream in streams:
            stream.close()
        return samples_read

    straight = read(0, 8, 1)
    assert read(0, 3, 2) + read(48, 5, 4) == straight
    tokens = {row[0] for step in straight for row in step}
    assert any(token < 1000 for token in tokens) and any(token >= 1000 for token in tokens)


def test_validation_has_the_same_proportions_and_is_always_the_same(config: DataConfig) -> None:
    validation = open_validation(config, vocab_size=2000)
    available = validation.num_samples(LENGTH)
    batches = ValidationBatches(validation, LENGTH, 40, 4, 0, 1)
    rows = [row[0] for tokens, _ in batches for row in tokens.tolist()]
    # The last tenth of documents, 40 tokens each: 49 and 24 samples; weights 3 : 1.
    a, b = [token for token in rows if token < 1000], [token for token in rows if token >= 1000]
    assert a == [40 + i * LENGTH // 40 for i in range(len(a))] and b == [1020 + i * LENGTH // 40 for i in range(len(b))]
    assert 40 <= available <= 49 + 24 and abs(len(a) - 30) <= 12
    other = open_validation(config.model_copy(update={"seed": 99}), vocab_size=2000)
    again = ValidationBatches(other, LENGTH, 40, 4, 0, 1)
    assert [row[0] for tokens, _ in again for row in tokens.tolist()] == rows


def test_what_cannot_be_blended_is_refused(tmp_path: Path) -> None:
    for values, says in [
        ({"blend": [{"path": "a", "weight": 1.0}], "path": "b"}, "set either data.path or data.blend"),
        ({"path": None}, "set either data.path or data.blend"),
        ({"blend": [{"path": "a", "weight": 0.0}]}, "greater than 0"),
        ({"blend": []}, "at least 1"),
    ]:
        with pytest.raises(LimeError, match=says):
            make_config({"data": values}, "a test")
    write_pair(tmp_path / "a", 1, 0)
    with pytest.raises(LimeError, match="1 documents are too few"):
        open_training(blend((tmp_path / "a", 1.0)), 2000)


def test_a_pair_is_read_as_it_is(tmp_path: Path) -> None:
    """A prefix with dots; the last documents are held out; a token outside the vocabulary is an error when it is read."""
    prefix = write_pair(tmp_path / "corpus.v1_text_document", 50, 0)
    values = {"data": {"path": str(prefix), "validation_fraction": 0.1, "sequence_length": 40}}
    config = make_config(values, "a test").data
    training, order = open_training(config, vocab_size=45)
    validation = open_validation(config, vocab_size=45)
    assert (training.num_tokens, validation.num_tokens) == (45 * 40, 5 * 40)
    assert training.sample(3, 40).tolist() == [3] * 40 + [4] and training.vocab_size is None and order.num_samples == 44
    with pytest.raises(LimeError, match=r"sample 0 holds tokens 45 to 46, but model.vocab_size=45"):
        validation.sample(0, 40)
    with pytest.raises(LimeError, match="no such folder, and no .*nothing.bin"):
        open_training(config.model_copy(update={"path": str(tmp_path / "nothing")}), 45)
    Path(f"{prefix}.bin").unlink()
    with pytest.raises(LimeError, match="bin: no such file"):
        open_training(config, 45)
