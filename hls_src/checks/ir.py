"""The LLVM IR of the HLS sources as synthesis sees them, and its pipelined loops.

clang 14 compiles a source with `__SYNTHESIS__`, plain integer types and stand-ins for the vendor's
headers (stubs/). Functions are inlined and loops with constant bounds unrolled, as Vitis HLS does
in a pipelined loop. A call marks each pipelined loop: it takes the place of its PIPELINE pragma.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import config_header
from pynq_kgrc.errors import KgrcError

CLANG = "clang-14"
STUBS = Path(__file__).resolve().parent / "stubs"
SECONDS = 300
"""Time limit of a run of the compiler."""

FRONT = [
    *("-std=c++14", "-O2", "-DKGRC_PLAIN", "-D__SYNTHESIS__", "-fno-exceptions", "-fno-rtti"),
    *("-fno-stack-protector", "-fno-builtin", "-fno-discard-value-names", "-w"),
    *("-Xclang", "-disable-llvm-passes", "-S", "-emit-llvm"),
]
"""To IR, without any optimization yet."""
PASSES = (
    *("unroll-threshold=1000000000", "unroll-full-max-count=100000", "unroll-runtime=false"),
    *("unroll-allow-partial=false", "unroll-allow-peeling=false", "inline-threshold=1000000"),
    # an access of one bank or of another stays two accesses, each with its own address
    *("sink-common-insts=false", "hoist-common-insts=false"),
    # and one access at a chosen address stays one
    "jump-threading-threshold=0",
)
BACK = [
    *("-O2", "-w", "-fno-vectorize", "-fno-slp-vectorize", "-fno-discard-value-names"),
    *(word for option in PASSES for word in ("-mllvm", f"-{option}")),
    *("-S", "-emit-llvm", "-x", "ir"),
]
"""From IR to IR: everything inlined, loops with constant bounds unrolled."""

MARK = "kgrc_pipelined"
OPAQUE = (
    *(MARK, "kgrc_fifo_read", "kgrc_fifo_write", "kgrc_port_request", "kgrc_port_read"),
    "kgrc_port_write",
)
"""Calls that stand for hardware outside of the IR: they touch no memory of the process."""

VALUE = re.compile(r'%(?:[-\w.$]+|"[^"]*")')


LABEL = re.compile(r"\s*(\w+):\s*$")


class CheckError(KgrcError):
    """The sources cannot be checked: no compiler, or it refuses them."""


def name_of(symbol: str) -> str:
    """The name in the source of a mangled symbol."""
    local = re.match(r"_ZZ.*E(\d+)([A-Za-z_]\w*)$", symbol)
    if local:
        return local[2][: int(local[1])]
    rest = re.sub(r"^_Z(N[VK]*)?", "", symbol)
    name = symbol
    while part := re.match(r"L?(\d+)", rest):
        size, start = int(part[1]), part.end()
        name, rest = rest[start : start + size], rest[start + size :]
    return name


@dataclass
class Instruction:
    """An instruction; `name` is the value that it defines, "" if none."""

    name: str
    opcode: str
    text: str
    operands: list[str] = field(default_factory=list)

    @property
    def callee(self) -> str:
        found = re.search(r'@([-\w.$]+|"[^"]+")\(', self.text) if self.opcode == "call" else None
        return found[1] if found else ""


@dataclass
class Function:
    """A function: blocks in order, the edges between them, and where each value is defined."""

    symbol: str
    arguments: list[tuple[str, str]]
    """(type and attributes, name)"""
    blocks: dict[str, list[Instruction]] = field(default_factory=dict)
    following: dict[str, list[str]] = field(default_factory=dict)
    before: dict[str, list[str]] = field(default_factory=dict)
    defined: dict[str, Instruction] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Without its namespaces and the types of its arguments."""
        return name_of(self.symbol)


@dataclass
class Loop:
    """A pipelined loop of a source, with the blocks of its body."""

    function: Function
    source: str
    line: int
    """Of its PIPELINE pragma."""
    label: str
    interval: int
    """Initiation interval that is asked for."""
    header: str
    latches: list[str]
    body: set[str]

    @property
    def where(self) -> str:
        return f"{self.source}:{self.line}: {self.function.name}/{self.label}"

    def instructions(self) -> Iterator[tuple[str, Instruction]]:
        """(block, instruction) of the body."""
        for block in self.function.blocks:
            if block in self.body:
                for each in self.function.blocks[block]:
                    yield block, each


