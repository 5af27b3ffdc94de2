"""Griffe reads ``Examples:`` as a section of code, but ``Example:`` as a box of prose."""

import re

import griffe


class ExampleSections(griffe.Extension):
    """Reads ``Example:`` in a docstring as ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for each module, class, function and attribute that was parsed."""
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
