"""Loop-carried delay of pipelined loops, by a table of operator delays.

A loop with an initiation interval of II cycles can start a trip every II cycles only if all that
a trip hands to the next one is ready in that time. The delay of the slowest such cycle of operators
is compared with what is left of the clock's period after its uncertainty.

Delays in ns are those that Vitis HLS 2021.2 prints in its schedules for xczu7ev-ffvc1156-2-e, the
speed grade and family of the ZCU102's chip, as published in critical-path listings: FIFO read 1.64,
FIFO write 1.84, integer comparison 0.45 to 0.85, addition 0.79 to 1.08, select 0.29 to 0.45, and/or
0.29 alone and less in a chain, shift by a value 1.54, last cycle of a memory's read 1.24. They are
estimates of that tool, before placement; nothing here was measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import banks
from ir import MARK, VALUE, Instruction, Loop, Unit, dominators, reverse_postorder

PERIOD = 6.67
"""150 MHz"""
BUDGET = 4.8
"""Of a cycle: the period less the tool's default uncertainty of 27 % (UG1399), rounded down."""

SELECT, LOGIC, SHIFT, MULTIPLY, DIVIDE = 0.29, 0.1, 1.54, 3.4, 20.0
FIFO_READ, FIFO_WRITE = 1.64, 1.84
RAM_READ = BUDGET + 1.24
"""A block RAM gives its word one cycle after the address, so that a cycle of operators through it
takes more than a clock."""
PORT_READ = 20 * BUDGET
FREE = {
    *("trunc", "zext", "sext", "bitcast", "freeze", "getelementptr", "extractvalue"),
    *("insertvalue", "alloca", "br", "switch", "unreachable", "ret", "inttoptr", "ptrtoint"),
}
NEVER = float("-inf")
PASSES = 24


def width_of(text: str) -> int:
    found = re.search(r"\bi(\d+)\b", text)
    return int(found[1]) if found else 32


def delay_of(each: Instruction) -> float:
    """ns of an operator."""
    code, text = each.opcode, each.text
    width = width_of(text)
    last = re.search(r", (-?\d+|true|false)$", text)
    constant = last[1] if last else None
    if code in FREE:
        return 0.0
    if code in ("shl", "lshr", "ashr"):
        return 0.0 if constant is not None else SHIFT
    if code in ("and", "or", "xor"):
        return 0.0 if constant is not None else LOGIC  # some of the bits, or their inverse
    if code in ("add", "sub"):
        return 0.67 + 0.0065 * width
    if code == "icmp":
        if re.search(r"icmp (slt .*, 0|sgt .*, -1)$", text):
            return 0.0  # the sign
        return 0.45 if width <= 4 else 0.75 if width <= 16 else 0.85
    if code in ("select", "phi"):
        return SELECT
    if code == "mul":
        return MULTIPLY
    if code in ("sdiv", "udiv", "srem", "urem"):
        if constant is not None and int(constant) > 0 and int(constant) & (int(constant) - 1) == 0:
            return 0.0 if code[0] == "u" else 0.67 + 0.0065 * width + SELECT
        return DIVIDE
    if code == "call":
        if each.callee in ("kgrc_fifo_read", "kgrc_port_read"):
            return FIFO_READ
        if each.callee in ("kgrc_fifo_write", "kgrc_port_write", "kgrc_port_request"):
            return FIFO_WRITE
        if re.match(r"llvm\.[su](min|max)", each.callee):
            return 0.85 + SELECT
        if re.match(r"llvm\.(abs|ct[lt]z|ctpop|fsh)", each.callee):
            return SHIFT
        return 0.0
    return 0.3


@dataclass
class Recurrence:
    """The slowest cycle of operators from a trip of a loop to the next."""

    loop: Loop
    delay: float
    """ns a trip"""
    path: list[str]
    """Its operators, with the ns at which their results are ready."""

    @property
    def budget(self) -> float:
        return BUDGET * self.loop.interval


@dataclass
class Step:
    block: str
    name: str
    kind: str
    delay: float
    operands: list[str]
    sources: list[tuple[str, str]]
    """Of a phi: (value, block)."""
    memory: list[str]
    text: str


