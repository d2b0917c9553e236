"""The families that attnpatch can rewrite. Importing this package registers the built-in ones."""

from __future__ import annotations

from attnpatch.families.bert import BERT
from attnpatch.families.marian import MARIAN
from attnpatch.families.roberta import ROBERTA

__all__ = ["BERT", "MARIAN", "ROBERTA"]
