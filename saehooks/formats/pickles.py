"""Reading a pickle as data: nothing in it is called, no class is imported, no memory is allocated on its claim.

A pickle is a program for a small stack machine. This one has the instructions that build plain values; where a pickle
calls a function, it notes the call. Calls that make a tensor, a plain dict and a few others of torch are understood and
done here; any other stays an `Unmade`, which holds what the pickle gave it.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO, NamedTuple, cast

from saehooks.errors import FormatError


class Reference(NamedTuple):
    """The name of a class or function, which was not looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Unmade:
    """An object that was not made: the class or function that would have made it, and what it would have been given."""

    def __init__(self, kind: Any, arguments: tuple = ()) -> None:
        self.kind, self.arguments = kind, arguments
        self.attributes: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        """Note the attributes that the pickle sets."""
        # The state of an object with slots is a pair: what its dict holds, and what its slots hold.
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        for part in parts:
            if isinstance(part, dict):
                self.attributes.update({name: value for name, value in part.items() if isinstance(name, str)})


class _Mark:
    """Where a run of values on the stack begins."""


MARK = _Mark()
MOST_VALUES = 10**7
DEEPEST = 100
"""Values in a pickle, and how deep in each other; pickles of SAEs have hundreds, ten deep."""
Calls = dict[tuple[str, str], Callable[..., Any]]
"""What is done for the functions that are understood, by module and name."""

TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING BINBYTES BINBYTES8 "  # noqa: SIM905
    "SHORT_BINBYTES BYTEARRAY8 UNICODE BINUNICODE BINUNICODE8 SHORT_BINUNICODE".split()
)


def read_pickle(file: BinaryIO, calls: Calls, storage: Callable[[Any], Any]) -> Any:
    """Read the next pickle of a file, and leave the file behind it.

    Args:
        file: at the start of a pickle.
        calls: what is done for the functions that are understood.
        storage: gives what a persistent id stands for.
    Raises:
        FormatError: it is no pickle, cut off, or uses an instruction that is not understood.
    """
    machine = Machine(calls, storage)
    try:
        for opcode, argument, _ in pickletools.genops(cast(BinaryIO, _Whole(file))):
            if opcode.name == "STOP":
                found = machine.pop()
                _written_out(found, {}, 0)
                return found
            machine.step(opcode.name, argument)
    except FormatError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, EOFError, RecursionError) as error:
        raise FormatError(f"it is not a readable pickle ({type(error).__name__}: {error})") from error
    raise FormatError("it is not a readable pickle (it does not end)")


