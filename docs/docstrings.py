"""Read the docstrings' cross-references and examples as mkdocstrings writes them (an extension of griffe)."""

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:func|class|meth|data|mod|attr):`~?([^`]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(Extension):
    """Turn ``:func:`name``` into ``name``, and the section ``Example`` into the one that shows doctests as code."""

    def on_instance(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of one object, if it has one."""
        if obj.docstring is not None:
            text = _ROLE.sub(lambda found: f"`{found[1].removeprefix('vitfeats.')}`", obj.docstring.value)
            obj.docstring.value = _EXAMPLE.sub("Examples:", text)
