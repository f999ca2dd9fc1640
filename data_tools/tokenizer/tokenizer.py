"""Open a tokenizer folder, and encode and decode with it."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np

from data_tools.tokenizer.encoders import make_encoder, tokenizer_hash
from data_tools.tokenizer.facts import FACTS_FILE, MODEL_FILES, REWRITE, facts_path, read_facts, remove_old_facts
from data_tools.tokenizer.gigatoken_encoder import GigatokenEncoder, UnusableError
from data_tools.tokenizer.pieces import SPACE_MARK, cut
from data_tools.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from lime_dist.data.files import write_atomic
from lime_dist.errors import LimeError

PIECE_CHARACTERS = 1 << 20
"""Longer texts are encoded in pieces of at most this many characters."""


class Tokenizer:
    """Converts text to ids and back.

    Args:
        verify: compare the pieces with their hash. Without it, only the model file is compared with its own, which takes a tenth
            of the time and is enough if another process has just opened the folder.

    Attributes:
        vocab_size: the highest id + 1.
        bos_id, eos_id, pad_id: -1 for a token that the tokenizer does not have.
        hash: equal for tokenizers that produce the same ids.
        exact: False if it was imported with ``--allow-loss``, so that some texts do not survive encoding and decoding.
        facts: the content of the facts file.

    Raises:
        LimeError: a file is missing, or the model does not match the hashes in the facts.
    """

    def __init__(self, folder: str | Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        path = facts_path(self.folder)
        self.facts = read_facts(path)
        model_path = self.folder / MODEL_FILES[self.facts["kind"]]
        if not model_path.is_file():
            raise LimeError(f"{model_path}: missing, although {path.name} exists; {REWRITE}")
        model = model_path.read_bytes()
        if hashlib.sha256(model).hexdigest() != self.facts["model_sha256"]:
            raise LimeError(f"{model_path}: its content does not match the hash in {path.name}; {REWRITE}")
        try:
            self._encoder = make_encoder(self.facts["kind"], model)
        except (RuntimeError, ValueError) as error:
            raise LimeError(f"{model_path}: cannot be opened ({error}); {REWRITE}") from None
        self.vocab_size: int = self._encoder.vocab_size
        special_ids = {name: self.facts[f"{name}_id"] for name in ("bos", "eos", "pad")}
        self.hash: str = tokenizer_hash(self._encoder, special_ids) if verify else self.facts["hash"]
        if self.hash != self.facts["hash"] or self.vocab_size != self.facts["vocab_size"]:
            raise LimeError(f"{model_path}: its pieces do not match the hash in {path.name}; {REWRITE}")
        self.bos_id, self.eos_id, self.pad_id = special_ids.values()
        self._special_ids = list(special_ids.values())
        self.exact: bool = self.facts["exact"]
        self._cut_rule = self._encoder.cut_rule if self.facts["cuttable"] else None
        self._mark_ids = self._space_mark_ids()
        self._reference: Tokenizer | None = None

    @property
    def encoder_name(self) -> str:
        """The library that encodes: sentencepiece, gigatoken, or tokenizers for a Hugging Face tokenizer."""
        return self._encoder.name

    def with_gigatoken(self, converted: str | None = None) -> Tokenizer:
        """This tokenizer, with gigatoken as its encoder.

        Args:
            converted: `converted_model` of an equal tokenizer; None: it is computed.

        Raises:
            UnusableError: gigatoken is not installed, or cannot encode as this tokenizer does.
        """
        if not isinstance(self._encoder, SentencePieceEncoder):
            raise UnusableError("it encodes only with sentencepiece models here")
        fast = copy.copy(self)
        fast._encoder, fast._reference = GigatokenEncoder(self._encoder.data, converted), self
        return fast

    @property
    def converted_model(self) -> str | None:
        """The model as gigatoken reads it, if that is the encoder."""
        return self._encoder.converted if isinstance(self._encoder, GigatokenEncoder) else None

    def whole_tokens(self) -> list[str]:
        """The tokens that are never merged with others: special ones, and those that are split off a text first."""
        return self._encoder.whole_tokens()

    def is_right(self, text: str, ids: np.ndarray) -> bool:
        """Whether sentencepiece encodes a text as ``ids``; always, if the encoder is not gigatoken."""
        return self._reference is None or np.array_equal(ids, self._reference.encode(text))

    def _space_mark_ids(self) -> np.ndarray | None:
        """Ids int32 [3] of the space mark's bytes, which decode to the mark itself.

        None if the mark survives without them, or if the vocabulary has no bytes.
        """
        ids = [self._encoder.token_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        known_ids = [token_id for token_id in ids if token_id is not None]
        decoded = self._encoder.decode(self._encoder.encode_batch([f"a{SPACE_MARK}"])[0].tolist())
        if len(known_ids) < len(ids) or decoded == f"a{SPACE_MARK}":
            return None
        return np.asarray(known_ids, dtype=np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [tokens] of a text, without bos and eos.

        Raises:
            UnicodeEncodeError: the text has a lone surrogate.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids int32 [tokens] of each text; about twice as fast as single calls. 64 texts per call are enough.

        A special token's text in a document becomes ordinary ids. Texts longer than ``PIECE_CHARACTERS`` are encoded in
        pieces. Their ids equal those of the whole text if each piece has a place to cut (see `pieces`), in unigram
        models up to the order within runs of one character, which depends on rounding. They always decode to the text.
        """
        plain_texts = [text for text in texts if self._is_plain(text)]
        try:
            ids = iter(self._encoder.encode_batch(plain_texts) if plain_texts else [])
            return [next(ids) if self._is_plain(text) else self.encode_in_pieces(text) for text in texts]
        except TypeError:  # how the libraries report a lone surrogate; raise a clearer error
            "".join(texts).encode()
            raise

    def _is_plain(self, text: str) -> bool:
        return len(text) <= PIECE_CHARACTERS and (SPACE_MARK not in text or self._mark_ids is None)

    def encode_in_pieces(self, text: str, limit: int | None = None) -> np.ndarray:
        """Ids int32 [tokens] of a text, cut at space marks and into pieces of ``limit`` characters (PIECE_CHARACTERS)."""
        ids: list[np.ndarray] = []
        for i, part in enumerate([text] if self._mark_ids is None else text.split(SPACE_MARK)):
            if i and self._mark_ids is not None:
                ids.append(self._mark_ids)
            rule = self._cut_rule
            for piece in cut(part, limit or PIECE_CHARACTERS, rule) if rule else [part]:
                if piece:
                    ids.append(self._encoder.encode_middle(piece) if ids else self._encoder.encode_batch([piece])[0])
        return np.concatenate(ids) if ids else np.empty(0, dtype=np.int32)

    def decode(self, ids: np.ndarray | list[int]) -> str:
        """The text of ids [tokens]; bos, eos and pad decode to nothing.

        Raises:
            LimeError: an id is outside the vocabulary.
        """
        array = np.asarray(ids)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise LimeError(
                f"token ids {array.min()}..{array.max()} are outside the vocabulary of {self.vocab_size} in "
                f"{self.folder}; use the tokenizer that produced them"
            )
        return self._encoder.decode(array[~np.isin(array, self._special_ids)].tolist())

    def copy_to(self, folder: Path) -> None:
        """Copy the model file and then the facts into a folder, and remove what another tokenizer left there."""
        folder.mkdir(parents=True, exist_ok=True)
        model_file = MODEL_FILES[self.facts["kind"]]
        write_atomic(folder / model_file, (self.folder / model_file).read_bytes())
        write_atomic(folder / FACTS_FILE, facts_path(self.folder).read_bytes())
        for other_file in set(MODEL_FILES.values()) - {model_file}:
            (folder / other_file).unlink(missing_ok=True)
        remove_old_facts(folder)
