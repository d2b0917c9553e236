"""The published methods, one file a paper. Importing this package registers them as variants."""

from __future__ import annotations

from attnpatch.methods.alignment import Alignment
from attnpatch.methods.expressive import Elu, Expressive, Polynomial
from attnpatch.methods.neural import Linear, Neural
from attnpatch.methods.query_value import QueryValue
from attnpatch.methods.value_aware import TopR, ValueAware

__all__ = [
    "Alignment",
    "Elu",
    "Expressive",
    "Linear",
    "Neural",
    "Polynomial",
    "QueryValue",
    "TopR",
    "ValueAware",
]
