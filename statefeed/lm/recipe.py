"""Recipes as text: YAML files, which may name a base file, and command-line flags that override them."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from statefeed.lm import migration, shipped
from statefeed.lm.atomic_file import write_text
from statefeed.lm.config import SECTIONS, Config
from statefeed.lm.errors import UsageError
from statefeed.lm.yaml_file import BASE, load_yaml

CONFIG, RECORD = "config.yaml", "record.json"  # files of a run folder
_OTHER_NAMES = {  # names of keys in other programs, for suggestions
    "learning_rate": "lr",
    "batch_size": "batch",
    "seq_len": "context",
    "block_size": "context",
    "bptt": "context",
    "hidden_size": "width",
    "d_model": "width",
    "dim": "width",
    "n_embd": "width",
    "embedding_size": "width",
    "num_layers": "layers",
    "n_layer": "layers",
    "grad_clip": "clip",
    "max_steps": "steps",
    "max_iters": "steps",
    "num_epochs": "epochs",
    "vocab_size": "vocabulary",
    "out_dir": "dir",
    "output_dir": "dir",
}


def parser(prog: str) -> ArgumentParser:
    """A parser with one flag for every field of every section.

    Flags are added one by one: jsonargparse reads the help of a dataclass from its docstring, but ours is in the
    field's metadata. Its own `--print_config` is disabled, because it also prints flags that are not part of a recipe.

    Args:
        prog: name of the command in the usage line.
    """
    flags = ArgumentParser(prog=prog, exit_on_error=False, allow_abbrev=False, print_config=None)
    for section, kind in SECTIONS.items():
        hints = get_type_hints(kind)
        group = flags.add_argument_group(section, kind.__doc__)
        for item in fields(kind):
            group.add_argument(
                f"--{section}.{item.name}", type=hints[item.name], default=item.default, help=item.metadata["help"]
            )
    return flags


def parse(flags: ArgumentParser, arguments: Sequence[str], path: str | Path | None = None) -> Namespace:
    """Parse the arguments of a command.

    Args:
        flags: the parser of the command.
        arguments: the words after the command.
        path: a recipe, whose values are the defaults of the flags.

    Raises:
        UsageError: an unknown flag, a missing value or a value of a wrong type, in the arguments or the recipe.
    """
    for word in arguments:
        _check_decimal(*word.removeprefix("--").partition("=")[::2])
    try:
        defaults = None if path is None else parser("").parse_object(read(expand(str(path))))
        return flags.parse_args(list(arguments), namespace=defaults)
    except ArgumentError as error:
        raise UsageError(_sentence(str(error), flags.get_defaults().keys())) from error


def _check_decimal(key: str, value: object) -> None:
    """Raise for a number in another notation, which YAML 1.1 reads as another number (1:30 as 90)."""
    section, _, name = key.partition(".")
    hint = get_type_hints(SECTIONS[section]).get(name) if section in SECTIONS else None
    is_number = {int, float} & {hint, *get_args(hint)} and str not in get_args(hint)
    if is_number and isinstance(value, str) and re.match(r"[-+]?(\d+:|0[xob])", value):
        raise UsageError(f"{key} must be a decimal number, got {value}")


def build(values: Namespace) -> Config:
    """Build the configuration from parsed flags.

    Raises:
        UsageError: a value is out of range.
    """
    for section in SECTIONS:
        for key, value in vars(values[section]).items():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UsageError(f"{section}.{key} must be below 2^63, got {value}")
    return Config(**{section: kind(**vars(values[section])) for section, kind in SECTIONS.items()})


def load(path: Path) -> Config:
    """Load the configuration from a YAML file.

    Raises:
        UsageError: the file is missing or invalid.
    """
    return build(parse(parser(""), [], path))


def read(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read the values of a recipe by section and key, merged over those of its base file.

    Args:
        path: a YAML file of sections, each a mapping of keys to values; `base: FILE` names another file in the same
            folder. In a run folder, the file has the rule names of the version that started the run.

    Raises:
        UsageError: the file is missing, is a folder, is not YAML, has a duplicate or unknown key, or has no sections;
            or the record of the run cannot be read.
    """
    sections = _sections(path)
    record = Path(path).with_name(RECORD)
    if Path(path).name == CONFIG and record.is_file():
        sections = migration.run_recipe(sections, _version(record))
    base = sections.pop(BASE, None)
    if base is None:
        return sections
    if not isinstance(base, str):
        raise UsageError(f"{BASE} of {path} must name a YAML file, got {base!r}")
    base_path = Path(path).parent / base
    values = _sections(base_path, path)
    if BASE in values:
        raise UsageError(f"{base_path} is the base of {path} and must not have a base itself, got {values[BASE]!r}")
    return {section: {**values.get(section, {}), **sections.get(section, {})} for section in {**values, **sections}}


