"""The default embedder: wordllama, offline, in a thread of the worker."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.util
import os
import re
from array import array
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final

from ..errors import BadInput
from .types import Vectors

DIMENSIONS: Final = 256
MODEL: Final = "l2_supercat"
KNOWN_MARK: Final = "069a33a1"  # of wordllama 0.4.0, whose vectors have no mark in their name
_TOKENIZER: Final = f"{MODEL}_tokenizer_config.json"
WORDS_MAX: Final = 32_768  # whose tokens are remembered, about 6 MB; then all are forgotten
WORD_CHARS_MAX: Final = 64  # of such a word
# No token of the model spans the border between a character and a blank or line end after it: words are cut there.
_WORDS = re.compile(r"[ \n]+[^ \n]*")
_BLANK = "\u2581"  # the tokenizer's form of a blank
_SPECIAL = re.compile("<s>|</s>|<unk>")  # the tokenizer cuts the text there first


class WordLlamaEmbedder:
    """wordllama's model of its own package: 0.1 ms of CPU a chunk, no network. `dimensions`: 64, 128 or 256.

    The model is loaded with the first texts, which takes 0.3 s. All tenants' texts may be embedded together. Raises
    BadInput if the package is missing.
    """

    by_tenant = False
    texts_max = 64  # in a call: 10 ms, for which a question may wait; more would save nothing

    def __init__(self, dimensions: int = DIMENSIONS) -> None:
        if dimensions not in (64, 128, 256):
            raise BadInput(f"dimensions must be 64, 128 or 256, not {dimensions!r}")
        self._dimensions = dimensions
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="aiqueue-rag-embed")
        self._model: Any = None

    @property
    def name(self) -> str:
        """Which vectors may be compared. Another model, in a later version of the package, has another name."""
        mark = _mark_of(home) if (home := _home()) is not None else KNOWN_MARK
        return f"wordllama-{self._dimensions}" + ("" if mark == KNOWN_MARK else f"-{mark}")

    @property
    def dimensions(self) -> int:
        return self._dimensions

    async def embed(self, texts: Sequence[str], *, tenant: str) -> Vectors:
        """Return a vector of length 1 for each text, and one of zeros for a text without a word."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._embed, list(texts))

    async def close(self) -> None:
        """End the thread. Safe twice."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _embed(self, texts: list[str]) -> Vectors:
        import numpy as np  # noqa: PLC0415  (loaded where it is needed)

        if self._model is None:
            self._model = _WordModel(_load(self._dimensions))
        means = self._model.means([each.encode("utf-8", "replace").decode() for each in texts])  # no lone surrogates
        lengths = np.linalg.norm(means, axis=1, keepdims=True)
        vectors: Vectors = np.divide(means, lengths, out=np.zeros_like(means), where=lengths > 0)
        return vectors


class _WordModel:
    """The mean of the vectors of a text's tokens, as `WordLlama.embed` returns it, in a fraction of its time.

    Its tokenizer takes half of that, and words come again: their tokens are remembered. It also pads all texts of a
    batch to the longest.
    """

    def __init__(self, model: Any) -> None:
        self._tokenizer = model.tokenizer
        self._tokenizer.no_padding()
        self._vectors = model.embedding
        self._known: dict[str, bytes] = {}  # the tokens of words, as numbers of 16 bits: there are 32,000

    def means(self, texts: Sequence[str]) -> Vectors:
        """Return the means, of shape (texts, dimensions); zeros for a text without a token."""
        import numpy as np  # noqa: PLC0415  (loaded where it is needed)

        means = np.zeros((len(texts), self._vectors.shape[1]), np.float32)
        for row, tokens in enumerate(self._tokens(texts)):
            if tokens:
                means[row] = self._vectors.take(np.frombuffer(tokens, np.uint16), axis=0).mean(axis=0, dtype=np.float32)
        return means

    def _tokens(self, texts: Sequence[str]) -> list[bytes]:
        words_of_texts = [_words(each) for each in texts]
        wanted = {word for words in words_of_texts for word in words}
        if len(self._known) >= WORDS_MAX:
            self._known.clear()
        known = self._known
        new = [word for word in wanted if word not in known]
        encoded = dict(zip(new, self._encode(new), strict=True))
        known.update((word, tokens) for word, tokens in encoded.items() if len(word) <= WORD_CHARS_MAX)
        return [
            b"".join(encoded[word] if word in encoded else known[word] for word in words) for words in words_of_texts
        ]

    def _encode(self, words: Sequence[str]) -> list[bytes]:
        """Return the tokens of words as `_words` returns them. The tokenizer puts a blank before each text."""
        bare = [word.removeprefix(" ") or "\n" for word in words]
        tokens = [each.ids for each in self._tokenizer.encode_batch_fast(bare, add_special_tokens=False)]
        for place, word in enumerate(words):
            if word == " ":
                del tokens[place][1:]
            elif word[0] == "\n":
                del tokens[place][0]
        return [array("H", each).tobytes() for each in tokens]


def _words(text: str) -> list[str]:
    """Return the parts of a text that the tokenizer can be given one by one, each with the blanks before it."""
    if not text or _SPECIAL.search(text):
        return [f" {text}"] if text else []
    return _WORDS.findall(f" {text.replace(_BLANK, ' ')}")


def _home() -> Path | None:
    """Return the directory of the package; None: it is missing."""
    found = importlib.util.find_spec("wordllama")
    return Path(found.origin).parent if found is not None and found.origin else None


@cache
def _mark_of(home: Path) -> str:
    """Return a mark of the model's files: of their sizes and first MiB, for any change of a model shows there."""
    told = hashlib.sha256()
    for each in (home / "weights" / f"{MODEL}_{DIMENSIONS}.safetensors", home / "tokenizers" / _TOKENIZER):
        with contextlib.suppress(OSError), each.open("rb") as file:
            told.update(b"%d " % each.stat().st_size + file.read(1024**2))
    return told.hexdigest()[:8]


def _load(dimensions: int) -> Any:
    try:
        import wordllama  # noqa: PLC0415
    except ImportError as error:
        raise BadInput(f"wordllama is missing ({error.name}): pip install 'aiqueue[rag]'") from None
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would wait for each other at each few words
    home = Path(wordllama.__file__).parent
    trunc = None if dimensions == DIMENSIONS else dimensions
    return wordllama.WordLlama.load(MODEL, cache_dir=home, dim=DIMENSIONS, trunc_dim=trunc, disable_download=True)
