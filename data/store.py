"""Token examples as flat arrays, in memory or in a directory that every process maps into its memory.

A pair of 160 tokens takes about 700 bytes there and nothing in the memory of a process: an `Example` is made
when it is indexed. Examples of one kind have the same number K of responses.

    tokens     (T,)        int32    prompt and responses of one example after the other; a token of a response
                                    that is not trained is stored as its complement, ~id
    lengths    (E, K + 1)  int32    of the prompt and of each response
    starts     (E,)        int64    where an example begins in `tokens`
    places     (E, 2)      int32    "file:line" as the number of its beginning among `names`, and the line
    keys       (E, K)      S16      the digest of each response, see `response_keys`
    extras     bytes, JSON, and extra_ends (E,) int64; neither where no example has any
"""
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from data.errors import UserError
from data.pack import Example, Response

ARRAYS = ("tokens", "lengths", "starts", "places", "keys")
EXTRAS, EXTRA_ENDS = "extras", "extra_ends"
NO_LINE = -1                          # the name of the place is all of it
LAST_LINE = np.iinfo(np.int32).max
ENDS_IN_NUMBER = re.compile(r"(.*?)(0|[1-9][0-9]{0,9})?", re.DOTALL)


class Unstorable(UserError):
    """An example's extras hold something that JSON does not keep as it is."""