def absolute(path: str | None) -> str | None:
    """The absolute path of a data.path; a name on the Hub is returned unchanged.

    Raises:
        UsageError: the path begins with the home folder of a user that does not exist.

    >>> absolute("hub:wikitext-2-v1"), absolute("/data/../story.txt")
    ('hub:wikitext-2-v1', '/story.txt')
    """
    return path if path is None or path.startswith("hub:") else os.path.abspath(expand(path))


def expand(path: str) -> Path:
    """A path with `~` and `~user` replaced by the home folder.

    Raises:
        UsageError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UsageError(f"{path} begins with a home folder that does not exist: name the folder itself") from None


def beside(folder: str, suffix: str) -> Path:
    """The folder beside another, with the same name and a suffix; the other may be `.` or `..`, or end in a slash.

    Raises:
        UsageError: the other is the root of the file system.

    >>> beside("runs/a/", "-2").as_posix()
    'runs/a-2'
    """
    path = expand(folder)
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    if not path.name:
        raise UsageError(f"there is no folder beside {path}: run.dir must name another folder")
    return path.with_name(path.name + suffix)


def change(path: Path, values: Mapping[str, Any], folder: Path) -> None:
    """Change single values in the recipe of a run; all other keys and values stay as its version wrote them.

    Args:
        path: path of the recipe.
        values: new values by section.key.
        folder: folder of the temporary file, in the same file system.
    """
    sections = load_yaml(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    write_text(path, yaml.safe_dump(sections, sort_keys=False, allow_unicode=True), folder)


def _version(record: Path) -> object:
    """The version of statefeed that started a run; None if its record does not contain it."""
    try:
        found = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{record} cannot be read: {error}") from error
    return found.get("statefeed") if isinstance(found, dict) else None


def _sections(path: str | Path, name: str | Path | None = None) -> dict[str, Any]:
    """The sections of one file, with checked and current keys; ``name`` is the recipe of which the file is the base."""
    try:
        found = load_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"the recipe {path} does not exist{shipped.hint(name or path)}") from None
    except IsADirectoryError:
        raise UsageError(f"the recipe {path} must be a YAML file, got a folder") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"the recipe {path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise UsageError(
            f"the recipe {path} must hold sections ({', '.join(SECTIONS)}), got {_short(found)}; text to train on is "
            "named by --data.corpus=text --data.path=FILE"
        )
    sections = migration.recipe(found)
    for section, values in sections.items():
        if section == BASE:
            continue
        if section not in SECTIONS:
            raise UsageError(f"unknown section {section!r} in {path}: expected one of {', '.join(SECTIONS)}")
        if not isinstance(values, dict):
            raise UsageError(f"section {section!r} of {path} must hold keys and values, got {_short(values)}")
        known = [f"{section}.{item.name}" for item in fields(SECTIONS[section])]
        if unknown := [key for key in values if f"{section}.{key}" not in known]:
            raise UsageError(f"{path}: {_unknown(f'{section}.{unknown[0]}', known)}")
        for key, value in values.items():
            _check_decimal(f"{section}.{key}", value)
    return sections


def _short(value: object) -> str:
    """The repr of a value for a message, truncated to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unknown(key: str, known: Iterable[str]) -> str:
    name, known = key.rpartition(".")[2], list(known)
    name = _OTHER_NAMES.get(name.replace("-", "_"), name)
    # Prefer the same name in another section, or the name in another program, to a similar spelling.
    matches = [k for k in known if k.rpartition(".")[2] == name] or difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key}" + (f": did you mean {matches[0]}?" if matches else "; --help lists every key")


def _sentence(message: str, known: Iterable[str]) -> str:
    """A message of jsonargparse, which has several lines, as one sentence.

    Args:
        message: the message.
        known: all valid keys.
    """
    if unknown := re.match(r"unrecognized arguments: --([^\s=]+)", message):
        return _unknown(unknown[1], known)
    names = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
    if wrong := re.match(r'Parser key "(.+?)":', message):
        choices = re.findall(r"Literal\[(.*?)\]", message)[:1] or [
            names.get(kind, kind) for kind in dict.fromkeys(re.findall(r"Expected a <class '(\w+)'>", message))
        ]
        got = re.findall(r"(?:Got|Given) value: (.*)", message)
        words = re.findall(r"'(.+?)'", " ".join(choices))
        near = difflib.get_close_matches(got[-1].lower(), words, n=1)
        hint = f": did you mean {near[0]}?" if near else ""
        return f"{wrong[1]} must be {' or '.join(choices)}, got {got[-1]}{hint}"
    return " ".join(message.split())
