"""Notices to the person who runs a program: one line, once."""

import logging
from functools import cache


@cache
def notice_once(text: str) -> None:
    """Log a warning, the first time: a line on stderr, unless the program has set up logging otherwise."""
    logging.getLogger("fulmen").warning(text)