class Examples(Sequence):
    """The examples `rows` of the arrays, without the extras named in `hidden`.

    `extras`: the dict of each of the E examples; `names`: the beginnings in `places`."""

    def __init__(self, arrays: dict[str, np.ndarray], extras: Sequence[dict], names: list[str],
                 rows: Sequence[int] | None = None, hidden: frozenset[str] = frozenset()):
        self.arrays, self.extras, self.names = arrays, extras, names
        self.rows = range(len(arrays["lengths"])) if rows is None else rows
        self.hidden = hidden

    @classmethod
    def of(cls, examples: Iterable[Example]) -> "Examples":
        """The flat form of a list of one example at least, in memory. ValueError where they differ in K."""
        tokens, lengths, places, extras = [], [], [], []
        names = {}
        for example in examples:
            tokens.append(example.prompt)
            sizes = [len(example.prompt)]
            for response in example.responses:
                tokens.append(np.where(response.trained, response.tokens, ~response.tokens))
                sizes.append(len(response.tokens))
            lengths.append(sizes)
            name, line = split_place(example.where)
            places.append((names.setdefault(name, len(names)), line))
            extras.append(example.extras)
        lengths = np.array(lengths, np.int32)
        ends = lengths.sum(axis=1, dtype=np.int64).cumsum()
        arrays = {
            "tokens": np.concatenate(tokens, dtype=np.int32),
            "lengths": lengths,
            "starts": ends - lengths.sum(axis=1),
            "places": np.array(places, np.int32),
        }
        return cls(arrays, extras, list(names))

    @classmethod
    def joined(cls, parts: list["Examples"]) -> "Examples":
        """All examples of several `Examples` in memory, one after the other."""
        names = {}
        arrays = {name: [] for name in ("tokens", "lengths", "starts", "places")}
        extras = []
        start = 0
        for part in parts:
            part = part.compact()
            numbers = [names.setdefault(name, len(names)) for name in part.names]
            places = part.arrays["places"].copy()
            places[:, 0] = np.array(numbers, np.int32)[places[:, 0]]
            arrays["tokens"].append(part.arrays["tokens"])
            arrays["lengths"].append(part.arrays["lengths"])
            arrays["starts"].append(part.arrays["starts"] + start)
            arrays["places"].append(places)
            extras += part.extras
            start += len(part.arrays["tokens"])
        merged = {name: np.concatenate(values) for name, values in arrays.items()}
        return cls(merged, extras, list(names))

    # ---- a sequence --------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index):
        """An Example, or for a slice a list of them."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.rows[index]
        sizes = self.arrays["lengths"][row].tolist()
        start = int(self.arrays["starts"][row])
        prompt = self.arrays["tokens"][start:start + sizes[0]].copy()
        start += sizes[0]
        responses = []
        for size in sizes[1:]:
            stored = self.arrays["tokens"][start:start + size]
            trained = stored >= 0
            responses.append(Response(np.where(trained, stored, ~stored), trained))
            start += size
        return Example(prompt, responses, self.place(row), self.shown(row))

    def shown(self, row: int) -> dict:
        """A copy of the extras of a row that are not hidden."""
        extras = dict(self.extras[row])
        for name in self.hidden:
            extras.pop(name, None)
        return extras

    def place(self, row: int) -> str:
        number, line = self.arrays["places"][row].tolist()
        return self.names[number] if line == NO_LINE else f"{self.names[number]}{line}"

    @property
    def num_responses(self) -> int:
        """K"""
        return self.arrays["lengths"].shape[1] - 1

    # ---- others of the same arrays -----------------------------------------------------------------------

    def take(self, indices: Sequence[int]) -> "Examples":
        """These examples, in this order; one may come twice."""
        rows = np.asarray(self.rows, np.int64)[np.asarray(indices, np.int64)]
        return Examples(self.arrays, self.extras, self.names, rows, self.hidden)

    def without(self, names: Iterable[str]) -> "Examples":
        """The same examples without the extras of these names."""
        return Examples(self.arrays, self.extras, self.names, self.rows, self.hidden | set(names))

    def compact(self) -> "Examples":
        """The same examples with arrays that hold no others."""
        if isinstance(self.rows, range) and not self.hidden:
            return self
        rows = np.asarray(self.rows, np.int64)
        lengths = self.arrays["lengths"][rows]
        sizes = lengths.sum(axis=1, dtype=np.int64)
        pieces = [np.zeros(0, np.int32)]
        for start, size in zip(self.arrays["starts"][rows].tolist(), sizes.tolist()):
            pieces.append(self.arrays["tokens"][start:start + size])
        arrays = {
            "tokens": np.concatenate(pieces),
            "lengths": lengths,
            "starts": sizes.cumsum() - sizes,
            "places": self.arrays["places"][rows],
        }
        return Examples(arrays, list(self.all_extras()), self.names)

    # ---- all at once -------------------------------------------------------------------------------------

    def lengths(self) -> np.ndarray:
        """(E, K + 1) tokens of the prompt and of each response."""
        return self.arrays["lengths"][np.asarray(self.rows, np.int64)]

    def sizes(self, share_prompt: bool = True) -> np.ndarray:
        """(E,) laid-out tokens, as `Example.size`."""
        lengths = self.lengths()
        copies = 1 if share_prompt else max(1, self.num_responses)
        return copies * lengths[:, 0] + lengths[:, 1:].sum(axis=1)

    def largest_id(self) -> int:
        """The largest id in the arrays, which may hold other examples, too."""
        tokens = self.arrays["tokens"]
        return max(int(tokens.max(initial=0)), ~int(tokens.min(initial=0)))

    def all_keys(self) -> np.ndarray:
        """(E, K) digests of the responses, of 16 bytes each; see `response_keys`."""
        if "keys" in self.arrays:
            return self.arrays["keys"][np.asarray(self.rows, np.int64)]
        return keys_of(self, self.num_responses)

    def all_extras(self) -> Iterable[dict]:
        """The extras of every example, the hidden ones left out."""
        for row in self.rows:
            yield self.shown(row)

    # ---- on disk -----------------------------------------------------------------------------------------

    def write(self, folder: str) -> None:
        """Write the arrays into a new directory. Unstorable where an example's extras cannot be."""
        whole = self.compact()
        texts = [extras_as_json(extras, whole, row) for row, extras in enumerate(whole.extras)]
        arrays = whole.arrays | {"keys": whole.all_keys()}
        if any(texts):
            arrays[EXTRAS] = np.frombuffer(b"".join(texts), np.uint8)
            arrays[EXTRA_ENDS] = np.cumsum([len(text) for text in texts])
        os.makedirs(folder)
        for name, array in arrays.items():
            np.save(os.path.join(folder, f"{name}.npy"), array, allow_pickle=False)
        with open(os.path.join(folder, "names.json"), "w") as file:
            json.dump(whole.names, file)

    @classmethod
    def read(cls, folder: str) -> "Examples":
        """What `write` wrote there: its arrays are mapped, not read."""
        arrays = {name: mapped(folder, name) for name in ARRAYS}
        with open(os.path.join(folder, "names.json")) as file:
            names = json.load(file)
        extras = NoExtras(len(arrays["lengths"]))
        if os.path.exists(os.path.join(folder, f"{EXTRAS}.npy")):
            extras = StoredExtras(mapped(folder, EXTRAS), mapped(folder, EXTRA_ENDS))
        return cls(arrays, extras, names)


