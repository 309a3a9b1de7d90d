"""YAML files of recipes: plain numbers, text as it is written, no key twice."""

import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from statefeed.lm.config import SECTIONS

_TEXT, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float"))


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice in a mapping is an error, and numbers are decimal, as YAML 1.2 has it.

    There are no dates, no `12:30` for 750 and no `010` for 8.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, form) for tag, form in forms if tag not in (_INT, _FLOAT, "tag:yaml.org,2002:timestamp")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for place, key in enumerate(keys) if key in keys[:place]]:
            raise yaml.YAMLError(f"the key {twice[0]} stands twice in one mapping")
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
    """What a YAML file holds; text is what is written, so that 2024_05_01 names a folder."""
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
    """Whether a key takes text, or one of some words, and no number."""
    kinds = get_args(hint) if get_origin(hint) is not Literal else (hint,)
    found = kinds or (hint,)
    return float not in found and any(kind is str or get_origin(kind) is Literal for kind in found)


def _as_written(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null":
        node.tag = _TEXT
