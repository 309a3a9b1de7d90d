"""Reader of YAML recipes: decimal numbers, text fields kept as text, no duplicate keys."""

import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from statefeed.lm.config import SECTIONS

BASE = "base"  # the key of a recipe that names the file whose values it changes
_TEXT, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))


class _Loader(yaml.SafeLoader):
    """YAML loader that raises for duplicate keys and reads decimal numbers only, as in YAML 1.2.

    Dates, `12:30` for 750 and `010` for 8 are not numbers.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if duplicates := [key for i, key in enumerate(keys) if key in keys[:i]]:
            raise yaml.YAMLError(f"the key {duplicates[0]} is twice in one mapping")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?(0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.I
    ),
    list("-+0123456789."),
)


def load_yaml(text: str) -> Any:
    """The content of a YAML file; a text field keeps its text, so that 2024_05_01 can name a folder."""
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        for section, values in root.value if isinstance(root, yaml.MappingNode) else ():
            kind = SECTIONS.get(section.value)
            if kind is not None and isinstance(values, yaml.MappingNode):
                hints = get_type_hints(kind)
                for key, value in values.value:
                    if _takes_text(hints.get(key.value)):
                        _as_written(value)
        return None if root is None else loader.construct_document(root)
    finally:
        loader.dispose()


def _takes_text(hint: Any) -> bool:
    """Whether a key accepts text, or one of several words, and no number."""
    kinds = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    found = kinds or (hint,)
    return float not in found and any(kind is str or get_origin(kind) is Literal for kind in found)


def _as_written(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null":
        node.tag = _TEXT
