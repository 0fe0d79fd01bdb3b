"""Matrices of MATLAB's files, as far as annotations need them."""

import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from vitfeats.errors import StoreError

_MOST_BYTES = 1_000_000  # of a file of matrices: points of an image have less than a thousandth
_BYTE_ORDERS = {b"IM": "<", b"MI": ">"}
_MATRIX, _COMPRESSED = 14, 15  # types of elements
_COMPLEX = 0x0800
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


def read_matrices(path: Path, names: Sequence[str], which: str) -> dict[str, Float[np.ndarray, "..."]]:
    """Return the matrices of real numbers of these names that a file of MATLAB 5 to 7.2 holds.

    The format is simple, and SciPy's reader, which is compiled, ends the process at some damaged files.

    Args:
        path: The file, of a megabyte at most.
        names: Variables that are wanted; those that are absent, or no such matrices, are left out.
        which: What the file is and what it is for, for the message.

    Raises:
        StoreError: If it cannot be read, is of another kind, too large or damaged.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        raise StoreError(f"expected matrices in {which}, but: {error}") from error
    if len(data) > _MOST_BYTES:
        raise StoreError(f"expected matrices in {which}, got more than {_MOST_BYTES} bytes, too many for points")
    order = _BYTE_ORDERS.get(data[126:128])
    if order is None or not data.startswith(b"MATLAB 5.0 MAT-file"):
        raise StoreError(f"expected matrices in {which}, got a file that is not of MATLAB 5 to 7.2")
    try:
        return dict(_matrices(data[128:], order, names))
    except (ValueError, struct.error, zlib.error) as error:
        raise StoreError(f"expected matrices in {which}, but the file is damaged: {error}") from error


def _matrices(data: bytes, order: str, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the matrices of these names, as float64, from the elements of a file."""
    for kind, element in _elements(data, order):
        if kind == _COMPRESSED:
            kind, element = next(_elements(zlib.decompressobj().decompress(element, _MOST_BYTES), order), (0, b""))
        if kind != _MATRIX:
            continue
        (_, flags), (_, sides), (_, name), *others = _elements(element, order)
        (flag,) = struct.unpack_from(f"{order}I", flags)
        # The lowest byte is the class, of which these are numbers; the others hold flags.
        if name.decode("latin-1") not in names or not 6 <= flag & 0xFF <= 15 or flag & _COMPLEX:
            continue
        shape = np.frombuffer(sides, f"{order}i4").tolist()
        stored, values = others[0] if others else (0, b"")
        if stored not in _NUMBERS or min(shape, default=-1) < 0:
            raise ValueError(f"a matrix of shape {shape} and type {stored}")
        yield (
            name.decode("latin-1"),
            np.frombuffer(values, order + _NUMBERS[stored]).reshape(shape, order="F").astype(np.float64),
        )


def _elements(data: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield the elements that follow each other: type and bytes."""
    place = 0
    while place < len(data):
        kind, length = struct.unpack_from(f"{order}II", data, place)
        start, place = place + 8, place + 8
        if kind >> 16:  # up to four bytes stand in the second half of the tag itself, the length above the type
            kind, length, start = kind & 0xFFFF, kind >> 16, start - 4
        else:
            place += length + (0 if kind == _COMPRESSED else -length % 8)
        if start + length > min(place, len(data)):
            raise ValueError("it breaks off")
        yield kind, data[start : start + length]
