"""Local data files -> (where, row): JSON lines, a JSON list (plain or wrapped in one dict), CSV (with
commas, semicolons or tabs), each also gzipped, and Parquet.

It is a reader of our own because every error must name the place: `where` is "path:line", the line on which
the row starts, and "row 17 of path" in a JSON list, "path:row 17" in Parquet, counted from 1.
"""
import csv
import difflib
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import zlib
from pathlib import Path

from data.columns import KNOWN
from data.errors import UserError, notice

MAGIC = {      # the first bytes of files that are often taken for data
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"BZh9": "a bzip2 archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a": "a rar archive",
    b"\x1f\x8b": "gzip within gzip",
    b"%PDF-": "a PDF",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"SQLite format 3\0": "an SQLite database",
    b"ARROW1\0": "an Arrow file",
    b"PAR1\x15": "a Parquet file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x02": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"version https://git-lfs": "a pointer of Git LFS",
}
FIXES = {
    "a Parquet file": "name it .parquet",
    "an Arrow file": "name the directory that save_to_disk wrote, or convert it to JSON lines",
    "a web page": "download the file itself, not the page that shows it",
    "a pointer of Git LFS": "git lfs pull",
}
WINDOW = 2 ** 26      # bytes unpacked from a gzip file, for which about 1 / RATIO of it must have been read
RATIO = 200           # text with the same page in every row reaches 140, zeros reach 1,030
AT_ONCE = 2 ** 17     # bytes that Python reads of a gzip file before it needs them
PARQUET_RATIO = 1000
OF_MESSAGES = {"role", "from", "human", "assistant"}      # keys of a message, in each notation
SUFFIXES = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet", ".gz")


def read_rows(path, base=None):
    """Yield (where, row: dict) for every row of a local data file.

    `base` is the YAML's folder, only used to say so when the file is missing here but exists there. Raises
    UserError for a missing, empty, cut off or malformed file, text that is not UTF-8 and rows that are not
    objects.
    """
    path = find_file(path, base)
    rows = 0
    try:
        for where, row in _reader(path)(path):
            if not isinstance(row, dict):
                raise UserError(f"a row is not an object but {kind_of(row)} in {where}; "
                                'fix: make every row an object such as {"prompt": "...", "response": "..."}')
            rows += 1
            yield where, row
    except EOFError:
        raise UserError(f"the gzip file seems cut off: {path}; fix: copy or download it again") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"the gzip file is corrupt ({error}): {path}; "
                        "fix: copy or download it again") from None
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot read {path} ({reason}); fix: check the file and its permissions") from None
    if not rows:
        raise UserError(f"the file is empty, no rows in {path}; fix: put at least one row into it")


def find_file(path, base=None):
    """The data file that `path` means; UserError if there is none."""
    path = Path(path)
    if path.exists():
        return path
    if base is not None and not path.is_absolute() and (Path(base) / path).exists():
        raise UserError(f"no file {path}, but {Path(base) / path} exists; fix: write that path "
                        "(paths are relative to the directory in which the command runs)")
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"no file {path}: the directory {folder} does not exist; fix: correct the path")
    try:
        near = difflib.get_close_matches(path.name, os.listdir(folder), n=3, cutoff=0.4)
    except OSError:
        near = []
    hint = f" (nearest in {folder}: {', '.join(near)})" if near else ""
    raise UserError(f"no file {path}{hint}; fix: correct the path")