def is_flag(loop: Loop, each: Instruction) -> bool:
    """Whether an instruction tests a bool, which clang keeps as a byte: it is one wire."""
    found = re.match(rf"icmp (?:eq|ne) i8 ({VALUE.pattern}), 0$", each.text)
    return found is not None and is_bool(loop, found[1], set())


def is_bool(loop: Loop, value: str, seen: set[str]) -> bool:
    """Whether a byte is 0 or 1: made from a bit, or chosen among such bytes."""
    if value in ("0", "1") or value in seen:
        return True
    made = loop.function.defined.get(value)
    if made is None:
        return False
    if re.match(r"and i8 .*, 1$|zext i1 ", made.text):
        return True
    if made.opcode == "phi":
        sources = re.findall(r"\[ ([^,]+), %", made.text)
    elif made.opcode == "select":
        sources = re.findall(r", i8 ([^,]+)", made.text)
    else:
        return False
    return all(is_bool(loop, source, seen | {value}) for source in sources)


def places(unit: Unit, loop: Loop, each: Instruction) -> list[banks.Access]:
    pointer = banks.pointer_of(banks.split(each.text)[1])
    found = banks.chains(unit, loop.function, pointer)
    return [banks.resolve(unit, chain, each.opcode) for chain in found]


def place_of(access: banks.Access) -> str:
    return "/".join([access.memory, *access.fields])


def fixed_places(unit: Unit, loop: Loop) -> set[str]:
    """Arrays of the process whose elements a loop names by constants only: each is a register."""
    all_places, moving = set(), set()
    for _, each in loop.instructions():
        if each.opcode in ("load", "store"):
            for access in places(unit, loop, each):
                all_places.add(place_of(access))
                if not all(map(banks.is_constant, access.address)):
                    moving.add(place_of(access))
    return all_places - moving


def reached(unit: Unit, loop: Loop, each: Instruction, fixed: set[str]) -> tuple[float, list[str]]:
    """Delay of a load or store, and the variables of the process that it may reach."""
    delay = 0.0
    memory: list[str] = []
    given = {name: kind for kind, name in loop.function.arguments}
    for access in places(unit, loop, each):
        made = loop.function.defined.get(access.memory)
        name = place_of(access)
        if made is not None and made.opcode == "alloca":
            if name in fixed:
                memory.append("/".join([name, "at", *access.address]))
            else:
                memory.append(name)
                delay = max(delay, SELECT)
        elif access.memory.startswith("@"):
            delay = max(delay, RAM_READ)
        elif "dereferenceable" not in given.get(access.memory, ""):
            delay = max(delay, PORT_READ)
    return delay, memory


def steps_of(unit: Unit, loop: Loop, order: list[str]) -> list[Step]:
    """The instructions of a loop's body in an order in which values are defined before use."""
    function = loop.function
    defined = {each.name for _, each in loop.instructions() if each.name}
    fixed = fixed_places(unit, loop)
    steps = []
    for block in order:
        for each in function.blocks[block]:
            operands = [name for name in each.operands if name in defined]
            kind, delay = "operator", delay_of(each)
            if is_flag(loop, each):
                delay = 0.0
            memory: list[str] = []
            sources: list[tuple[str, str]] = []
            if each.opcode == "phi":
                kind = "phi"
                found = re.findall(r"\[ ([^,]+), %([-\w.$]+|\"[^\"]*\") \]", each.text)
                sources = [(value, label.strip('"')) for value, label in found]
            elif each.opcode in ("br", "switch"):
                kind = "branch"
            elif each.opcode in ("load", "store"):
                kind = each.opcode
                delay, memory = reached(unit, loop, each, fixed)
            elif each.callee.startswith("kgrc_") and each.callee != MARK:
                kind = "stream"
            elif each.callee.startswith("llvm.lifetime.start"):
                kind = "begin"
                pointer = each.text[each.text.rindex("%") :].rstrip(")")
                memory = [chain[0] for chain in banks.chains(unit, function, pointer)]
            steps.append(Step(block, each.name, kind, delay, operands, sources, memory, each.text))
    return steps


