"""SentencePiece models, trained here or published."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from diladiff_jax.data.errors import DataError
from diladiff_jax.data.options import TRAINED
from diladiff_jax.data.tokenizers.base import Tokenizer

"""The kinds of tokenizer that can be trained."""

SPACE_SYMBOL = "\N{LOWER ONE EIGHTH BLOCK}"
"""U+2581, which SentencePiece writes for a space."""


class SentencePiece(Tokenizer):
    """A SentencePiece model.

    Models that `train` made are lossless; published ones apply their own normalization.
    """

    def __init__(self, kind: str, lowercase: bool, vocabulary: Mapping[str, bytes]):
        import sentencepiece

        try:
            model = sentencepiece.SentencePieceProcessor(
                model_proto=vocabulary["sentencepiece.model"]
            )
            size = model.vocab_size()
        except (RuntimeError, TypeError) as error:
            raise DataError(f"sentencepiece.model: not a SentencePiece model ({error})") from error
        super().__init__(
            kind,
            lowercase,
            vocabulary,
            size,
            {
                "pad": model.pad_id() if model.pad_id() >= 0 else None,
                "mask": None,
                "eot": model.eos_id() if model.eos_id() >= 0 else None,
            },
            # Trained models spell unknown characters in bytes. Published ones may write <unk>,
            # which is then text like any other.
            [
                i
                for i in range(size)
                if model.is_control(i)
                or model.is_unused(i)
                or (model.is_unknown(i) and kind in TRAINED)
            ],
        )
        self._model = model
        self._writes_spaces = kind in TRAINED
        self._block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        self._space = model.piece_to_id("<0x20>")
        self._lacks_space = kind in TRAINED and model.piece_to_id(SPACE_SYMBOL) == model.unk_id()

    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        if self.kind not in TRAINED:
            return self._model.encode(texts)
        # The first word of a document gets a space before it like the others, so that it does not
        # need a second piece.
        texts = [" " + t if initial and t else t for t in texts]
        # SentencePiece would decode U+2581 as a space. Spelled in bytes, it is decoded as itself.
        parts = [t.split(SPACE_SYMBOL) for t in texts]
        encoded = map(self._spaced, self._model.encode(list(itertools.chain.from_iterable(parts))))
        joined = []
        for part in parts:
            ids = list(next(encoded))
            for _ in part[1:]:
                ids += self._block
                ids += next(encoded)
            joined.append(ids)
        return joined

    def _spaced(self, ids: list[int]) -> list[int]:
        """Replaces the bytes of U+2581 by those of a space, in the ids of text without U+2581.

        SentencePiece writes spaces as U+2581. A vocabulary without a piece for it spells it in
        bytes, which would be decoded as U+2581 rather than as a space.
        """
        if not self._lacks_space:
            return ids
        found: list[int] = []
        for i in ids:
            found.append(i)
            if found[-len(self._block) :] == self._block:
                found[-len(self._block) :] = [self._space]
        return found

    def _decode(self, ids: list[int], initial: bool) -> str:
        text = self._model.decode(ids) if ids else ""
        return text.removeprefix(" ") if initial and self.kind in TRAINED else text

    def _piece(self, index: int) -> str:
        return self._model.id_to_piece(index)