@dataclass
class Unit:
    """A compiled source."""

    source: str
    text: str
    """With the marks in place of the PIPELINE pragmas; line numbers are the source's."""
    types: dict[str, str]
    globals: dict[str, str]
    """Type by symbol."""
    functions: list[Function]
    loops: list[Loop]


def find_compiler() -> str | None:
    """The command of clang 14, or None."""
    return shutil.which(CLANG)


def run_clang(arguments: list[str], what: str) -> None:
    command = find_compiler()
    if command is None:
        raise CheckError(f"no {CLANG} on PATH; on Debian: apt-get install {CLANG}")
    try:
        done = subprocess.run(
            [command, *arguments], capture_output=True, text=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CheckError(f"{what}: {CLANG} took more than {SECONDS} s") from None
    if done.returncode:
        raise CheckError(f"{what}: {CLANG} refuses it: {done.stderr.strip()[-1500:]}")


def mark_loops(text: str) -> str:
    """A source with calls that mark the pipelined loops, in place of their pragmas."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        found = re.match(r"\s*#\s*pragma\s+HLS\s+PIPELINE\b(?:\s+II\s*=\s*(\w+))?", line)
        if not found:
            continue
        lines[number] = f"::{MARK}({found[1] or 1}, {number + 1});"
        at = label_before(lines, number)
        for i in range(at, number):
            if re.match(r"\s*(for|while|do)\b", lines[i]):
                lines[i] = '_Pragma("clang loop unroll(disable)")' + lines[i]
                break
    return "\n".join(lines)


def label_before(lines: list[str], number: int) -> int:
    """The index of the nearest line above `number` that is a label, 0 if there is none."""
    return next((i for i in range(number, 0, -1) if LABEL.match(lines[i])), 0)


def compile_unit(sources: Path, name: str, config: AcceleratorConfig, folder: Path) -> Unit:
    """A source of the folder `sources`, compiled for a design; `folder` is for scratch files.

    Raises:
        CheckError: clang 14 is missing, or refuses the source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for path in sources.glob("*.[ch]*"):
        (folder / path.name).write_text(mark_loops(path.read_text("utf-8")), "utf-8")
    (folder / "config.h").write_text(config_header(config), "utf-8")
    (folder / "marks").write_text(f'extern "C" void {MARK}(int, int);\n', "utf-8")
    text = (folder / name).read_text("utf-8")
    front, back = folder / f"{name}.front.ll", folder / f"{name}.ll"
    include = [
        "-include",
        str(folder / "marks"),
        f"-I{folder}",
        f"-I{STUBS}",
        f"-I{STUBS / 'plain'}",
    ]
    run_clang([*FRONT, *include, str(folder / name), "-o", str(front)], name)
    front.write_text(hide_memory(front.read_text("utf-8")), "utf-8")
    run_clang([*BACK, str(front), "-o", str(back)], name)
    return read_unit(name, text, back.read_text("utf-8"))


def hide_memory(text: str) -> str:
    """The IR with the opaque calls declared as touching no memory that the process can see."""
    names = "|".join(OPAQUE)
    return re.sub(
        rf"^(declare [^\n]*@(?:{names})\([^\n]*\))[^\n]*$",
        r"\1 inaccessiblememonly nounwind willreturn",
        text,
        flags=re.M,
    )


def read_unit(source: str, text: str, ir: str) -> Unit:
    """The parsed IR of a source."""
    types = dict(re.findall(r'^(%(?:[-\w.$]+|"[^"]*")) = type (.*)$', ir, re.M))
    found = {}
    for name, rest in re.findall(
        r'^(@(?:[-\w.$]+|"[^"]*")) = [^\n]*?\b(?:global|constant) (.*)$', ir, re.M
    ):
        found[name] = first_type(rest)
    unit = Unit(source, text, types, found, [], [])
    for match in re.finditer(r"^define .*?@([-\w.$]+)\((.*?)\)[^\n]*\{\n(.*?)^\}", ir, re.M | re.S):
        function = Function(
            match[1], re.findall(r"([^,()]*(?:\([^()]*\))?[^,()]*?)(%[-\w.$]+)(?:,|$)", match[2])
        )
        read_blocks(function, match[3])
        unit.functions.append(function)
        unit.loops += find_loops(function, unit)
    return unit


def first_type(text: str) -> str:
    """The type that a text begins with."""
    depth, quoted = 0, False
    for i, letter in enumerate(text):
        if letter == '"':
            quoted = not quoted
        elif quoted:
            continue
        elif letter in "[{<(":
            depth += 1
        elif letter in "]}>)":
            depth -= 1
        elif letter in " ," and depth == 0:
            return text[:i]
    return text


def read_blocks(function: Function, body: str) -> None:
    block = "entry"
    joined = re.sub(
        r"\[\n(.*?)\n\s*\]", lambda m: "[" + m[1].replace("\n", " ") + "]", body, flags=re.S
    )
    first = True
    for line in joined.split("\n"):
        label = re.match(r'([-\w.$]+|"[^"]*"):', line)
        if label:
            block = label[1].strip('"')
            function.blocks[block] = []
            first = False
            continue
        line = re.sub(r"(, ![\w.]+ !\d+)+$", "", line.strip())
        line = re.sub(
            r"(, !tbaa !\d+|, !noalias !\d+|, !alias\.scope !\d+|, !range !\d+)", "", line
        )
        line = re.sub(r" #\d+$", "", line)
        if not line or line.startswith(";"):
            continue
        if first:
            function.blocks[block] = []
            first = False
        named = re.match(r'(%(?:[-\w.$]+|"[^"]*")) = (.*)', line)
        name, text = (named[1], named[2]) if named else ("", line)
        opcode = re.sub(r"^(tail|musttail|notail) ", "", text).split(None, 1)[0]
        each = Instruction(name, opcode, text)
        function.blocks[block].append(each)
        if name:
            function.defined[name] = each
    function.before = {name: [] for name in function.blocks}
    for name, instructions in function.blocks.items():
        targets = re.findall(r'label %([-\w.$]+|"[^"]*")', instructions[-1].text)
        function.following[name] = list(dict.fromkeys(each.strip('"') for each in targets))
        for target in function.following[name]:
            function.before[target].append(name)
        for each in instructions:
            each.operands = [v for v in VALUE.findall(each.text) if v in function.defined]


def dominators(start: str, following: dict[str, list[str]]) -> dict[str, set[str]]:
    """The blocks that each block that can be reached from `start` is dominated by."""
    order = reverse_postorder(start, following)
    reached = set(order)
    before = defaultdict(list)
    for block in order:
        for target in following.get(block, ()):
            if target in reached:
                before[target].append(block)
    found = {block: set(reached) for block in order}
    found[start] = {start}
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            new = set.intersection(*(found[each] for each in before[block])) | {block}
            if new != found[block]:
                found[block] = new
                changed = True
    return found


def reverse_postorder(start: str, following: dict[str, list[str]]) -> list[str]:
    done: list[str] = []
    seen = {start}
    stack = [(start, iter(following.get(start, ())))]
    while stack:
        block, targets = stack[-1]
        for target in targets:
            if target not in seen:
                seen.add(target)
                stack.append((target, iter(following.get(target, ()))))
                break
        else:
            done.append(block)
            stack.pop()
    return done[::-1]


def find_loops(function: Function, unit: Unit) -> Iterator[Loop]:
    """The pipelined loops of a function: for each mark, the innermost loop around it."""
    entry = next(iter(function.blocks))
    over = dominators(entry, function.following)
    bodies: dict[str, set[str]] = defaultdict(set)
    latches: dict[str, list[str]] = defaultdict(list)
    for block in over:
        for target in function.following[block]:
            if target in over[block]:
                latches[target].append(block)
                bodies[target].add(target)
                todo = [block]
                while todo:
                    each = todo.pop()
                    if each not in bodies[target]:
                        bodies[target].add(each)
                        todo += [b for b in function.before[each] if b in over]
    lines = unit.text.split("\n")
    inner = [h for h in bodies if not any(bodies[o] < bodies[h] for o in bodies)]
    found: dict[tuple[int, str], int] = {}
    for block in over:
        for call in function.blocks[block]:
            around = [header for header, body in bodies.items() if block in body]
            # the mark of a loop that ends after one trip is in no loop of its own
            if call.callee == MARK and around:
                interval, line = map(int, re.findall(r"i32 (?:\w+ )*(\d+)", call.text)[:2])
                found[line, min(around, key=lambda h: len(bodies[h]))] = interval
    for (line, header), interval in found.items():
        # clang may take the first trip out of a loop: that copy is in the loop around it
        if header not in inner and any(n == line and h in inner for n, h in found):
            continue
        named = LABEL.match(lines[label_before(lines, line - 1)])
        yield Loop(
            *(function, unit.source, line, named[1] if named else "?", interval, header),
            *(latches[header], bodies[header]),
        )