def recurrence(unit: Unit, loop: Loop) -> Recurrence:
    """The slowest cycle of operators of a loop.

    Values that a branch chooses wait for its condition, an access of a stream for the conditions
    under which it happens, and all of a trip for the decision to make it. The arrival times of the
    values that are carried are computed for trip after trip (max-plus algebra); what they grow by
    in a trip is the delay.
    """
    function, header = loop.function, loop.header
    inside = {b: [t for t in function.following[b] if t in loop.body and t != header]
              for b in loop.body}  # fmt: skip
    before: dict[str, list[str]] = {b: [] for b in loop.body}
    for block, targets in inside.items():
        for target in targets:
            before[target].append(block)
    order = reverse_postorder(header, inside)
    over = dominators(header, inside)
    # blocks that follow whatever a branch decides do not wait for it
    back = {b: list(before[b]) for b in loop.body} | {"": list(loop.latches)}
    after = dominators("", back)
    nearest = {b: max((d for d in over[b] if d != b), key=lambda d: len(over[d]), default=None)
               for b in order}  # fmt: skip
    steps = steps_of(unit, loop, order)
    by_block: dict[str, list[Step]] = {b: [] for b in order}
    for step in steps:
        by_block[step.block].append(step)
    carried = [step for step in by_block[header] if step.kind == "phi"]
    cells = sorted(
        {name for step in steps if step.kind in ("load", "store") for name in step.memory}
    )
    state = {step.name: 0.0 for step in carried} | {f"cell {name}": 0.0 for name in cells}
    state["decision"] = 0.0
    history = []
    cause: dict[str, str | None] = {}
    arrived: dict[str, float] = {}
    for _ in range(2 * PASSES):
        arrived, cause, state = one_trip(
            *(loop, order, by_block, before, after, nearest, carried, cells, state)
        )
        history.append(state)
    last, middle = history[-1], history[PASSES - 1]
    growth = {name: (last[name] - middle[name]) / PASSES for name in last
              if middle[name] > NEVER}  # fmt: skip
    if not growth or max(growth.values()) <= 0:
        return Recurrence(loop, 0.0, [])
    worst = max(growth, key=lambda name: growth[name])
    return Recurrence(loop, growth[worst], list(trace(worst, arrived, cause, steps)))


