"""Style: the habits of a repository, seen in its earlier files, make its later files predictable.

A made-up language, token by token. Every repository draws its habits: which word it has for each verb and each noun,
how names are cased, how deep a block is indented, which quotes, whether statements end in a semicolon, whether
functions have a docstring. Files are drawn from one grammar; what a function does is new every time, how it is written
never.

A level is the number of files written before. Asked for are the tokens that only habits decide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..episodes import Episode, Integers, ignored

_PUNCTUATION = ("def", "return", "(", ")", ":", "end")
_CHOICES = {"case": 4, "indent": 3, "quote": 3, "terminator": 2, "docstring": 2}


@dataclass(frozen=True)
class Style:
    """Repositories of made-up code.

    Args:
        verbs, nouns: concepts that functions are about.
        synonyms: words for each concept; a repository always takes the same one.
        functions: of a file.
    """

    verbs: int = 8
    nouns: int = 8
    synonyms: int = 4
    functions: int = 4

    @property
    def vocab_size(self) -> int:
        """Concepts (as types and comments name them), their words, habits' tokens and punctuation."""
        return self._first_word + (self.verbs + self.nouns) * self.synonyms

    @property
    def _first_word(self) -> int:
        return len(_PUNCTUATION) + sum(_CHOICES.values()) + self.verbs + self.nouns

    def episode(self, rng: np.random.Generator, level: int, batch: int) -> Episode:
        """Repositories with `level` files to write and one to predict."""
        rows = [self._repository(rng, level) for _ in range(batch)]
        context = np.stack([np.concatenate([tokens for tokens, _ in files[:-1]]) for files in rows])
        last = np.stack([files[-1][0] for files in rows])
        labels = ignored(*last.shape)
        habitual = np.stack([files[-1][1] for files in rows])[:, 1:]
        labels[:, :-1][habitual] = last[:, 1:][habitual]
        return Episode(context, last, labels, 1)

    def _repository(self, rng: np.random.Generator, level: int) -> list[tuple[Integers, Integers]]:
        habits = {name: int(rng.integers(count)) for name, count in _CHOICES.items()}
        words = rng.integers(self.synonyms, size=self.verbs + self.nouns)
        return [self._file(rng, habits, words) for _ in range(level + 1)]

    def _file(self, rng: np.random.Generator, habits: dict[str, int], words: Integers) -> tuple[Integers, Integers]:
        """Tokens, and where only habits decide."""
        tokens: list[tuple[int, bool]] = []
        for _ in range(self.functions):
            tokens += self._function(rng, habits, words)
        ids, habitual = zip(*tokens, strict=True)
        return np.array(ids, dtype=np.int64), np.array(habitual, dtype=bool)

    def _function(self, rng: np.random.Generator, habits: dict[str, int], words: Integers) -> list[tuple[int, bool]]:
        """`VERB def case VERB verb NOUN noun ( NOUN noun ) : indent docstring quote return terminator end`.

        What it does is said in concepts (capitals); the word after a concept, and everything else in small letters
        that is no punctuation, follows from the repository's habits.
        """
        verb, noun, argument = int(rng.integers(self.verbs)), *(self.verbs + rng.integers(self.nouns, size=2))
        concept = len(_PUNCTUATION) + sum(_CHOICES.values())

        def word(index: int) -> tuple[int, bool]:
            return self._first_word + index * self.synonyms + int(words[index]), True

        def plain(text: str) -> tuple[int, bool]:
            return _PUNCTUATION.index(text), False

        def habit(name: str) -> tuple[int, bool]:
            before = list(_CHOICES)[: list(_CHOICES).index(name)]
            return len(_PUNCTUATION) + sum(_CHOICES[b] for b in before) + habits[name], True

        return [
            (concept + verb, False), plain("def"), habit("case"), (concept + verb, False), word(verb),
            (concept + int(noun), False), word(int(noun)), plain("("), (concept + int(argument), False),
            word(int(argument)), plain(")"), plain(":"), habit("indent"), habit("docstring"), habit("quote"),
            plain("return"), habit("terminator"), plain("end"),
        ]  # fmt: skip
