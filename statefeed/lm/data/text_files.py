"""The user's text files: which files of a folder are which split, and the text of a file."""

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
_MAX_NUL_FRACTION = 0.05  # of a text; more NUL characters mean another encoding, or no text


def split_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Find the files of a folder to read, and print a notice about the others.

    A file name names a split if it ends in the word for the split, optionally followed by a number, as in
    `my.train.txt` or `valid-00.txt`, or if another file has the same name except for that word, as `train_en.txt` and
    `valid_en.txt`.

    Returns:
        Files by split, and the files to read as one text if no file name names a split.

    Raises:
        UsageError: the folder holds no files, two files of one split, or no train or valid file.
    """
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    if not files:
        raise UsageError(f"data.path: the folder {folder} holds no files")
    patterns = {file: _pattern(file.name) for file in files}
    shapes = [found[1] for found in patterns.values() if found is not None]
    by_split: dict[str, Path] = {}
    for file, found in patterns.items():
        if found is None or not (_ends_in_split(found[1]) or shapes.count(found[1]) > 1):
            continue
        if found[0] in by_split:
            raise UsageError(f"data.path: {by_split[found[0]]} and {file} are both named as the {found[0]} split")
        by_split[found[0]] = file
    if by_split and not {"train", "valid"} <= by_split.keys():
        missing = "train" if "train" not in by_split else "valid"
        raise UsageError(f"data.path: the folder {folder} has {', '.join(sorted(by_split))} but no {missing} file")
    read = list(by_split.values()) or files
    unpacked: dict[str, Path] = {}
    for file in read:
        name = file.stem if file.suffix in (".gz", ".xz") else file.name
        if name in unpacked:
            raise UsageError(
                f"data.path: {unpacked[name]} and {file} are the same file, one of them packed: remove one"
            )
        unpacked[name] = file
    if unread := [entry.name + "/" * entry.is_dir() for entry in entries if entry not in read]:
        notify(f"data.path: of {folder} {_listed([file.name for file in read])} read; {_listed(unread)} not read")
    return by_split, [] if by_split else files


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5:,} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more} {'is' if len(names) == 1 else 'are'}"


def _pattern(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that a file name names, and the parts of the name with "" for the split; None if it names no split.

    >>> _pattern("my-validation.txt.gz"), _pattern("readme.txt")
    (('valid', ('my', '')), None)
    """
    parts = re.split(r"[._-]", re.sub(r"\.(gz|xz)$", "", name.lower()))
    if len(parts) > 1 and parts[-1] not in _SPLIT_NAMES and "." in name:
        parts = parts[:-1]  # the suffix
    positions = [i for i, part in enumerate(parts) if part in _SPLIT_NAMES]
    if not positions:
        return None
    return _SPLIT_NAMES[parts[positions[-1]]], (*parts[: positions[-1]], "", *parts[positions[-1] + 1 :])


def _ends_in_split(shape: Sequence[str]) -> bool:
    """Whether at most a number follows the split, as in `train-00000-of-00001`."""
    after = shape[shape.index("") + 1 :]
    return not after or (after[-1].isdigit() and all(part.isdigit() or part == "of" for part in after))


def join(texts: Iterable[str]) -> str:
    r"""Join several texts, each beginning at the start of a line.

    >>> join(["alpha", "beta\n", "gamma"])
    'alpha\nbeta\ngamma'
    """
    parts = list(texts)
    ended = [part if part.endswith("\n") else part + "\n" for part in parts[:-1]]
    return "".join([*ended, *parts[-1:]])


def decode(path: Path) -> str:
    """The text of one file, decompressed if its name ends in .gz or .xz.

    Raises:
        UsageError: the file cannot be decompressed, is empty, or is not UTF-8 text.
    """
    raw = _unpack(path)
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")  # the byte order mark that Windows editors write
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset {error.start} cannot be decoded"
        ) from error
    if not text.strip():
        raise UsageError(f"{path} is empty: expected UTF-8 text")
    if (nuls := text.count("\0")) > _MAX_NUL_FRACTION * len(text):
        raise UsageError(
            f"{path} is not UTF-8 text: {nuls:,} of its {len(text):,} characters are NUL, as in UTF-16 or UTF-32; "
            "convert it with iconv -t UTF-8"
        )
    if "\r" in text and "\n" not in text:
        notify(f"{path} has CR line ends, which are read as spaces within one long line: convert them to LF")
    return text


def _unpack(path: Path) -> bytes:
    """The decompressed bytes of a file.

    Raises:
        UsageError: the file is not in the format of its suffix, or is truncated.
    """
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            return gzip.decompress(raw)
        return _unpack_xz(raw) if path.suffix == ".xz" else raw
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise UsageError(f"{path} cannot be unpacked as {path.suffix}: {error}") from error


def _unpack_xz(raw: bytes) -> bytes:
    """Decompress all streams of an xz file; unlike `lzma.decompress`, raise for data after the last stream."""
    unpacked = b""
    while raw:
        stream = lzma.LZMADecompressor()
        unpacked += stream.decompress(raw)
        if not stream.eof:
            raise lzma.LZMAError("it ends before the end-of-stream marker")
        raw = stream.unused_data.lstrip(b"\0")  # streams may be padded
    return unpacked
