"""A linter for the HLS sources: constructs that Vitis HLS would refuse or silently change.

``python hls_src/scripts/lint.py hls_src --design 8-sparse``

libclang parses the sources as synthesis sees them (`__SYNTHESIS__`, with stand-ins for the
vendor's headers of streams and of memory ports). Rules check the syntax tree and the pragmas.
Findings are printed as `file:line: text`; the exit status is 1 if there are any. Whether the tool
reaches the II that is asked for cannot be said here.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pynq_kgrc.accelerator.config import read_design
from pynq_kgrc.accelerator.header import config_header
from pynq_kgrc.backends.csim import SOURCES
from pynq_kgrc.errors import KgrcError

try:
    from clang import cindex
except ImportError:
    sys.exit("no libclang: pip install -c constraints.txt libclang")

Kind, TypeKind = cindex.CursorKind, cindex.TypeKind

TOP = "kgrc_run"

STREAM = """
#pragma once
namespace hls {
template <class Value>
class stream {
 public:
  explicit stream(const char*) {}
  void write(const Value& value) { cell = value; }
  Value read() { return cell; }
  bool read_nb(Value& value) { value = cell; return true; }
  bool empty() const { return false; }
 private:
  Value cell;
};
}
"""

BURST_MAXI = """
#pragma once
#include <stddef.h>
namespace hls {
template <class Value>
class burst_maxi {
 public:
  burst_maxi(Value* memory) : cell(memory) {}
  void read_request(size_t, unsigned) {}
  Value read() { return *cell; }
  void write_request(size_t, unsigned) {}
  void write(const Value& value) { *cell = value; }
  void write_response() {}
 private:
  Value* cell;
};
}
template <int kBits>
class ap_uint {
 public:
  struct Part {
    unsigned long long* word;
    operator unsigned long long() const { return *word; }
    void operator=(unsigned long long value) { *word = value; }
  };
  Part range(int, int low) { return Part{&words[low / 64]}; }
  unsigned long long range(int, int low) const { return words[low / 64]; }
 private:
  unsigned long long words[kBits / 64];
};
"""

FORBIDDEN = {
    Kind.CXX_NEW_EXPR: "new",
    Kind.CXX_DELETE_EXPR: "delete",
    Kind.CXX_THROW_EXPR: "throw",
    Kind.CXX_TRY_STMT: "try",
    Kind.GOTO_STMT: "goto",
}

HEAP = {"malloc", "calloc", "realloc", "free", "alloca"}

FUNCTIONS = (Kind.FUNCTION_DECL, Kind.CXX_METHOD, Kind.FUNCTION_TEMPLATE, Kind.CONSTRUCTOR)
VARIABLES = (Kind.VAR_DECL, Kind.PARM_DECL, Kind.FIELD_DECL)
LOOPS = (Kind.FOR_STMT, Kind.WHILE_STMT, Kind.DO_STMT, Kind.CXX_FOR_RANGE_STMT)

RAM = re.compile(r"\bRam<[^,]+, \d+(?:, (\d+))?>")
"""A type that is or holds a Ram, and its distance where it is not the default 0."""

DIRECTIVES = {
    "INTERFACE": "m_axi s_axilite port offset bundle depth max_read_burst_length "
    "max_write_burst_length num_read_outstanding num_write_outstanding",
    "PIPELINE": "II style",
    "UNROLL": "factor",
    "INLINE": "off",
    "DATAFLOW": "",
    "STABLE": "variable",
    "STREAM": "variable depth",
    "DEPENDENCE": "variable inter intra RAW WAR WAW distance true false",
    "ARRAY_PARTITION": "variable complete cyclic block factor dim",
    "BIND_OP": "variable op impl",
    "BIND_STORAGE": "variable type impl",
}
"""The directives that hls_src may use, and their words; UG1399 has more.

