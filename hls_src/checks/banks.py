"""Memories of pipelined loops: banks that are named by constants, two addresses a bank and trip.

Vitis HLS gives each access of a loop a port when it compiles. An access whose bank is a value may
meet any bank, so that it takes a port of every one; II = 1 is then not to be had. Accesses of which
a trip makes one or the other, on two branches, share a port: UG1399 gives an array that a trip
either reads or writes as the way to II = 1 ("Limitations of Pipelining with Static Variables").
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ir import Function, Loop, Unit, name_of, reverse_postorder

BANK = re.compile(r'%"(?:class|struct)\.kgrc::Ram(?:\.\d+)?"')
"""The type of a bank; arrays around it are arrays of banks."""
PORTS = 2


@dataclass(frozen=True)
class Access:
    """A load or store: which memory, and the indices that lead to the element."""

    memory: str
    kind: str
    """load or store"""
    banks: tuple[str, ...]
    """Indices of arrays of banks."""
    fields: tuple[str, ...]
    address: tuple[str, ...]
    """Other indices of arrays; empty for a register."""

    @property
    def word(self) -> tuple[str, ...]:
        """The address of a word of a bank: members of one word are read and written together."""
        return self.address[:1] if self.banks else self.address

    @property
    def moving(self) -> list[str]:
        return [index for index in self.banks if not is_constant(index)]


def is_constant(index: str) -> bool:
    return re.fullmatch(r"-?\d+", index) is not None


def split(text: str) -> list[str]:
    """The parts of a list that commas separate, those within brackets left together."""
    parts, depth, start, quoted = [], 0, 0, False
    for i, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif letter in "([{<":
            depth += 1
        elif letter in ")]}>":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def inner_type(unit: Unit, kind: str, index: str) -> tuple[str, str]:
    """What an index of a value of that type chooses ("array", "field"), and the type of it."""
    kind = unit.types.get(kind, kind)
    array = re.match(r"\[(\d+) x (.*)\]$", kind)
    if array:
        return "array", array[2]
    if kind[:1] in "{<":
        members = split(kind.strip("<>").strip("{} "))
        return "field", members[int(index)]
    return "unknown", kind


Chain = tuple[str, str, tuple[str, ...]]
"""(base, its type, indices that follow each other)"""


def chains(unit: Unit, function: Function, text: str, seen: tuple[str, ...] = ()) -> list[Chain]:
    """What a pointer may point to; several where it is chosen by a value."""
    text = text.strip()
    if text.startswith("@"):
        name = text.split()[0]
        return [(name, unit.globals.get(name, "?"), ())]
    found = re.match(r"(getelementptr|bitcast)(?: inbounds)? ?\((.*)\)$", text)
    if found:
        return step(unit, function, found[1], found[2], seen)
    if not text.startswith("%"):
        return [(text, "?", ())]
    made = function.defined.get(text)
    if made is None or text in seen:
        return [(text, "argument", ())]
    seen = (*seen, text)
    if made.opcode == "alloca":
        return [(text, split(made.text.split(None, 1)[1])[0], ())]
    if made.opcode in ("getelementptr", "bitcast"):
        rest = re.sub(r"^(getelementptr|bitcast)( inbounds)? ", "", made.text)
        return step(unit, function, made.opcode, rest, seen)
    if made.opcode == "phi":
        taken = re.findall(r"\[ (.*?), %(?:[-\w.$]+|\"[^\"]*\") \]", made.text)
        return [each for value in taken for each in chains(unit, function, value, seen)]
    if made.opcode == "select":
        parts = split(made.text.split(None, 1)[1])[1:]
        values = [part.split("* ", 1)[1] for part in parts]
        return [each for value in values for each in chains(unit, function, value, seen)]
    return [(text, "unknown", ())]


def step(
    unit: Unit, function: Function, opcode: str, text: str, seen: tuple[str, ...]
) -> list[Chain]:
    if opcode == "bitcast":
        return chains(unit, function, pointer_of(text.rsplit(" to ", 1)[0]), seen)
    parts = split(text)
    indices = tuple(part.split()[-1] for part in parts[2:])
    found = []
    for base, kind, before in chains(unit, function, pointer_of(parts[1]), seen):
        if kind == "argument":
            kind = parts[0]
        joined = (*before[:-1], add(before[-1], indices[0]), *indices[1:]) if before else indices
        found.append((base, kind, joined))
    return found


def add(a: str, b: str) -> str:
    if is_constant(a) and is_constant(b):
        return str(int(a) + int(b))
    return b if a == "0" else a if b == "0" else f"{a}+{b}"


def pointer_of(text: str) -> str:
    """The operand of `TYPE* operand`."""
    depth = 0
    quoted = False
    for i, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif not quoted and letter in "([{<":
            depth += 1
        elif not quoted and letter in ")]}>":
            depth -= 1
        elif letter == " " and depth == 0 and not quoted and text[i - 1] == "*":
            return text[i + 1 :]
    return text


def resolve(unit: Unit, chain: Chain, kind: str) -> Access:
    base, of, indices = chain
    bank_indices: list[str] = []
    fields: list[str] = []
    address: list[str] = []
    for index in indices[1:]:
        what, inner = inner_type(unit, of, index)
        if what == "array":
            (bank_indices if BANK.search(of) else address).append(index)
        elif what == "field":
            fields.append(index)
        of = inner
    if indices[:1] and indices[0] != "0":
        address.append(indices[0])
    return Access(base, kind, tuple(bank_indices), tuple(fields), tuple(address))


Bank = tuple[str, tuple[str, ...]]
"""(memory, indices of arrays of banks; of a memory without banks, of its members)"""


def accesses(unit: Unit, loop: Loop) -> Iterator[tuple[str, Access]]:
    """The loads and stores of a loop: (block, access)."""
    for block, each in loop.instructions():
        if each.opcode not in ("load", "store"):
            continue
        pointer = split(each.text)[1]
        for chain in chains(unit, loop.function, pointer_of(pointer)):
            yield block, resolve(unit, chain, each.opcode)


def most_in_a_trip(loop: Loop, blocks: Iterable[set[str]]) -> int:
    """How many addresses a trip takes at most, of which each is in the blocks given for it."""
    held = Counter[str]()
    several = 0
    for each in blocks:
        if len(each) == 1:
            held.update(each)
        else:
            several += 1
    following = {
        block: [to for to in loop.function.following[block] if to in loop.body - {loop.header}]
        for block in loop.body
    }
    most: dict[str, int] = {}
    for block in reversed(reverse_postorder(loop.header, following)):
        most[block] = held[block] + max((most[to] for to in following[block]), default=0)
    return several + most[loop.header]


def variable_of(symbol: str) -> str:
    """The name in the source of a global or of a local variable."""
    if symbol.startswith("@"):
        return name_of(symbol[1:])
    return re.split(r"\.", symbol.strip('%"'))[0]


def partitions(unit: Unit) -> dict[str, set[int]]:
    """Dimensions that ARRAY_PARTITION cuts completely, by variable; 0 stands for all."""
    found: dict[str, set[int]] = defaultdict(set)
    for name, rest in re.findall(
        r"#\s*pragma\s+HLS\s+ARRAY_PARTITION\s+variable\s*=\s*([\w.]+)\s+complete(.*)", unit.text
    ):
        dimension = re.search(r"dim\s*=\s*(\d+)", rest)
        found[name.split(".")[0]].add(int(dimension[1]) if dimension else 1)
    return found


def check_banks(unit: Unit) -> list[str]:
    """Faults: banks named by values, arrays of banks that are not cut, too many addresses."""
    faults = []
    cut = partitions(unit)
    for loop in unit.loops:
        # by bank, and by kind and word: the blocks with such an access
        found: dict[Bank, dict[tuple[str, tuple[str, ...]], set[str]]] = {}
        moving: dict[str, set[Access]] = defaultdict(set)
        for block, access in accesses(unit, loop):
            name = variable_of(access.memory)
            if not access.address and not access.banks:
                continue
            if not access.memory.startswith("@") and access.memory not in loop.function.defined:
                continue  # a pointer argument: ports.py
            if access.moving:
                moving[name].add(access)
                continue
            if access.banks:
                dimensions = range(1, len(access.banks) + 1)
                if 0 not in cut[name] and not cut[name].issuperset(dimensions):
                    fault = f"{loop.where}: {name}, an array of banks, is not partitioned whole"
                    if fault not in faults:
                        faults.append(fault)
            elif cut[name]:
                continue  # registers
            bank = (access.memory, access.banks or access.fields)
            words = found.setdefault(bank, defaultdict(set))
            words[access.kind, access.word].add(block)
        for name, named in sorted(moving.items()):
            faults.append(f"{loop.where}: {len(named)} accesses of {name} name a bank by a value")
        worst: dict[str, int] = defaultdict(int)
        for (memory, _), words in found.items():
            name = variable_of(memory)
            # elements of a local variable that constants name are variables of their own
            local = not memory.startswith("@")
            if local and all(map(is_constant, (i for _, word in words for i in word))):
                continue
            if len(words) > PORTS * loop.interval:
                worst[name] = max(worst[name], most_in_a_trip(loop, words.values()))
        for name, count in sorted(worst.items()):
            if count > PORTS * loop.interval:
                faults.append(
                    f"{loop.where}: {count} addresses in a bank of {name} a trip, it has "
                    f"{PORTS} ports and II = {loop.interval}"
                )
    return faults