def _reader(path):
    """The function that reads the file, chosen by its suffix. Text that starts with { or [ is JSON under any
    other suffix, too."""
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    with _open(path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if suffix == ".parquet" and start.startswith(b"PAR1"):
        return _parquet
    _check_magic(path, start)
    if suffix == ".parquet":
        return _parquet
    if suffix in (".csv", ".tsv"):
        return _csv
    first = start[:1]
    if suffix in SUFFIXES or first in (b"{", b"["):
        return _json_document if first == b"[" else _json_lines
    raise UserError(f"not a data file, neither known by its suffix nor JSON: {path}; "
                    f"fix: save it as one of {', '.join(SUFFIXES)}")


def _check_magic(path, start):
    """UserError where a file that should hold rows begins like something else."""
    head = start.lower() if start.startswith(b"<") else start
    found = None
    for magic, kind in MAGIC.items():
        if head.startswith(magic):
            found = kind
    if start[257:262] == b"ustar" and b"\0" in start[:257]:
        found = "a tar archive"
    if found:
        fix = FIXES.get(found, "unpack or convert it to JSON lines")
        raise UserError(f"not a data file but {found}: {path}; fix: {fix}")


def _open(path):
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    return io.BufferedReader(_Unzipped(path), 2 ** 20) if zipped else open(path, "rb")


class _Unzipped(io.RawIOBase):
    """The contents of a gzip file. UserError where a part of it grows more than RATIO times: it may be made
    to fill the memory."""

    def __init__(self, path):
        self.path, self.packed = path, open(path, "rb")  # noqa: SIM115  closed below
        self.file = gzip.GzipFile(fileobj=self.packed, mode="rb")
        self.read_in = 0      # bytes of the file that were read when the window began
        self.written = 0      # bytes unpacked since then

    def readable(self):
        return True

    def readinto(self, buffer):
        count = self.file.readinto(buffer)
        self.written += count
        if self.written >= WINDOW:
            read_in = self.packed.tell()
            if (read_in - self.read_in + AT_ONCE) * RATIO < self.written:
                raise UserError(f"the gzip file unpacks to more than {RATIO} times its size: {self.path}; "
                                "fix: unpack it yourself, if that is meant")
            self.read_in, self.written = read_in, 0
        return count

    def close(self):
        self.file.close()
        self.packed.close()
        super().close()


def _lines(path):
    """Yield (line number, text with its line end). Lines end at \\n only: JSON strings may hold other Unicode
    line breaks."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = f"byte 0x{line[error.start]:02x}, number {error.start + 1} of the line"
                raise UserError(f"not UTF-8 ({byte}) in {path}:{number}; "
                                "fix: iconv -f <its encoding> -t UTF-8 <file> > <new file>") from None


# ---- JSON ----

def _no_duplicates(pairs):
    row = dict(pairs)
    if len(row) < len(pairs):
        seen = set()
        for key, _ in reversed(pairs):
            if key in seen:
                first = key
            seen.add(key)
        raise ValueError(f"duplicate key {first!r}")
    return row


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_no_duplicates, parse_constant=_no_constant)


def read_named(key, name, known):
    """(path, text) of what the value `name` of `key` names: one of `known`, {name: path}, or a file."""
    path = known.get(name, Path(name))
    try:
        return path, path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        near, *_ = [*difflib.get_close_matches(name, known, n=1), "a name or the path of a file"]
        raise UserError(f"{key} {name!r} is neither one of {', '.join(known)} nor a UTF-8 file "
                        f"({type(error).__name__}); fix: give {near}") from None


def read_json(text):
    """The value of a JSON text. ValueError, also of NaN and duplicate keys, or RecursionError."""
    return _decoder.decode(text)


def _malformed(where, error, last):
    # a duplicate key or NaN stands in a complete row: only a syntax error suggests a file that was cut off
    is_syntax = isinstance(error, json.JSONDecodeError)
    cut_off = "; the file seems cut off" if last and is_syntax else ""
    text = error.msg if is_syntax else error
    return UserError(f"malformed row ({text}){cut_off} in {where}; fix: correct or delete that row")


def _json_lines(path):
    lines = filter(_is_not_blank, _lines(path))
    head = list(itertools.islice(lines, 2))
    if head and _opens_document(head):
        yield from _json_document(path)
        return
    lines = itertools.chain(head, lines)
    for number, line in lines:
        try:
            row = _decoder.decode(line)
        except (ValueError, RecursionError) as error:
            is_last = next(lines, None) is None
            raise _malformed(f"{path}:{number}", error, is_last) from None
        yield f"{path}:{number}", row


def _is_not_blank(numbered_line):
    return bool(numbered_line[1].strip())


def _opens_document(head):
    """Whether the first lines (at most two) of a file are no rows but the beginning of one JSON text."""
    first = head[0][1]
    if first.rstrip().endswith(("{", "[", ",")):
        return True
    try:
        return len(head) == 1 and _rows_key(_decoder.decode(first)) is not None
    except (ValueError, RecursionError):
        return False  # reported with its line by the caller


def _json_document(path):
    """One JSON text over the whole file: a list of rows, perhaps wrapped in a dict, or a single row."""
    text = "".join([line for _, line in _lines(path)])
    try:
        document = _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        is_syntax = isinstance(error, json.JSONDecodeError)
        where = f"{path}:{error.lineno}:{error.colno}" if is_syntax else path
        closing = "]" if text.lstrip().startswith("[") else "}"
        raise _malformed(where, error, not text.rstrip().endswith(closing)) from None
    key = _rows_key(document)
    if key is not None:
        notice(f"notice: {path}: the rows are the list under {key!r}")
        document = document[key]
    if isinstance(document, dict):
        before = text[:text.index("{")]
        yield f"{path}:{before.count(chr(10)) + 1}", document
        return
    for number, row in enumerate(document, 1):
        yield f"{path}:row {number}", row


def _rows_key(document):
    """The key of a dict's only list of objects, if these are rows: {"data": [{...}, ...]}. They are not where
    they are messages, or where the dict has a row's columns beside them."""
    if not isinstance(document, dict):
        return None
    keys = []
    for key, value in document.items():
        if isinstance(value, list) and set(map(type, value)) == {dict}:
            keys.append(key)
    if len(keys) != 1 or KNOWN & document.keys() - {*keys}:
        return None
    names = set(itertools.chain(*document[keys[0]]))
    return None if names & OF_MESSAGES else keys[0]


# ---- CSV and Parquet ----

def _csv(path):
    csv.field_size_limit(2**31 - 1)  # the module's default refuses texts of more than 131,072 characters
    lines = (line for _, line in _lines(path))
    head = [next(lines, "")]
    while head[-1].isspace():
        head.append(next(lines, ""))
    reader = csv.reader(itertools.chain(head, lines), delimiter=_delimiter(path, head[-1]), strict=True)
    header = None
    start = 1
    while True:
        where = f"{path}:{start}"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise UserError(f"malformed row ({error}) in {where}; "
                            "fix: correct the quotes of that row") from None
        if fields is None:
            return
        if header is None and fields:
            header = fields
            if len(set(header)) < len(header):
                raise UserError(f"duplicate column in the header of {where}; "
                                "fix: give every column its own name")
        elif fields:
            if len(fields) != len(header):
                found = f"{len(fields)} fields, the header has {len(header)}"
                raise UserError(f"malformed row ({found}) in {where}; fix: correct its separators and quotes")
            yield where, dict(zip(header, fields))
        start = reader.line_num + 1


def _delimiter(path, first):
    """What separates the columns whose names stand in the `first` line. Spreadsheets write ; where numbers
    have a decimal comma."""
    is_tsv = path.name.lower().removesuffix(".gz").endswith(".tsv")
    if is_tsv or "\t" in first and "," not in first:
        return "\t"
    return ";" if ";" in first and "," not in first else ","


def _parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_parquet(path, file.metadata)
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:row {number}", row
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot read the Parquet file {path} ({reason}); fix: write it again") from None


def _check_parquet(path, metadata):
    """UserError where a row group, which is read as a whole, is more than PARQUET_RATIO times the file."""
    sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    largest = max(sizes, default=0)
    if largest > WINDOW and largest > PARQUET_RATIO * path.stat().st_size:
        raise UserError(f"the Parquet file unpacks to more than {PARQUET_RATIO} times its size: {path}; "
                        "fix: write it again without compression, if that is meant")


def kind_of(value):
    """A name for the kind of a JSON value that is not an object."""
    if value is None:
        return "null"
    names = {list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "a number")


def sha256(path):
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_of(path):
    """sha256 of a file, computed once per process as long as the file stays as it is."""
    status = os.stat(path)
    return _digest_at(os.path.abspath(path), status.st_size, status.st_mtime_ns)


@functools.cache
def _digest_at(path, size, modified):
    return sha256(path)
