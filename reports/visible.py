"""Characters that are not seen, spelled out: no name can turn or hide the text around it."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

# Characters that are not seen and change what is: of direction, without width, of control, halves of one.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def visible(value: Any) -> Any:
    """A text with what is not seen in it spelled out, so that no name can turn the text around it.

    >>> visible("a\\u202eb"), visible("a b"), visible(3)
    ('a\\\\u202eb', 'a b', 3)
    """
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return _UNSEEN.sub(lambda found: f"\\u{ord(found.group()):04x}", value)
