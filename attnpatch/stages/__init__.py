"""The five stages of attention: what each one is, and its stock form.

project -> score -> select -> aggregate -> regularise. A variant replaces exactly one of them.
"""

from __future__ import annotations

STAGES = ("project", "score", "select", "aggregate", "regularise")
"""Stage names in the order in which attention runs them."""
