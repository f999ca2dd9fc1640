"""Protects what all tokenizers guarantee: exact decoding, the model's own ids, and no special tokens from text."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from support.vocabularies import TEXTS, any_text, gpt_2, llama_2, llama_3, quick, rough, train_sentencepiece

from data_tools.tokenizer import Tokenizer
from data_tools.tokenizer.__main__ import main
from data_tools.tokenizer.importing import CUT_LIMITS, CUT_TEXT
from data_tools.tokenizer.pieces import BETWEEN_WORDS, cut
from data_tools.tokenizer.tokenizer import PIECE_CHARACTERS

KINDS = ("sentencepiece", "unigram", "llama-2", "llama-2-metaspace", "llama-3", "gpt-2")
# At most 40 characters with a place to cut among the last three.
segment = st.tuples(rough, st.sampled_from(("z a", "z\na"))).map(lambda both: both[0][-37:] + both[1])


def raw_models() -> dict[str, bytes | tokenizers.Tokenizer]:
    pieces = train_sentencepiece()
    return {
        "sentencepiece": pieces,
        "unigram": train_sentencepiece(model_type="unigram", vocab_size=450),
        "llama-2": llama_2(pieces),
        "llama-2-metaspace": llama_2(pieces, "metaspace"),
        "llama-3": llama_3(),
        "gpt-2": gpt_2(),
    }


@pytest.fixture(scope="module")
def raw() -> dict[str, bytes | tokenizers.Tokenizer]:
    """The models as their libraries create them."""
    return raw_models()


@pytest.fixture(scope="module")
def imported(
    raw: dict[str, bytes | tokenizers.Tokenizer], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Tokenizer]:
    """The same models, imported by the command."""
    opened = {}
    for kind, model in raw.items():
        folder = tmp_path_factory.mktemp(kind)
        file = folder / ("any.model" if isinstance(model, bytes) else "tokenizer.json")
        file.write_bytes(model if isinstance(model, bytes) else model.to_str().encode())
        main(["import", "--model", str(file), "--output", str(folder / "imported")])
        opened[kind] = Tokenizer(folder / "imported")
    return opened


@pytest.fixture(params=KINDS)
def one(request: pytest.FixtureRequest, imported: dict[str, Tokenizer]) -> Tokenizer:
    """A tokenizer of each kind in turn."""
    return imported[request.param]


def same_ids(one: Tokenizer, ids: np.ndarray, expected: np.ndarray) -> bool:
    """Whether ids are equal; for a unigram model, up to their order.

    A unigram model can split a run of one character in several ways of equal score. Rounding decides, and depends on where
    the text begins.
    """
    if one.facts["model_type"] == "unigram":
        ids, expected = np.sort(ids), np.sort(expected)
    return np.array_equal(ids, expected)


def test_each_kind_is_exact_and_can_be_cut(one: Tokenizer) -> None:
    assert one.exact and one.facts["cuttable"] is True
    assert one.vocab_size > one.eos_id >= 0 and one.pad_id == -1


@given(texts=st.lists(any_text, min_size=1, max_size=8))
@quick
def test_every_text_is_decoded_exactly(one: Tokenizer, texts: list[str]) -> None:
    """Any text, encoded as a whole, in a batch, or in pieces that end anywhere, and without special ids."""
    special = list(one._encoder.special_tokens().values())
    for text, ids in zip(texts, one.encode_batch(texts), strict=True):
        assert ids.dtype == np.int32 and one.decode(ids) == text
        assert not np.isin(ids, special).any()
        assert one.decode(one.encode_in_pieces(text, 5)) == text


@given(segments=st.lists(segment, min_size=3, max_size=12))
@quick
def test_pieces_have_the_ids_of_the_whole(one: Tokenizer, segments: list[str]) -> None:
    """As long as every piece has a place to cut; ``test_cuts_without_a_place_…`` covers the others."""
    text = "".join(segments)
    for limit in (45, 80):
        assert same_ids(one, one.encode_in_pieces(text, limit), one.encode(text))


def test_cuts_without_a_place_keep_the_text_and_lose_few_ids(one: Tokenizer) -> None:
    """Each cut in the middle of a word changes the number of ids by at most two; here there are about 64 cuts."""
    text = "sublicensing" * 64
    pieces, whole = one.encode_in_pieces(text, 13), one.encode(text)
    assert one.decode(pieces) == text
    assert abs(pieces.size - whole.size) <= 2 * (len(text) // 13)


@pytest.mark.parametrize("kind", ["gpt-2", "sentencepiece"])
def test_a_text_beyond_the_limit_has_the_ids_of_the_whole(imported: dict[str, Tokenizer], kind: str) -> None:
    one = imported[kind]
    text = TEXTS[0] * (PIECE_CHARACTERS // len(TEXTS[0]) + 2)
    whole = one._encoder.encode_batch([text])[0]
    ids = one.encode(text)
    np.testing.assert_array_equal(ids, whole)


def test_the_trial_text_has_a_place_for_every_cut() -> None:
    """Otherwise the import would consider every vocabulary uncuttable."""
    for limit in CUT_LIMITS:
        pieces = cut(CUT_TEXT, limit, BETWEEN_WORDS)
        assert len(pieces) >= 5 and all(
            left[-1] == "\n" or right[0] == " " for left, right in zip(pieces, pieces[1:], strict=False)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_library(
    raw: dict[str, bytes | tokenizers.Tokenizer], imported: dict[str, Tokenizer], kind: str
) -> None:
    model, texts = raw[kind], [*TEXTS, *TEXTS[0].splitlines()]
    expected: list[list[int]]
    if isinstance(model, bytes):
        expected = sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts)
    else:
        texts = [text.lstrip(" ") if kind == "llama-2-metaspace" else text for text in texts]
        expected = [model.encode(text, add_special_tokens=False).ids for text in texts]
    for ids, own in zip(imported[kind].encode_batch(texts), expected, strict=True):
        assert ids.tolist() == own


@given(text=any_text)
@quick
def test_llama_2_has_the_ids_of_its_sentencepiece_model(imported: dict[str, Tokenizer], text: str) -> None:
    """In all three forms. A metaspace alone would lose a leading space, so the text gets a second one."""
    expected = imported["sentencepiece"].encode(text).tolist()
    assert imported["llama-2"].encode(text).tolist() == expected
    assert imported["llama-2-metaspace"].encode(text).tolist() == expected


def test_nothing_is_added_and_special_ids_decode_to_nothing(one: Tokenizer) -> None:
    ids = one.encode("a word")
    assert not {one.bos_id, one.eos_id} & set(ids.tolist())
    around = [number for number in (one.bos_id, one.eos_id) if number >= 0]
    assert one.decode([*around, *ids.tolist(), *around]) == "a word"
    assert one.encode("").size == 0 and one.decode([]) == ""


def test_a_lone_surrogate_is_refused(one: Tokenizer) -> None:
    with pytest.raises(UnicodeEncodeError):
        one.encode_batch(["fine", "\ud800"])


@pytest.mark.parametrize(
    "make",
    [lambda: train_sentencepiece(split_by_whitespace=False, vocab_size=900), lambda: gpt_2_across_words()],
    ids=["sentencepiece", "gpt-2"],
)
def test_vocabularies_with_tokens_across_words_are_never_cut(
    make: Callable[[], bytes | tokenizers.Tokenizer], tmp_path: Path
) -> None:
    model = make()
    file = tmp_path / ("any.model" if isinstance(model, bytes) else "tokenizer.json")
    file.write_bytes(model if isinstance(model, bytes) else model.to_str().encode())
    main(["import", "--model", str(file), "--output", str(tmp_path / "t")])
    one = Tokenizer(tmp_path / "t")
    assert one.facts["cuttable"] is False
    np.testing.assert_array_equal(one.encode_in_pieces(TEXTS[0], 20), one.encode(TEXTS[0]))


def gpt_2_across_words() -> tokenizers.Tokenizer:
    """A byte-level vocabulary trained without splitting texts into words."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800,
        show_progress=False,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS[0].split("."), trainer)
    return tokenizer


def test_encoding_stays_in_one_thread(imported: dict[str, Tokenizer]) -> None:
    """In a separate process, since an existing thread pool would persist; with the variable set to allow threads."""
    script = (
        "import os, sys; from data_tools.tokenizer import Tokenizer\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "Tokenizer(sys.argv[1]).encode_batch(['some words of text ' * 50] * 200)\n"
        "print(before, len(os.listdir('/proc/self/task')))"
    )
    for kind in ("gpt-2", "sentencepiece"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(imported[kind].folder)],
            env=os.environ | {"TOKENIZERS_PARALLELISM": "true"},
            capture_output=True,
            text=True,
            check=True,
        )
        before, after = done.stdout.split()
        assert before == after