def one_trip(
    loop: Loop,
    order: list[str],
    by_block: dict[str, list[Step]],
    before: dict[str, list[str]],
    after: dict[str, set[str]],
    nearest: dict[str, str | None],
    carried: list[Step],
    cells: list[str],
    state: dict[str, float],
) -> tuple[dict[str, float], dict[str, str | None], dict[str, float]]:
    """Arrival times within a trip, what each waits for, and those of what the next trip gets."""
    arrived: dict[str, float] = dict(state)
    cause: dict[str, str | None] = {}
    control: dict[str, tuple[float, str | None]] = {}
    decided: dict[str, tuple[float, str | None]] = {}

    always = {block for block in order if block in after.get(loop.header, ())}

    def latest(
        names: list[str], than: tuple[float, str | None] = (NEVER, None)
    ) -> tuple[float, str | None]:
        best = than
        for name in names:
            time = arrived.get(name, NEVER)
            if time > best[0]:
                best = (time, name)
        return best

    for block in order:
        above = nearest[block]
        if block == loop.header:
            control[block] = (state["decision"], "decision")
        elif above is not None and block in after.get(above, ()):
            control[block] = control[above]
        else:
            best: tuple[float, str | None] = (NEVER, None)
            for each in before[block]:
                best = max(best, control[each], decided.get(each, best), key=lambda pair: pair[0])
            control[block] = best
        for step in by_block[block]:
            if step.kind == "phi":
                if block == loop.header:
                    continue
                best = (NEVER, None)
                for value, label in step.sources:
                    if label in control:
                        best = latest([value], best)
                        best = max(best, control[label], decided.get(label, best),
                                   key=lambda pair: pair[0])  # fmt: skip
                arrived[step.name], cause[step.name] = best[0] + step.delay, best[1]
            elif step.kind == "branch":
                decided[block] = latest(step.operands)
            elif step.kind == "load":
                best = latest([*step.operands, *(f"cell {name}" for name in step.memory)])
                arrived[step.name], cause[step.name] = best[0] + step.delay, best[1]
            elif step.kind == "store":
                for name in step.memory:
                    cell = f"cell {name}"
                    if len(step.memory) == 1 and "/at" in name and block in always:
                        best = latest(step.operands)  # whatever it held
                        arrived[cell], cause[cell] = best
                        continue
                    best = latest([*step.operands, cell], control[block])
                    if best[1] != cell:
                        arrived[cell], cause[cell] = best[0] + SELECT, best[1]
            elif step.kind == "begin":
                # a variable of the trip: it keeps nothing of the trip before
                for cell in arrived:
                    if cell.startswith("cell ") and cell[5:].split("/")[0] in step.memory:
                        arrived[cell] = NEVER
            elif step.kind == "stream":
                best = latest(step.operands, control[block])
                if step.name:
                    arrived[step.name], cause[step.name] = best[0] + step.delay, best[1]
            elif step.name:
                best = latest(step.operands)
                arrived[step.name], cause[step.name] = best[0] + step.delay, best[1]
    handed = {}
    for step in carried:
        values = [value for value, label in step.sources if label in loop.latches]
        best = latest(values)
        handed[step.name], cause[f"next {step.name}"] = best
    for name in cells:
        handed[f"cell {name}"], cause[f"next cell {name}"] = arrived[f"cell {name}"], None
        cause[f"next cell {name}"] = cause.get(f"cell {name}")
    ends = [max(control[b], decided.get(b, (NEVER, None)), key=lambda pair: pair[0])
            for b in loop.latches]  # fmt: skip
    handed["decision"], cause["next decision"] = max(ends, key=lambda pair: pair[0])
    return arrived, cause, handed


def trace(
    worst: str, arrived: dict[str, float], cause: dict[str, str | None], steps: list[Step]
) -> Iterator[str]:
    """The operators of a cycle that the worst carried value waits for, the last one first."""
    texts = {step.name: step.text for step in steps if step.name}
    carried = {name[5:] for name in cause if name.startswith("next ")}

    def within_trip(name: str) -> tuple[list[str], str | None]:
        at, seen = cause.get(f"next {name}"), []
        while at is not None and at not in seen and at not in carried:
            seen.append(at)
            at = cause.get(at)
        return seen, at

    # back from trip to trip until a carried value comes again: that one lies on the cycle
    passed: list[str] = []
    at: str | None = worst
    while at is not None and at not in passed:
        passed.append(at)
        at = within_trip(at)[1]
    cycle = passed[passed.index(at) :] if at in passed else []
    for name in cycle:
        operators, begin = within_trip(name)
        start = arrived.get(begin or "", 0.0)
        for operator in operators:
            yield f"{arrived[operator] - start:6.2f} ns  {operator} = {texts.get(operator)}"[:110]
        yield f"  0.00 ns  {begin}, of the trip before"


def check_delays(unit: Unit) -> list[str]:
    """Faults: loops whose carried delay is over its budget."""
    faults = []
    for loop in unit.loops:
        found = recurrence(unit, loop)
        if found.delay > found.budget:
            faults.append(
                f"{loop.where}: {found.delay:.2f} ns from a trip to the next, the budget at "
                f"II = {loop.interval} is {found.budget:.2f} ns"
            )
    return faults


def check_divisions(unit: Unit) -> list[str]:
    """Faults: divisions and remainders in pipelined loops, but by constant powers of two."""
    faults = []
    for loop in unit.loops:
        found = [
            each
            for _, each in loop.instructions()
            if each.opcode in ("sdiv", "udiv", "srem", "urem") and delay_of(each) >= DIVIDE
        ]
        if found:
            faults.append(
                f"{loop.where}: {len(found)} divisions in a pipelined loop, the first is "
                f"{found[0].name} = {found[0].text}"
            )
    return faults
