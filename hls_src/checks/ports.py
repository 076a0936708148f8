"""Memory ports: accesses that can become bursts, requests in one place.

An access through a plain pointer becomes part of a burst only if each trip makes it, at an address
without a division (UG1399, "Optimizing AXI System Performance"). Requests by hand
(hls::burst_maxi) are made in memory.cpp, through the class MemoryPort of port.h.
"""

from __future__ import annotations

import re
from pathlib import Path

import banks
from ir import Loop, Unit, dominators

MAY_NAME_PORTS = {"port.h"}
MAY_REQUEST = {"port.h", "memory.cpp", "plan.cpp"}


def every_trip(loop: Loop) -> set[str]:
    """The blocks that each trip of a loop runs through."""
    inside = {
        block: [
            to for to in loop.function.following[block] if to in loop.body and to != loop.header
        ]
        for block in loop.body
    }
    over = dominators(loop.header, inside)
    return set.intersection(*(over[latch] for latch in loop.latches))


def check_ports(unit: Unit) -> list[str]:
    """Faults: loads and stores of memory ports that some trips of a pipelined loop leave out."""
    faults = []
    for loop in unit.loops:
        given = {name: kind for kind, name in loop.function.arguments}
        always = every_trip(loop)
        for block, each in loop.instructions():
            if each.opcode not in ("load", "store") or block in always:
                continue
            pointer = banks.pointer_of(banks.split(each.text)[1])
            for base, _, _ in banks.chains(unit, loop.function, pointer):
                # references have a size that is known, the pointers of ports have not
                if base in given and "dereferenceable" not in given[base]:
                    fault = f"{loop.where}: {each.opcode} of {base[1:]} under a condition"
                    if fault not in faults:
                        faults.append(fault)
    return faults


def check_requests(sources: Path) -> list[str]:
    """Faults: ports of burst_maxi outside of port.h, requests outside of the memory processes."""
    faults = []
    for path in sorted(sources.glob("*.[ch]*")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            code = line.split("//")[0]
            where = f"{path.name}:{number}"
            if "burst_maxi" in code and path.name not in MAY_NAME_PORTS:
                faults.append(f"{where}: burst_maxi; use the class MemoryPort of port.h")
            found = re.search(r"\b(read_request|write_request|write_response)\(", code)
            if found and path.name not in MAY_REQUEST:
                faults.append(f"{where}: {found[1]} outside of {', '.join(sorted(MAY_REQUEST))}")
    return faults