class _Whole:
    """A file that is not asked for more bytes than it has: memory is taken for what is there, not for what is said."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.readline, self.tell = file, file.readline, file.tell
        start = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(start)

    def read(self, count: int) -> bytes:
        if count > self.end - self.file.tell():
            raise ValueError("it is cut off")
        return self.file.read(count)


def _written_out(value: Any, sizes: dict[int, int], depth: int) -> int:
    """Values in all if shared ones are written out each time. Too many, too deep or in a circle: an error."""
    if isinstance(value, Unmade):
        parts: tuple[Any, ...] = (value.kind, value.arguments, value.attributes)
    elif isinstance(value, dict):
        parts = (*value.keys(), *value.values())
    elif isinstance(value, (list, tuple, set, frozenset)) and not isinstance(value, Reference):
        parts = tuple(value)
    else:
        return 1
    if sizes.get(id(value), 1) == 0 or depth > DEEPEST:
        raise FormatError("it is a pickle of values in a circle, or deep in each other, which no file of tensors needs")
    if id(value) not in sizes:
        sizes[id(value)] = 0
        sizes[id(value)] = 1 + sum(_written_out(part, sizes, depth + 1) for part in parts)
    if sizes[id(value)] > MOST_VALUES:
        raise FormatError("it is a pickle that repeats values over and over, which no file of tensors needs")
    return sizes[id(value)]


def _keys(values: Iterable[Any]) -> Iterable[Any]:
    """Keys of a dict or entries of a set, which are hashed: none that nests values in each other."""
    for value in values:
        if isinstance(value, frozenset) or any(isinstance(part, (tuple, frozenset)) for part in _parts(value)):
            raise FormatError("it is a pickle with keys of nested values, which no file of tensors needs")
        yield value


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()


class Machine:
    """The stack and the memo of one pickle."""

    def __init__(self, calls: Calls, storage: Callable[[Any], Any]) -> None:
        self.calls, self.storage = calls, storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def pop(self) -> Any:
        """The value on top."""
        value = self.stack.pop()
        if value is MARK:
            raise ValueError("a value is missing")
        return value

    def since_mark(self) -> list[Any]:
        """The values above the last mark, which goes with them."""
        place = len(self.stack) - 1
        while self.stack[place] is not MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        values = self.stack[place + 1 :]
        del self.stack[place:]
        return values

    def step(self, name: str, argument: Any) -> None:
        """Do one instruction."""
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in EMPTY:
            self.stack.append(EMPTY[name]())
        elif name in TUPLES:
            self.stack.append(tuple([self.pop() for _ in range(TUPLES[name])][::-1]))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[int(argument)])
        elif name not in ("PROTO", "FRAME"):
            action = getattr(self, f"_{name.lower()}", None)
            if action is None:
                raise FormatError(f"it is a pickle with the instruction {name}, which no file of tensors needs")
            action(argument)

    # ---- the stack

    def _mark(self, _: Any) -> None:
        self.stack.append(MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self.since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    # ---- containers

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.since_mark()))

    def _list(self, _: Any) -> None:
        self.stack.append(self.since_mark())

    def _dict(self, _: Any) -> None:
        values = self.since_mark()
        self.stack.append(dict(zip(_keys(values[::2]), values[1::2], strict=True)))

    def _frozenset(self, _: Any) -> None:
        self.stack.append(frozenset(_keys(self.since_mark())))

    def _append(self, _: Any) -> None:
        self._extend([self.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self.since_mark())

    def _additems(self, _: Any) -> None:
        values, found = self.since_mark(), self.stack[-1]
        if isinstance(found, set):
            found.update(_keys(values))

    def _extend(self, values: list[Any]) -> None:
        found = self.stack[-1]
        if isinstance(found, list):
            found.extend(values)
        elif not isinstance(found, Unmade):
            raise ValueError("values are appended to something that is no list")

    def _setitem(self, _: Any) -> None:
        value, key = self.pop(), self.pop()
        self._set([key, value])

    def _setitems(self, _: Any) -> None:
        self._set(self.since_mark())

    def _set(self, values: list[Any]) -> None:
        found = self.stack[-1]
        pairs = dict(zip(_keys(values[::2]), values[1::2], strict=True))
        if isinstance(found, dict):
            found.update(pairs)
        elif isinstance(found, Unmade):
            found.build(pairs)
        else:
            raise ValueError("entries are set on something that is no dict")

    # ---- objects

    def _global(self, argument: str) -> None:
        self.stack.append(Reference(*argument.split(" ", 1)))

    def _stack_global(self, _: Any) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("the name of a class is no text")
        self.stack.append(Reference(module, name))

    def _reduce(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        self.stack.append(self.call(function, arguments))

    def _newobj(self, _: Any) -> None:
        arguments, kind = self.pop(), self.pop()
        self.stack.append(self.call(kind, arguments))

    def _newobj_ex(self, _: Any) -> None:
        named, arguments, kind = self.pop(), self.pop(), self.pop()
        made = Unmade(kind, arguments if isinstance(arguments, tuple) else ())
        made.build(named)
        self.stack.append(made)

    def _inst(self, argument: str) -> None:
        self.stack.append(Unmade(Reference(*argument.split(" ", 1)), tuple(self.since_mark())))

    def _obj(self, _: Any) -> None:
        kind, *arguments = self.since_mark()
        self.stack.append(Unmade(kind, tuple(arguments)))

    def _build(self, _: Any) -> None:
        state, found = self.pop(), self.stack[-1]
        if isinstance(found, Unmade):
            found.build(state)

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self.storage(self.pop()))

    def call(self, function: Any, arguments: Any) -> Any:
        """What a call gives if it is one of those that are understood, and the call itself otherwise."""
        if not isinstance(arguments, tuple):
            raise ValueError("the arguments of a call are no tuple")
        if isinstance(function, Reference) and function.name == "_reconstructor" and arguments:
            return Unmade(arguments[0])  # how protocols 0 and 1 begin an object
        if isinstance(function, Reference) and function.name == "_rebuild_from_type_v2" and len(arguments) == 4:
            return self.call(arguments[0], arguments[2])
        done = self.calls.get(tuple(function)) if isinstance(function, Reference) else None  # type: ignore[arg-type]
        return Unmade(function, arguments) if done is None else done(*arguments)


def plain(value: Any) -> Any:
    """A value as text where it names a class or a type of torch, as it is otherwise."""
    if isinstance(value, Reference):
        return str(value)
    if isinstance(value, Unmade):
        return f"<{value.kind}>"
    return value


def attributes_of(found: Any) -> dict[str, Any]:
    """The entries of a dict, or the attributes of an object that was not made; names of classes become text."""
    values = found.attributes if isinstance(found, Unmade) else found
    if not isinstance(values, dict):
        return {}
    return {name: plain(value) for name, value in values.items() if isinstance(name, str)}