class Together(Sequence):
    """Several sequences of examples, one after the other."""

    def __init__(self, *parts: Sequence[Example]):
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __getitem__(self, index: int) -> Example:
        for part in self.parts:
            if index < len(part):
                return part[index]
            index -= len(part)
        raise IndexError(index)


def sizes_of(examples: Sequence[Example], share_prompt: bool = True) -> np.ndarray:
    """(E,) laid-out tokens of each example."""
    if isinstance(examples, Examples):
        return examples.sizes(share_prompt)
    return np.array([example.size(share_prompt) for example in examples])


def extremes(examples: Sequence[Example]) -> list[Example]:
    """The two smallest examples and the largest one."""
    order = np.argsort(sizes_of(examples), kind="stable").tolist()
    return [examples[i] for i in order[:2] + order[2:][-1:]]


def mapped(folder: str, name: str) -> np.ndarray:
    """An array in a file, whose pages the system reads when they are used and shares among processes."""
    return np.load(os.path.join(folder, f"{name}.npy"), mmap_mode="r", allow_pickle=False).view(np.ndarray)


# ---- where an example stands -----------------------------------------------------------------------------

def split_place(where: str) -> tuple[str, int]:
    """"file:12" -> ("file:", 12); a place that ends in no line number -> (the place, NO_LINE)."""
    name, line = ENDS_IN_NUMBER.fullmatch(where).groups()
    if line and int(line) <= LAST_LINE:
        return name, int(line)
    return where, NO_LINE


# ---- extras ----------------------------------------------------------------------------------------------

def extras_as_json(extras: dict, examples: Examples, row: int) -> bytes:
    """b"" for no extras, else JSON with tensors apart from other values."""
    values, tensors = {}, {}
    for name, value in extras.items():
        if torch.is_tensor(value):
            tensors[name] = value.tolist()
        else:
            values[name] = value
    if not extras:
        return b""
    try:
        text = json.dumps([values, tensors])
        is_kept = json.loads(text)[0] == values
    except (TypeError, ValueError):
        is_kept = False
    if not is_kept:
        raise Unstorable(f"{examples.place(row)} holds values that JSON does not keep")
    return text.encode()


class StoredExtras(Sequence):
    """The extras of every example, from JSON on disk."""

    def __init__(self, content: np.ndarray, ends: np.ndarray):
        self.content, self.ends = content, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> dict:
        start = int(self.ends[row - 1]) if row > 0 else 0
        text = self.content[start:int(self.ends[row])].tobytes()
        if not text:
            return {}
        extras, tensors = json.loads(text)
        for name, numbers in tensors.items():
            extras[name] = torch.tensor(numbers, dtype=torch.float32)
        return extras


class NoExtras(Sequence):
    """The empty extras of `count` examples."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict:
        return {}


# ---- digests of responses --------------------------------------------------------------------------------

def response_keys(example: Example) -> list[bytes]:
    """16 bytes per response that identify it: a digest of prompt, response and which tokens are trained."""
    keys = []
    for response in example.responses:
        digest = hashlib.blake2b(digest_size=16)
        for part in (example.prompt, response.tokens, response.trained):
            digest.update(len(part).to_bytes(8, "little") + part.tobytes())
        keys.append(digest.digest())
    return keys


def keys_of(examples: Sequence[Example], per_example: int) -> np.ndarray:
    """(E, K) `response_keys` of all examples; K: `per_example`."""
    keys = np.empty((len(examples), per_example), "S16")
    for row, example in enumerate(examples):
        keys[row] = response_keys(example)
    return keys