AGGREGATE is not among them: it would make one scalar of a whole array of structs."""


@dataclass
class Function:
    """A function of the sources with its loops, variables and calls."""

    cursor: Any
    path: Path
    lines: range
    loops: list[Loop] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)

    @property
    def name(self) -> str:
        return str(self.cursor.spelling)


@dataclass
class Loop:
    """A loop, the label before it, and the loops around it, innermost first."""

    cursor: Any
    label: str | None
    around: tuple[Loop, ...]
    lines: range


@dataclass
class Pragma:
    """A pragma; an option without a value has the value ""."""

    path: Path
    line: int
    directive: str
    options: dict[str, str]

    @property
    def where(self) -> str:
        return f"{self.path.name}:{self.line}: {self.directive}"


def include_folder() -> str:
    """The folder of gcc's stddef.h: the wheel of libclang has none of its own."""
    done = subprocess.run(
        ["gcc", "-print-file-name=include"], capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def synthesis_flags(sources: Path, folder: Path, design: str) -> list[str]:
    """Compiler flags for the sources as synthesis sees them, but with plain integer types.

    Writes config.h of the design, and the stand-ins for the vendor's headers, to `folder`.
    """
    (folder / "config.h").write_text(config_header(read_design(design)))
    (folder / "hls_stream.h").write_text(STREAM)
    (folder / "hls_burst_maxi.h").write_text(BURST_MAXI)
    return ["-std=c++14", "-DKGRC_PLAIN", "-D__SYNTHESIS__", f"-I{folder}", f"-I{sources}"]


def lines_of(cursor: Any) -> range:
    return range(cursor.extent.start.line, cursor.extent.end.line + 1)


class Sources:
    """The parsed sources of a design; the rules add what they find to `faults`."""

    def __init__(self, sources: Path, folder: Path, design: str) -> None:
        self.folder = sources
        self.scratch = folder
        self.faults: list[str] = []
        self.functions: dict[str, Function] = {}
        self.globals: set[str] = set()
        self.members: set[str] = set()
        self.memories: dict[str, int] = {}
        """Variables of class Ram -> the distance that they keep (kDistance)."""
        flags = synthesis_flags(sources, folder, design)
        flags += ["-x", "c++", "-isystem", include_folder()]
        index = cindex.Index.create()
        for name in SOURCES:
            unit = index.parse(str(sources / name), flags)
            for diagnostic in unit.diagnostics:
                if diagnostic.severity >= cindex.Diagnostic.Error:
                    self.add_fault(diagnostic.location, diagnostic.spelling)
            self.walk(unit.cursor, None, ())
        self.pragmas = [p for path in sorted(sources.glob("*.[ch]*")) for p in read_pragmas(path)]

    @property
    def top(self) -> Function:
        """The kernel's function."""
        return next(f for f in self.functions.values() if f.name == TOP)

    def add_fault(self, location: Any, text: str) -> None:
        name = Path(location.file.name).name if location.file else "?"
        fault = f"{name}:{location.line}: {text}"
        if fault not in self.faults:
            self.faults.append(fault)

    def is_own(self, cursor: Any) -> bool:
        """Whether a cursor lies in the sources themselves, not in a header of the system."""
        file = cursor.location.file
        return file is not None and Path(file.name).parent == self.folder

    def walk(
        self,
        cursor: Any,
        function: Function | None,
        loops: tuple[Loop, ...],
        label: str | None = None,
    ) -> None:
        for child in cursor.get_children():
            if cursor.kind == Kind.TRANSLATION_UNIT and not self.is_own(child):
                continue
            self.check_cursor(child)
            inside: Function | None = function
            around = loops
            if child.kind in FUNCTIONS and child.is_definition():
                path = Path(child.location.file.name)
                parsed = Function(child, path, lines_of(child))
                inside = self.functions.setdefault(child.get_usr(), parsed)
                around = ()
            elif child.kind in LOOPS and function is not None:
                loop = Loop(child, label, loops, lines_of(child))
                function.loops.append(loop)
                around = (loop, *loops)
            elif child.kind in VARIABLES:
                memory = RAM.search(child.type.get_canonical().spelling)
                if memory:
                    self.memories[child.spelling] = int(memory[1] or 0)
                if function is not None:
                    function.variables[child.spelling] = child
                elif child.kind == Kind.FIELD_DECL:
                    self.members.add(child.spelling)
                else:
                    self.globals.add(child.spelling)
            elif child.kind == Kind.CALL_EXPR and function is not None:
                function.calls.append(child)
            of = child.spelling if child.kind == Kind.LABEL_STMT else None
            self.walk(child, inside, around, of)

    def check_cursor(self, cursor: Any) -> None:
        """The rules that need one cursor only."""
        if cursor.kind in FORBIDDEN:
            self.add_fault(cursor.location, FORBIDDEN[cursor.kind])
        if cursor.kind == Kind.CXX_METHOD and cursor.is_virtual_method():
            self.add_fault(cursor.location, "virtual")
        if cursor.kind == Kind.CALL_EXPR and cursor.spelling in HEAP:
            self.add_fault(cursor.location, f"heap: {cursor.spelling}")
        if cursor.kind in VARIABLES or cursor.kind == Kind.TYPEDEF_DECL:
            kind = cursor.type.get_canonical()
            if "std::" in kind.spelling:
                self.add_fault(cursor.location, f"std: {kind.spelling}")
            while kind.kind in (TypeKind.CONSTANTARRAY, TypeKind.INCOMPLETEARRAY):
                kind = kind.element_type.get_canonical()
            if kind.kind == TypeKind.VARIABLEARRAY:
                self.add_fault(cursor.location, f"array of variable length: {cursor.spelling}")
            if kind.kind in (TypeKind.POINTER, TypeKind.LVALUEREFERENCE):
                target = kind.get_pointee().get_canonical().kind
                if target in (TypeKind.FUNCTIONPROTO, TypeKind.FUNCTIONNOPROTO):
                    self.add_fault(cursor.location, f"pointer to a function: {cursor.spelling}")
                if target == TypeKind.POINTER:
                    self.add_fault(cursor.location, f"pointer to a pointer: {cursor.spelling}")

    def function_at(self, path: Path, line: int) -> Function | None:
        """The innermost function around a line."""
        found = [f for f in self.functions.values() if f.path == path and line in f.lines]
        return min(found, key=lambda f: len(f.lines), default=None)

    def loop_at(self, function: Function, line: int) -> Loop | None:
        """The innermost loop around a line."""
        found = [loop for loop in function.loops if line in loop.lines]
        return min(found, key=lambda loop: len(loop.lines), default=None)


def read_pragmas(path: Path) -> Iterator[Pragma]:
    """The pragmas of a file but `once`, each with the line where it begins."""
    lines = path.read_text().splitlines()
    for number, text in enumerate(lines, 1):
        following = number
        while text.endswith("\\") and following < len(lines):
            text = text[:-1] + lines[following]
            following += 1
        found = re.match(r"\s*#\s*pragma\s+HLS\s+(\w+)(.*)", text)
        if found:
            words = re.sub(r"\s*=\s*", "=", found[2]).split()
            options: dict[str, str] = dict(word.partition("=")[::2] for word in words)
            yield Pragma(path, number, found[1], options)
        elif re.match(r"\s*#\s*pragma\s+(?!once)", text):
            yield Pragma(path, number, text.split("pragma", 1)[1].strip(), {})


# ---- rules over the call graph, the loops and the pragmas -------------------------------------


def callees(sources: Sources, function: Function) -> Iterator[Function]:
    """The functions of the sources that a function calls."""
    for call in function.calls:
        target = call.referenced
        if target is not None:
            target = cindex.conf.lib.clang_getSpecializedCursorTemplate(target) or target
            known = sources.functions.get(target.get_usr())
            if known is not None:
                yield known


def reached(sources: Sources, start: Iterable[Function]) -> dict[str, Function]:
    """The functions of `start` and all that they call, directly or not."""
    seen: dict[str, Function] = {}
    todo = list(start)
    while todo:
        function = todo.pop()
        if function.cursor.get_usr() not in seen:
            seen[function.cursor.get_usr()] = function
            todo += callees(sources, function)
    return seen


def check_recursion(sources: Sources) -> None:
    """No function calls itself."""
    for usr, function in sources.functions.items():
        if usr in reached(sources, callees(sources, function)):
            sources.add_fault(function.cursor.location, f"recursion: {function.name}")


def is_constant(cursor: Any, counters: set[str]) -> bool:
    """Whether an expression is a constant once the loops over `counters` are unrolled."""
    for part in cursor.walk_preorder():
        if part.kind == Kind.CALL_EXPR:
            return False
        if part.kind not in (Kind.DECL_REF_EXPR, Kind.MEMBER_REF_EXPR):
            continue
        target = part.referenced
        if target is None:
            continue
        if target.kind in (Kind.ENUM_CONSTANT_DECL, Kind.TEMPLATE_NON_TYPE_PARAMETER):
            continue
        if target.kind != Kind.VAR_DECL:
            return False
        if target.get_usr() in counters or target.spelling in counters:
            continue
        parts = list(target.get_children())
        if not target.type.is_const_qualified() or not parts:
            return False
        if not all(is_constant(part, counters) for part in parts):
            return False
    return True


def counters_of(loop: Loop) -> set[str]:
    """The variables that a for loop declares."""
    first = next(iter(loop.cursor.get_children()), None)
    if first is None or first.kind != Kind.DECL_STMT:
        return set()
    return {part.spelling for part in first.get_children() if part.kind == Kind.VAR_DECL}


def has_constant_bounds(loop: Loop) -> bool:
    """Whether begin, end and step of a for loop are constants once those around it are unrolled."""
    if loop.cursor.kind != Kind.FOR_STMT:
        return False
    counters = counters_of(loop)
    outer: set[str] = set()
    for other in loop.around:
        outer |= counters_of(other)
    parts = list(loop.cursor.get_children())
    start = [v for v in parts[0].get_children() if v.kind == Kind.VAR_DECL]
    begins = all(is_constant(part, outer) for v in start for part in v.get_children())
    return bool(start) and begins and all(is_constant(p, counters | outer) for p in parts[1:-1])


def check_unrolled(sources: Sources) -> None:
    """Unrolled loops have constant bounds.

    A loop is unrolled by its pragma, within a pipelined loop, and in a function that a pipelined
    loop calls.
    """
    unrolled: list[Loop] = []
    called: list[Function] = []
    for pragma in sources.pragmas:
        function = sources.function_at(pragma.path, pragma.line)
        loop = sources.loop_at(function, pragma.line) if function else None
        if function is None or loop is None:
            continue
        if pragma.directive == "UNROLL":
            unrolled.append(loop)
        if pragma.directive == "PIPELINE":
            unrolled += [inner for inner in function.loops if loop in inner.around]
            inside = [c for c in function.calls if c.location.line in loop.lines]
            called.append(Function(function.cursor, function.path, loop.lines, calls=inside))
    for caller in called:
        for function in reached(sources, callees(sources, caller)).values():
            unrolled += function.loops
    for loop in unrolled:
        if not has_constant_bounds(loop):
            sources.add_fault(loop.cursor.location, "unrolled, but its bounds are not constant")


def check_directives(sources: Sources) -> None:
    """Directives, their options and their variables are known, and they stand where they may."""
    for pragma in sources.pragmas:
        words = DIRECTIVES.get(pragma.directive)
        if words is None:
            sources.faults.append(f"{pragma.where}: no such directive")
            continue
        unknown = [word for word in pragma.options if word not in words.split()]
        if unknown:
            sources.faults.append(f"{pragma.where}: no option {', '.join(unknown)}")
        function = sources.function_at(pragma.path, pragma.line)
        if function is None:
            sources.faults.append(f"{pragma.where}: outside of a function")
            continue
        name, *members = pragma.options.get("variable", "").split(".")
        known = name in function.variables or name in sources.globals | sources.members
        if name and not (known and sources.members.issuperset(members)):
            sources.faults.append(f"{pragma.where}: no variable {name}")
        if pragma.directive in ("PIPELINE", "UNROLL") and not sources.loop_at(
            function, pragma.line
        ):
            sources.faults.append(f"{pragma.where}: outside of a loop")


def check_dependences(sources: Sources) -> None:
    """A DEPENDENCE between trips is that of a memory, and has the distance that the memory keeps.

    A simulation with KGRC_LATE holds the memory to it.
    """
    headers = (sources.scratch / "config.h", sources.folder / "design.h")
    numbers = dict(re.findall(r"\b(k\w+) = (\d+)\b", "".join(h.read_text() for h in headers)))
    for pragma in sources.pragmas:
        if pragma.directive != "DEPENDENCE":
            continue
        name = pragma.options.get("variable", "")
        if name not in sources.memories:
            sources.faults.append(f"{pragma.where}: {name} is no Ram")
        elif "inter" in pragma.options:
            said = pragma.options.get("distance", "none")
            kept = sources.memories[name]
            true = {"RAW", "true"} <= set(pragma.options)
            if not true or numbers.get(said, said) != str(kept):
                sources.faults.append(f"{pragma.where}: {name} keeps a RAW distance of {kept}")


def check_pipelines(sources: Sources) -> None:
    """A pipelined loop has a label, and a comment that gives the reason for its II."""
    for pragma in sources.pragmas:
        function = sources.function_at(pragma.path, pragma.line)
        loop = function and sources.loop_at(function, pragma.line)
        if pragma.directive != "PIPELINE" or not loop:
            continue
        if loop.label is None:
            sources.faults.append(f"{pragma.where}: the loop has no label")
        text = pragma.path.read_text().splitlines()
        near = "\n".join(text[loop.lines.start - 3 : pragma.line - 1])
        argued = re.findall(r"//.*?\bII = (\w+)", near)
        if "II" not in pragma.options or pragma.options["II"] not in argued:
            sources.faults.append(f"{pragma.where}: no comment says II = and why")


def check_interfaces(sources: Sources) -> None:
    """Every argument of the kernel has its interfaces, and no other function has any."""
    top = sources.top
    where = top.cursor.location
    arguments = {a.spelling: a.type.kind for a in top.cursor.get_arguments()}
    bursts = {
        a.spelling
        for a in top.cursor.get_arguments()
        if a.type.get_canonical().spelling.startswith("hls::burst_maxi<")
    }
    memories = bursts | {name for name, kind in arguments.items() if kind == TypeKind.POINTER}
    bundles: dict[str, str] = {}
    slaves, masters = set(), set()
    for pragma in sources.pragmas:
        if pragma.directive != "INTERFACE":
            continue
        port = pragma.options.get("port")
        if port not in arguments and port != "return":
            sources.faults.append(f"{pragma.where}: no port {port}")
        if sources.function_at(pragma.path, pragma.line) is not top:
            sources.faults.append(f"{pragma.where}: not in {TOP}")
        if "m_axi" in pragma.options:
            masters.add(port)
            lacking = {"offset", "bundle", "depth"} - set(pragma.options)
            bundle = pragma.options.get("bundle", "")
            other = bundles.setdefault(bundle, str(port))
            if other != port and bursts & {other, port}:
                sources.faults.append(
                    f"{pragma.where}: {port} shares the bundle {bundle} with {other}"
                )
            if lacking or port not in memories:
                sources.faults.append(f"{pragma.where}: {port} lacks {', '.join(sorted(lacking))}")
        if "s_axilite" in pragma.options:
            slaves.add(port)
    for port in (*arguments, "return"):
        if port not in slaves:
            sources.add_fault(where, f"{TOP}: {port} has no s_axilite")
        # `digest` is an output register, not a memory port
        if port in memories and port not in masters and port != "digest":
            sources.add_fault(where, f"{TOP}: {port} has no m_axi")


def check_dataflow(sources: Sources) -> None:
    """A stream in a dataflow region has one writer, one reader, and a depth."""
    depths = {p.options.get("variable") for p in sources.pragmas if p.directive == "STREAM"}
    regions = [p for p in sources.pragmas if p.directive == "DATAFLOW"]
    if not regions:
        sources.add_fault(sources.top.cursor.location, "no DATAFLOW")
    for pragma in regions:
        function = sources.function_at(pragma.path, pragma.line)
        if function is None:
            continue
        for name, variable in function.variables.items():
            if variable.kind != Kind.VAR_DECL or "stream<" not in variable.type.spelling.lower():
                continue
            users = [
                call.spelling
                for call in function.calls
                if any(part.spelling == name for part in call.get_arguments())
            ]
            if len(users) != 2 or users[0] == users[1]:
                sources.faults.append(f"{pragma.where}: {name} joins {users}, not two processes")
            if name not in depths:
                sources.faults.append(f"{pragma.where}: {name} has no depth")


RULES = (
    check_recursion,
    check_unrolled,
    check_directives,
    check_dependences,
    check_pipelines,
    check_interfaces,
    check_dataflow,
)


def lint(sources: Path, folder: Path, design: str = "8-sparse") -> list[str]:
    """The faults of the sources in a folder, `file:line: text` each; `folder` is for scratch files.

    Raises:
        ConfigError: there is no such design.
    """
    folder.mkdir(exist_ok=True)
    parsed = Sources(sources, folder, design)
    if not parsed.faults:
        for rule in RULES:
            rule(parsed)
    return parsed.faults


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sources", type=Path, help="the folder hls_src")
    parser.add_argument("--design", default="8-sparse", help="a name, or the JSON file of a design")
    chosen = parser.parse_args(arguments)
    missing = [name for name in SOURCES if not (chosen.sources / name).is_file()]
    if missing:
        parser.error(f"{chosen.sources}: no {', '.join(missing)} there; name the folder hls_src")
    with tempfile.TemporaryDirectory() as scratch:
        faults = lint(chosen.sources.resolve(), Path(scratch), chosen.design)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KgrcError as error:
        sys.exit(str(error))
