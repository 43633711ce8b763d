"""Arrays as numpy's files: a body that is a ``.npy`` (one input) or a ``.npz`` (inputs by name), and answers like it.

Nothing is unpickled. No array is allocated on a header's word: the bytes that came become the array.
"""

from __future__ import annotations

import io
import math
import re
import zipfile

import numpy as np
from numpy.lib import format as npy_format

from shared_graph.bodies import MAX_BODY_BYTES, NPY, unpacked_limit, unpacks_to_too_much
from shared_graph.errors import InvalidRequest, first_sentence
from shared_graph.json_codec import MAX_VALUES
from shared_graph.models import Arrays

MAX_FILES = 1000  # in one .npz
MAX_STRINGS = MAX_VALUES // 4  # each becomes two objects
MAX_HEADER = 2000  # characters, which are parsed as Python: 64 axes need less
READ_HEADER = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}


def read_arrays(body: bytes) -> np.ndarray | Arrays:
    """One array, or arrays by name; they may share the body's memory, read-only. Raises InvalidRequest."""
    if body.startswith(NPY):
        return read_npy(body, "The body")
    try:
        if body.count(b"PK\1\2") > MAX_FILES:
            raise InvalidRequest(f"The .npz has more than {MAX_FILES} files", 413)
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            members = archive.infolist()
            if sum(member.file_size for member in members) > unpacked_limit(len(body)):
                raise unpacks_to_too_much()
            files = {member.filename.removesuffix(".npy"): read_member(archive, member) for member in members}
    except InvalidRequest:
        raise
    except Exception as error:  # whatever zipfile and zlib say of bytes that were made to confuse them
        raise InvalidRequest(f"The body is not a .npz that can be read: {reason_of(error)}") from None
    if len(files) < len(members):
        raise InvalidRequest("The .npz has two files of one name")
    return {name: read_npy(content, f"{name!r} in the .npz") for name, content in files.items()}


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InvalidRequest(f"{member.filename[:100]!r} in the .npz is packed in another way than numpy packs")
    with archive.open(member) as file:
        content = file.read(member.file_size + 1)  # one more: then it is the end that is seen, and the checksum counts
    if len(content) != member.file_size:
        raise ValueError("a file in it is not as long as its directory says")
    return content


def read_npy(content: bytes, what: str) -> np.ndarray:
    try:
        file = io.BytesIO(content)
        shape, is_fortran, dtype = READ_HEADER[npy_format.read_magic(file)](file, MAX_HEADER)
        start, size_bytes = file.tell(), math.prod(shape) * dtype.itemsize
        if dtype.hasobject or dtype.names:
            raise InvalidRequest(f"{what} is an array of Python objects or records, which is not taken")
        if size_bytes != len(content) - start:
            raise ValueError(f"its header tells of {size_bytes} bytes, and {len(content) - start} follow")
        array = np.frombuffer(content, dtype, offset=start).reshape(shape, order="F" if is_fortran else "C")
        if dtype.kind in "SU" and array.size > MAX_STRINGS:
            raise InvalidRequest(f"{what} has more than {MAX_STRINGS:,} strings", 413)
        if dtype.kind == "U" and np.frombuffer(content, dtype.str[0] + "u4", offset=start).max(initial=0) > 0x10FFFF:
            raise ValueError("a string has a character that Unicode does not have")
    except InvalidRequest:
        raise
    except Exception as error:  # numpy parses the header as Python, which fails in many ways
        raise InvalidRequest(f"{what} is not a .npy that can be read: {reason_of(error)}") from None
    return array if array.flags.aligned else array.copy(order="K")


def reason_of(error: Exception) -> str:
    reason = re.sub(" at 0x[0-9a-f]+", "", first_sentence(error))[:200]
    return reason if isinstance(error, (ValueError, zipfile.BadZipFile)) else f"{type(error).__name__} {reason}"


def write_arrays(outputs: Arrays) -> bytes:
    """A ``.npy`` of one output, a ``.npz`` of several. Raises InvalidRequest."""
    files = {name: write_npy(name, array) for name, array in outputs.items()}
    if len(files) == 1:
        return next(iter(files.values()))
    result = io.BytesIO()
    with zipfile.ZipFile(result, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), content)  # of no date: the same bytes each time
    return result.getvalue()


def write_npy(name: str, array: np.ndarray) -> bytes:
    array = with_width(name, array) if array.dtype == object else array
    if not is_in_npy(array.dtype):
        raise InvalidRequest(f"Output {name!r} is of type {array.dtype}, which a .npy does not have: ask with JSON")
    result = io.BytesIO()
    np.save(result, array, allow_pickle=False)
    return result.getvalue()


def is_in_npy(dtype: np.dtype) -> bool:
    """bfloat16 and others that TensorFlow adds to numpy's types are not."""
    return dtype.kind != "V" and dtype.isbuiltin != 2


def string_width(name: str, strings: list[bytes]) -> int:
    """That of the longest. Raises InvalidRequest where an ``S`` array would be another one."""
    if any(string.endswith(b"\0") for string in strings):
        problem = "a string that ends in a zero byte, which a .npy drops"
        raise InvalidRequest(f"Output {name!r} has {problem}: ask with JSON")
    return max(map(len, strings), default=0) or 1


def with_width(name: str, strings: np.ndarray) -> np.ndarray:
    """An ``S`` array: all strings as wide as the longest. Raises InvalidRequest where that is lossy, or large."""
    flat = strings.ravel().tolist()
    width = string_width(name, flat)
    if width * len(flat) > MAX_BODY_BYTES:
        problem = f"{len(flat)} strings, which a .npy would fill up to the {width} bytes of the longest"
        raise InvalidRequest(f"Output {name!r} has {problem}: ask with JSON")
    return np.array(flat, f"S{width}").reshape(strings.shape)
