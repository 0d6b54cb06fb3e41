"""Pickled dictionaries of arrays (`np.save` of a dict, as AD-NeRF's tables are) read without executing anything in them.

A pickle is a program: it may call any function it names. Here it can name nothing but numpy's array, number and dtype, and what it
gets for these are stand-ins that only remember what they are given; arrays are made of that afterwards, from plain bytes.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from utils.errors import UserError

_NPY = b"\x93NUMPY"
_KINDS = "biuf"  # numbers and booleans


class _Refused(Exception):
    pass


class _Reader(pickle.Unpickler):
    def __init__(self, file):
        super().__init__(file, encoding="latin1")

        class Dtype:  # made anew for each file, so that no file can leave anything behind
            def __init__(self, code: str = "", *_):
                self.code = str(code)

            def __setstate__(self, state):
                self.code = str(state[1]).replace("|", "") + self.code

        class Array:
            def __init__(self, *_):
                self.state = None

            def __setstate__(self, state):
                self.state = state

        class Number:
            def __init__(self, dtype, data):
                self.state = (1, (), dtype, False, data)

        self.made = (Array, Number)
        names = {"multiarray._reconstruct": Array, "numpy.ndarray": Array, "multiarray.scalar": Number, "numpy.dtype": Dtype}
        self.allowed = {("numpy", name.split(".")[1]): made for name, made in names.items() if name.startswith("numpy")}
        for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            self.allowed |= {(module, name.split(".")[1]): made for name, made in names.items() if name.startswith("multi")}
        self.allowed["_codecs", "encode"] = _latin1

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise _Refused(f"{module}.{name}")
        return self.allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("a persistent object")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise _Refused(f"the codec {encoding}")
    return text.encode("latin1")


def read_pickled_dict(path: Path) -> dict[str, Any]:
    """The dictionary in a .npy file that `np.save` made of one, or of a bare pickle: arrays, numbers, strings, lists of them.

    Raises UserError, in one sentence, if the file is absent, damaged, holds anything else, or would run code (which it does not).
    """
    try:
        with open(path, "rb") as file:
            if file.read(len(_NPY)) == _NPY:
                file.seek(0)
                header = {1: npy.read_array_header_1_0, 2: npy.read_array_header_2_0}[npy.read_magic(file)[0]]
                shape, _, dtype = header(file)
                if dtype.kind != "O" or shape != ():
                    raise ValueError("it holds an array, not a dictionary")
            else:
                file.seek(0)
            reader = _Reader(file)
            content = _made(reader.load(), reader.made)
        if not isinstance(content, dict):
            raise ValueError("it holds no dictionary")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except _Refused as error:
        raise UserError(f"{path} wants to run code ({error}), which was not done; download the file again") from None
    except Exception as error:  # a damaged pickle can fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no table of arrays ({reason}); download it again") from None
    return content


def _made(value: Any, made: tuple[type, ...]) -> Any:
    """Stand-ins replaced by arrays and numbers."""
    if isinstance(value, made):
        _, shape, dtype, fortran, data = value.state
        if dtype.code.lstrip("<>=").startswith("O"):
            values = [_made(item, made) for item in data]
            if shape != ():
                raise ValueError("it holds an array of objects")
            return values[0]
        kind = np.dtype(dtype.code)
        if kind.kind not in _KINDS:
            raise ValueError(f"it holds an array of {kind}")
        data = data.encode("latin1") if isinstance(data, str) else data
        array = np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")
        return array if shape != () else array[()]
    if isinstance(value, dict):
        return {str(key): _made(item, made) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_made(item, made) for item in value]
    if value is None or isinstance(value, (str, bytes, bool, int, float)):
        return value
    raise ValueError(f"it holds a {type(value).__name__}")
