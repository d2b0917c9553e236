"""A Markdown page whose tables a program writes: what stands between `<!-- table NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
from collections.abc import Callable

_OPENED = re.compile(r"<!-- table .*")
# A marker that is not closed must not reach for the end of the next table: the page between would be lost.
_MARKED = re.compile(r"(<!-- table ([^\n]+?) -->\n)(?:(?!<!-- table ).)*?(<!-- end -->)", re.DOTALL)


def filled(page: str, table: Callable[[str], str], error: type[Exception], form: str = "NAME") -> str:
    """`page` with each table replaced by `table(NAME)`, which ends with a line break.

    Raises:
        error: the page has no marker, or one that is not closed; `form` tells how a name looks.
    """
    closed = {match.start() for match in _MARKED.finditer(page)}
    for opened in _OPENED.finditer(page):
        if opened.start() not in closed:
            line = 1 + page.count("\n", 0, opened.start())
            raise error(
                f"line {line} of the page, {opened[0]!r}, opens no table: its form is <!-- table {form} -->, "
                "alone on its line, with <!-- end --> behind it and before the next table"
            )
    if not closed:
        raise error(f"the page has no marker <!-- table {form} --> to write a table behind")
    return _MARKED.sub(lambda match: match[1] + table(match[2]) + match[3], page)
