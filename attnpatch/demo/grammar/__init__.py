"""A built-in German-English grammar: synthetic parallel text for demos and tests, without any download.

An abstract sentence is drawn by `sample`, and `german` and `english` each realise it by their own rules from
the explicit forms of the lexicon (`nouns`, `verbs`).
"""

from .corpus import SYNTHETIC_NOTICE, GrammarError, Pair, capacity, generate, stream, write_corpus

__all__ = ["SYNTHETIC_NOTICE", "GrammarError", "Pair", "capacity", "generate", "stream", "write_corpus"]
