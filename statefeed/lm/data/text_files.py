"""The user's files of text: which of a folder are read as which split, and what is in one."""

import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from statefeed.lm.errors import UsageError, notify

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {
    "train": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
_NULS = 0.05  # share of a text from which on it is another encoding or no text; none has any by intention


def split_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The files of a folder that are read, and a sentence about what is not.

    A name is that of a split where the word for it ends the name, or only a number comes after, as in `my.train.txt` or
    `valid-00.txt`, or where others have the same name but for that word, as `train_en.txt` and `valid_en.txt`.

    Returns:
        Files by split; where none names one, all files, to be read as one text.

    Raises:
        UsageError: when the folder holds no files, two of one split, or no file of a split that is needed.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    if not files:
        raise UsageError(f"data.path: the folder {folder} holds no files")
    patterns = {file: _pattern(file.name) for file in files}
    shapes = [found[1] for found in patterns.values() if found is not None]
    given: dict[str, Path] = {}
    for file, found in patterns.items():
        if found is None or not (_ends_in_split(found[1]) or shapes.count(found[1]) > 1):
            continue
        if found[0] in given:
            raise UsageError(f"data.path: {given[found[0]]} and {file} both call themselves the {found[0]} split")
        given[found[0]] = file
    if given and not {"train", "valid"} <= given.keys():
        missing = "train" if "train" not in given else "valid"
        raise UsageError(f"data.path: the folder {folder} has {', '.join(sorted(given))} but no {missing} file")
    read = list(given.values()) or files
    unpacked: dict[str, Path] = {}
    for file in read:
        name = file.stem if file.suffix in (".gz", ".xz") else file.name
        if name in unpacked:
            raise UsageError(
                f"data.path: {unpacked[name]} and {file} are the same file, one of them packed: remove one"
            )
        unpacked[name] = file
    if left := [entry.name + "/" * entry.is_dir() for entry in entries if entry not in read]:
        notify(f"data.path: of {folder} {_listed([file.name for file in read])} read; {_listed(left)} not read")
    return given, [] if given else files


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} {'is' if len(names) == 1 else 'are'}"


def _pattern(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that a file name names and its other parts, with an empty one for the split; None where it names none.

    >>> _pattern("my-validation.txt.gz"), _pattern("readme.txt")
    (('valid', ('my', '')), None)
    """
    parts = re.split(r"[._-]", re.sub(r"\.(gz|xz)$", "", name.lower()))
    if len(parts) > 1 and parts[-1] not in _SPLIT_NAMES and "." in name:
        parts = parts[:-1]  # the ending
    places = [place for place, part in enumerate(parts) if part in _SPLIT_NAMES]
    if not places:
        return None
    return _SPLIT_NAMES[parts[places[-1]]], (*parts[: places[-1]], "", *parts[places[-1] + 1 :])


def _ends_in_split(shape: Sequence[str]) -> bool:
    """Whether nothing but a number comes after the split, as in `train-00000-of-00001`."""
    after = shape[shape.index("") + 1 :]
    return not after or (after[-1].isdigit() and all(part.isdigit() or part == "of" for part in after))


def join(texts: Iterable[str]) -> str:
    r"""Several texts as one, each beginning at the start of a line.

    >>> join(["alpha", "beta\n", "gamma"])
    'alpha\nbeta\ngamma'
    """
    parts = list(texts)
    ended = [part if part.endswith("\n") else part + "\n" for part in parts[:-1]]
    return "".join([*ended, *parts[-1:]])


def decode(path: Path) -> str:
    """The text of one file, unpacked where its name ends in .gz or .xz.

    Raises:
        UsageError: when it cannot be unpacked, is empty, or is not UTF-8 text.
    """
    raw = _unpack(path)
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")  # the mark that Windows editors put at the start of a file
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start} cannot be decoded"
        ) from error
    if not text.strip():
        raise UsageError(f"{path} is empty: expected UTF-8 text")
    if (nuls := text.count("\0")) > _NULS * len(text):
        raise UsageError(
            f"{path} is not UTF-8 text: {nuls:,} of its {len(text):,} characters are NUL, as in UTF-16 or UTF-32; "
            "convert it with iconv -t UTF-8"
        )
    if "\r" in text and "\n" not in text:
        notify(f"{path} has line ends of CR alone, which are read as spaces of one long line: convert them to LF")
    return text


def _unpack(path: Path) -> bytes:
    """The bytes of a file, unpacked.

    Raises:
        UsageError: when it is not what its ending says, as a whole.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(raw)
        return _unpack_xz(raw) if path.suffix == ".xz" else raw
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UsageError(f"{path} cannot be unpacked as {path.suffix}: {error}") from error


def _unpack_xz(raw: bytes) -> bytes:
    """As `lzma.decompress`, which ignores what comes after the last stream."""
    unpacked = b""
    while raw:
        stream = lzma.LZMADecompressor()
        unpacked += stream.decompress(raw)
        if not stream.eof:
            raise lzma.LZMAError("it ends before the end-of-stream marker")
        raw = stream.unused_data.lstrip(b"\0")  # streams may be padded
    return unpacked
