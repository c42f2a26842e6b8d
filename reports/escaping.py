"""Texts that others wrote, made inert for Markdown: on one line, shown as they are, acting on nothing."""

from __future__ import annotations

import re

from reports.visible import visible

# What Markdown, or GitHub's kind of it, reads: markup, elements, mentions, issue numbers, bare addresses.
_SPECIAL = re.compile(r"[\\`*_{}\[\]()<>#!|~&@$^]|:(?=\S)|(?<=www)\.", re.IGNORECASE)


def escape_markdown(value: str) -> str:
    """A text as one line that Markdown shows as it is.

    >>> escape_markdown("a|b <i>@you</i> 1.5")
    'a&#124;b &#60;i&#62;&#64;you&#60;/i&#62; 1.5'
    """
    # Numbers of characters, since a backslash escapes neither a mention nor a bare address.
    line = " ".join(str(visible(value)).split())
    return _SPECIAL.sub(lambda found: f"&#{ord(found.group())};", line)
