"""What Vitis HLS would refuse or silently do otherwise, looked for in hls_src without Vitis HLS.

libclang parses the sources as synthesis sees them (`__SYNTHESIS__`, with a stand-in for the
vendor's stream header), and rules walk over the tree and over the pragmas. Every rule is shown a
planted fault. What no rule here can say is whether the tool reaches the II that is asked for.
"""

import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pynq_kgrc.accelerator.config import PRESETS, preset
from pynq_kgrc.accelerator.header import config_header
from pynq_kgrc.backends.csim import SOURCES

cindex = pytest.importorskip(
    "clang.cindex", reason="no libclang: pip install -c constraints.txt libclang"
)
Kind, TypeKind = cindex.CursorKind, cindex.TypeKind

HLS = Path(__file__).resolve().parents[1] / "hls_src"
TOP = "kgrc_run"

STREAM = """
#pragma once
namespace hls {
template <class Value>
class stream {
 public:
  void write(const Value& value) { cell = value; }
  Value read() { return cell; }
  bool empty() const { return false; }
 private:
  Value cell;
};
}
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

DIRECTIVES = {
    "INTERFACE": "m_axi s_axilite port offset bundle depth max_read_burst_length "
    "max_write_burst_length num_read_outstanding num_write_outstanding",
    "PIPELINE": "II",
    "UNROLL": "factor",
    "INLINE": "off",
    "DATAFLOW": "",
    "STABLE": "variable",
    "STREAM": "variable depth",
    "DEPENDENCE": "variable inter intra RAW WAR WAW distance true false",
    "ARRAY_PARTITION": "variable complete cyclic block factor dim",
    "AGGREGATE": "variable",
    "BIND_OP": "variable op impl",
    "BIND_STORAGE": "variable type impl",
}
"""The directives that hls_src may use, and their words; UG1399 has more."""


@dataclass
class Function:
    """A function of ours with its loops, variables and calls."""

    cursor: object
    path: Path
    lines: range
    loops: list = field(default_factory=list)
    variables: dict = field(default_factory=dict)
    calls: list = field(default_factory=list)

    @property
    def name(self):
        return self.cursor.spelling


@dataclass
class Loop:
    """A loop, the label before it, and the loops around it, innermost first."""

    cursor: object
    label: str | None
    around: tuple
    lines: range


@dataclass
class Pragma:
    path: Path
    line: int
    word: str
    options: dict

    @property
    def where(self):
        return f"{self.path.name}:{self.line}: {self.word}"


def include_folder():
    """Where gcc keeps stddef.h: the wheel of libclang has none of its own."""
    done = subprocess.run(
        ["gcc", "-print-file-name=include"], capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def synthesis_flags(sources, folder, design):
    """Flags for the sources as synthesis sees them, with plain integers for those of the tool."""
    (folder / "config.h").write_text(config_header(preset(design)))
    (folder / "hls_stream.h").write_text(STREAM)
    return ["-std=c++14", "-DKGRC_PLAIN", "-D__SYNTHESIS__", f"-I{folder}", f"-I{sources}"]


def lines_of(cursor):
    return range(cursor.extent.start.line, cursor.extent.end.line + 1)


class Sources:
    """The parsed sources of a design; `faults` collects what the rules find."""

    def __init__(self, sources, folder, design):
        self.folder = sources
        self.faults = []
        self.functions = {}
        self.globals = set()
        self.members = set()
        flags = synthesis_flags(sources, folder, design)
        flags += ["-x", "c++", "-isystem", include_folder()]
        index = cindex.Index.create()
        for name in SOURCES:
            unit = index.parse(str(sources / name), flags)
            for diagnostic in unit.diagnostics:
                if diagnostic.severity >= cindex.Diagnostic.Error:
                    self.say(diagnostic.location, diagnostic.spelling)
            self.walk(unit.cursor, None, ())
        self.pragmas = [p for path in sorted(sources.glob("*.[ch]*")) for p in read_pragmas(path)]

    def say(self, location, text):
        name = Path(location.file.name).name if location.file else "?"
        fault = f"{name}:{location.line}: {text}"
        if fault not in self.faults:
            self.faults.append(fault)

    def ours(self, cursor):
        file = cursor.location.file
        return file is not None and Path(file.name).parent == self.folder

    def walk(self, cursor, function, loops, label=None):
        for child in cursor.get_children():
            if cursor.kind == Kind.TRANSLATION_UNIT and not self.ours(child):
                continue
            self.look(child, function)
            inside, around = function, loops
            if child.kind in FUNCTIONS and child.is_definition():
                path = Path(child.location.file.name)
                inside = Function(child, path, lines_of(child))
                inside = self.functions.setdefault(child.get_usr(), inside)
                around = ()
            elif child.kind in LOOPS and function is not None:
                loop = Loop(child, label, loops, lines_of(child))
                function.loops.append(loop)
                around = (loop, *loops)
            elif child.kind in VARIABLES:
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

    def look(self, cursor, function):
        """What one cursor alone says."""
        if cursor.kind in FORBIDDEN:
            self.say(cursor.location, FORBIDDEN[cursor.kind])
        if cursor.kind == Kind.CXX_METHOD and cursor.is_virtual_method():
            self.say(cursor.location, "virtual")
        if cursor.kind == Kind.CALL_EXPR and cursor.spelling in HEAP:
            self.say(cursor.location, f"heap: {cursor.spelling}")
        if cursor.kind in VARIABLES or cursor.kind == Kind.TYPEDEF_DECL:
            kind = cursor.type.get_canonical()
            if "std::" in kind.spelling:
                self.say(cursor.location, f"std: {kind.spelling}")
            while kind.kind in (TypeKind.CONSTANTARRAY, TypeKind.INCOMPLETEARRAY):
                kind = kind.element_type.get_canonical()
            if kind.kind == TypeKind.VARIABLEARRAY:
                self.say(cursor.location, f"array of variable length: {cursor.spelling}")
            if kind.kind in (TypeKind.POINTER, TypeKind.LVALUEREFERENCE):
                target = kind.get_pointee().get_canonical().kind
                if target in (TypeKind.FUNCTIONPROTO, TypeKind.FUNCTIONNOPROTO):
                    self.say(cursor.location, f"pointer to a function: {cursor.spelling}")
                if target == TypeKind.POINTER:
                    self.say(cursor.location, f"pointer to a pointer: {cursor.spelling}")

    def function_at(self, path, line):
        found = [f for f in self.functions.values() if f.path == path and line in f.lines]
        return min(found, key=lambda f: len(f.lines), default=None)

    def loop_at(self, function, line):
        found = [loop for loop in function.loops if line in loop.lines]
        return min(found, key=lambda loop: len(loop.lines), default=None)


def read_pragmas(path):
    for number, text in enumerate(path.read_text().splitlines(), 1):
        found = re.match(r"\s*#\s*pragma\s+HLS\s+(\w+)(.*)", text)
        if found:
            words = re.sub(r"\s*=\s*", "=", found[2]).split()
            options = dict(word.partition("=")[::2] for word in words)
            yield Pragma(path, number, found[1], options)
        elif re.match(r"\s*#\s*pragma\s+(?!once)", text):
            yield Pragma(path, number, text.split("pragma", 1)[1].strip(), {})


# ---- rules over the call graph, the loops and the pragmas -------------------------------------


def callees(sources, function):
    """The functions of ours that a function calls."""
    for call in function.calls:
        target = call.referenced
        if target is not None:
            target = cindex.conf.lib.clang_getSpecializedCursorTemplate(target) or target
            known = sources.functions.get(target.get_usr())
            if known is not None:
                yield known


def reached(sources, start):
    """All functions that the functions of a list call, and those they call."""
    seen, todo = {}, list(start)
    while todo:
        function = todo.pop()
        if function.cursor.get_usr() not in seen:
            seen[function.cursor.get_usr()] = function
            todo += callees(sources, function)
    return seen


def check_recursion(sources):
    for usr, function in sources.functions.items():
        if usr in reached(sources, callees(sources, function)):
            sources.say(function.cursor.location, f"recursion: {function.name}")


def is_constant(cursor, counters):
    """Whether an expression is known once the loops that count `counters` are unrolled."""
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


def counters_of(loop):
    first = next(iter(loop.cursor.get_children()), None)
    if first is None or first.kind != Kind.DECL_STMT:
        return set()
    return {part.spelling for part in first.get_children() if part.kind == Kind.VAR_DECL}


def has_constant_bounds(loop):
    """A for loop whose beginning, end and step are constants, or counters of loops around it."""
    if loop.cursor.kind != Kind.FOR_STMT:
        return False
    counters = counters_of(loop)
    outer = set()
    for other in loop.around:
        outer |= counters_of(other)
    parts = list(loop.cursor.get_children())
    start = [v for v in parts[0].get_children() if v.kind == Kind.VAR_DECL]
    begins = all(is_constant(part, outer) for v in start for part in v.get_children())
    return bool(start) and begins and all(is_constant(p, counters | outer) for p in parts[1:-1])


def check_unrolled(sources):
    """Loops that are unrolled, by a pragma or because a loop around them is pipelined.

    What a pipelined loop calls is unrolled as well.
    """
    unrolled, called = [], []
    for pragma in sources.pragmas:
        function = sources.function_at(pragma.path, pragma.line)
        loop = function and sources.loop_at(function, pragma.line)
        if not loop:
            continue
        if pragma.word == "UNROLL":
            unrolled.append(loop)
        if pragma.word == "PIPELINE":
            unrolled += [inner for inner in function.loops if loop in inner.around]
            inside = [c for c in function.calls if c.location.line in loop.lines]
            called.append(Function(function.cursor, function.path, loop.lines, calls=inside))
    for caller in called:
        for function in reached(sources, callees(sources, caller)).values():
            unrolled += function.loops
    for loop in unrolled:
        if not has_constant_bounds(loop):
            sources.say(loop.cursor.location, "unrolled, but its bounds are not constant")


def check_directives(sources):
    for pragma in sources.pragmas:
        words = DIRECTIVES.get(pragma.word)
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
        name, _, member = pragma.options.get("variable", "").partition(".")
        known = name in function.variables or name in sources.globals | sources.members
        if name and not (known and (not member or member in sources.members)):
            sources.faults.append(f"{pragma.where}: no variable {name}")
        if pragma.word in ("PIPELINE", "UNROLL") and not sources.loop_at(function, pragma.line):
            sources.faults.append(f"{pragma.where}: outside of a loop")


def check_pipelines(sources):
    """A label, and a comment that argues for the very II that is asked for."""
    for pragma in sources.pragmas:
        function = sources.function_at(pragma.path, pragma.line)
        loop = function and sources.loop_at(function, pragma.line)
        if pragma.word != "PIPELINE" or not loop:
            continue
        if loop.label is None:
            sources.faults.append(f"{pragma.where}: the loop has no label")
        text = pragma.path.read_text().splitlines()
        near = "\n".join(text[loop.lines.start - 3 : pragma.line - 1])
        argued = re.findall(r"//.*?\bII = (\w+)", near)
        if "II" not in pragma.options or pragma.options["II"] not in argued:
            sources.faults.append(f"{pragma.where}: no comment says II = and why")


def check_interfaces(sources):
    """Every argument of the top function has its interfaces, and no other has any."""
    top = next(f for f in sources.functions.values() if f.name == TOP)
    arguments = {a.spelling: a.type.kind for a in top.cursor.get_arguments()}
    slaves, masters = set(), set()
    for pragma in sources.pragmas:
        if pragma.word != "INTERFACE":
            continue
        port = pragma.options.get("port")
        if port not in arguments and port != "return":
            sources.faults.append(f"{pragma.where}: no port {port}")
        if sources.function_at(pragma.path, pragma.line) is not top:
            sources.faults.append(f"{pragma.where}: not in {TOP}")
        if "m_axi" in pragma.options:
            masters.add(port)
            lacking = {"offset", "bundle", "depth"} - set(pragma.options)
            if lacking or arguments.get(port) != TypeKind.POINTER:
                sources.faults.append(f"{pragma.where}: {port} lacks {', '.join(sorted(lacking))}")
        if "s_axilite" in pragma.options:
            slaves.add(port)
    for port in (*arguments, "return"):
        if port not in slaves:
            sources.faults.append(f"{TOP}: {port} has no s_axilite")
        # a register that only says something is no port of a memory
        if arguments.get(port) == TypeKind.POINTER and port not in masters and port != "digest":
            sources.faults.append(f"{TOP}: {port} has no m_axi")


def check_dataflow(sources):
    """A stream has one writer and one reader, and a depth."""
    depths = {p.options.get("variable") for p in sources.pragmas if p.word == "STREAM"}
    regions = [p for p in sources.pragmas if p.word == "DATAFLOW"]
    if not regions:
        sources.faults.append("no DATAFLOW")
    for pragma in regions:
        function = sources.function_at(pragma.path, pragma.line)
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
    check_pipelines,
    check_interfaces,
    check_dataflow,
)


def lint(sources, folder, design="8-sparse"):
    """Faults of a folder of sources, one line each."""
    folder.mkdir(exist_ok=True)
    parsed = Sources(sources, folder, design)
    if not parsed.faults:
        for rule in RULES:
            rule(parsed)
    return parsed.faults


# ---- tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def compiler():
    for tool in ("gcc", "g++"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}: its headers are needed to parse hls_src")


@pytest.mark.parametrize("design", ["16-dense", "8-sparse", "4-sparse"])
def test_the_sources_have_no_fault(tmp_path, design):
    assert lint(HLS, tmp_path / "design", design) == []


def test_the_lint_sees_the_loops_and_pragmas_there_are(tmp_path):
    parsed = Sources(HLS, tmp_path, "8-sparse")
    assert {f.name for f in parsed.functions.values()} >= {TOP, "run_task", "multiply", "store"}
    words = [pragma.word for pragma in parsed.pragmas]
    text = "".join(path.read_text() for path in HLS.glob("*.[ch]*"))
    assert len(words) == text.count("#pragma HLS ")
    assert words.count("PIPELINE") >= 15
    labels = {loop.label for f in parsed.functions.values() for loop in f.loops}
    assert labels >= {"flattened", "code_words", "taps", "channels"}
    multiply = next(f for f in parsed.functions.values() if f.name == "multiply")
    reads = {f.name for f in reached(parsed, [multiply]).values()}
    assert reads >= {"read_region", "run", "read", "write"}


def planted(folder, changes):
    """A copy of the sources with (file, old text, new text) changed, each found exactly once."""
    shutil.copytree(HLS, folder, ignore=shutil.ignore_patterns("rtl", "build", "scripts"))
    for name, old, new in changes:
        text = (folder / name).read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        (folder / name).write_text(text.replace(old, new))
    return folder


STATEMENTS = {
    "int* p0 = new int[3];": "new",
    "int* p1 = 0; delete p1;": "delete",
    "void* p2 = std::malloc(3);": "heap: malloc",
    "std::free((void*)0);": "heap: free",
    "if (count < 0) throw 1;": "throw",
    "try { (void)count; } catch (...) {}": "try",
    "again: if (count < 0) goto again;": "goto",
    "std::vector<int> list;": "std: std::vector<int>",
    "const Beat* q = maps; const Beat** p3 = &q;": "pointer to a pointer: p3",
    "int places[count];": "array of variable length: places",
    "int (*f)(int, int) = smaller;": "pointer to a function: f",
    "struct Odd { virtual int g() { return 1; } };": "virtual",
}

STORE = (
    "  const int parts = task[kWide] ? kWidePerBeat : 1;\n  const int count = tile_count(task);\n"
)


def test_what_hardware_cannot_do_is_found(tmp_path):
    """One statement a line, and a fault for each at its line."""
    include = '#include <cstdlib>\n#include <vector>\n#include "design.h"'
    changes = [
        ("memory.cpp", '#include "design.h"', include),
        ("memory.cpp", STORE, STORE + "\n".join(STATEMENTS) + "\n"),
    ]
    sources = planted(tmp_path / "src", changes)
    first = (sources / "memory.cpp").read_text().splitlines().index(next(iter(STATEMENTS))) + 1
    wanted = [f"memory.cpp:{first + i}: {text}" for i, text in enumerate(STATEMENTS.values())]
    found = lint(sources, tmp_path / "design")
    assert sorted(found) == sorted(wanted)


SLIPS = {
    "bounds": [
        (
            "memory.cpp",
            "neighbours:\n          for (int lane = 0; lane < kPortPositions; ++lane) {",
            "neighbours:\n          for (int lane = 0; lane < lanes_used; ++lane) {",
            "memory.cpp: unrolled, but its bounds are not constant",
        ),
        (
            # without a pragma, in a pipelined loop
            "memory.cpp",
            "for (int n = 0; n < kTn; ++n)\n            out.vector",
            "for (int n = 0; n < parts; ++n)\n            out.vector",
            "memory.cpp: unrolled, but its bounds are not constant",
        ),
        (
            # in a function that a pipelined loop calls
            "memory.cpp",
            "narrow:\n  for (int i = 0; i < kPortPositions * kTn; ++i) {\n#pragma HLS UNROLL",
            "narrow:\n  for (int i = 0; i < part; ++i) {",
            "memory.cpp: unrolled, but its bounds are not constant",
        ),
        (
            "dot.h",
            "sum += Out(Out(w[0][n]) * Out(x[0][n]));",
            "for (int i = 0; i < int(x[0][n]); ++i) sum += Out(w[0][n]);",
            "dot.h: unrolled, but its bounds are not constant",
        ),
    ],
    "calls": [
        ("top.cpp", "#pragma HLS DATAFLOW\n", "", "no DATAFLOW"),
        (
            "design.h",
            "inline int smaller(int a, int b) { return a < b ? a : b; }",
            "inline int smaller(int a, int b) { return a < b ? a : smaller(b, a); }",
            "design.h: recursion: smaller",
        ),
        (
            "dot.h",
            "struct DotDirect {\n  enum",
            "struct DotDirect {\n  static int deep(int a) { return a ? deep(a - 1) : 0; }\n  enum",
            "dot.h: recursion: deep",
        ),
    ],
    "directives": [
        (
            "compute.cpp",
            "#pragma HLS DEPENDENCE variable = sum_ram inter RAW distance = 4 true",
            "#pragma omp parallel",
            "compute.cpp: omp parallel: no such directive",
        ),
        (
            "compute.cpp",
            "#pragma HLS PIPELINE II = 1\n    KGRC_TRIP();\n    for",
            "#pragma HLS PIPE II = 1\n    KGRC_TRIP();\n    for",
            "compute.cpp: PIPE: no such directive",
        ),
        (
            "compute.cpp",
            "variable = region_ram complete dim = 1",
            "variables = region_ram complete dim = 1",
            "compute.cpp: ARRAY_PARTITION: no option variables",
        ),
        (
            "memory.cpp",
            "variable = kept inter",
            "variable = keep inter",
            "memory.cpp: DEPENDENCE: no variable keep",
        ),
        (
            "top.cpp",
            "variable = task.field complete",
            "variable = task.fields complete",
            "top.cpp: ARRAY_PARTITION: no variable task",
        ),
        (
            "plan.cpp",
            "  Tile tile;\n  const int number[3]",
            "  Tile tile;\n#pragma HLS UNROLL\n  const int number[3]",
            "plan.cpp: UNROLL: outside of a loop",
        ),
        (
            "ram.h",
            "namespace kgrc {\n\n#ifdef",
            "#pragma HLS INLINE\nnamespace kgrc {\n\n#ifdef",
            "ram.h: INLINE: outside of a function",
        ),
    ],
    "pipelines": [
        (
            "memory.cpp",
            "    code_words:\n",
            "",
            "memory.cpp: PIPELINE: the loop has no label",
        ),
        (
            "post.cpp",
            "        // II = 1: every word stands for itself\n",
            "        // every word stands for itself\n",
            "post.cpp: PIPELINE: no comment says II = and why",
        ),
        (
            "post.cpp",
            "        // II = 1: a word a trip, into registers\n",
            "        // II = 2: a word a trip, into registers\n",
            "post.cpp: PIPELINE: no comment says II = and why",
        ),
    ],
    "interfaces": [
        (
            "top.cpp",
            "#pragma HLS INTERFACE s_axilite port = return\n",
            "",
            "kgrc_run: return has no s_axilite",
        ),
        (
            "top.cpp",
            "s_axilite port = digest",
            "s_axilite port = digests",
            "top.cpp: INTERFACE: no port digests",
            "kgrc_run: digest has no s_axilite",
        ),
        (
            "top.cpp",
            "#pragma HLS DATAFLOW\n",
            "#pragma HLS DATAFLOW\n#pragma HLS INTERFACE s_axilite port = items\n",
            "top.cpp: INTERFACE: not in kgrc_run",
        ),
        (
            "top.cpp",
            "bundle = maps_shortcut depth",
            "depth",
            "top.cpp: INTERFACE: shortcut lacks bundle",
        ),
    ],
    "dataflow": [
        (
            "top.cpp",
            "  read_indices(task, indices, index, report.index_words);\n",
            "",
            "top.cpp: DATAFLOW: index joins ['make_words'], not two processes",
        ),
        (
            "top.cpp",
            "#pragma HLS STREAM variable = codes depth = 64\n",
            "",
            "top.cpp: DATAFLOW: codes has no depth",
        ),
    ],
}


@pytest.mark.parametrize("rule", SLIPS)
def test_slips_are_found_and_nothing_else(tmp_path, rule):
    sources = planted(tmp_path / "src", [slip[:3] for slip in SLIPS[rule]])
    found = [re.sub(r":\d+:", ":", fault) for fault in lint(sources, tmp_path / "design")]
    assert sorted(found) == sorted(fault for slip in SLIPS[rule] for fault in slip[3:])


def test_a_memory_port_without_m_axi_is_found(tmp_path):
    text = (HLS / "top.cpp").read_text()
    line = next(x for x in text.splitlines(True) if "m_axi port = items " in x)
    found = lint(planted(tmp_path / "src", [("top.cpp", line, "")]), tmp_path / "design")
    assert found == [f"{TOP}: items has no m_axi"]


ALLOWED = {"memcpy", "memset", "memmove", "memcmp"}
"""gcc makes these out of loops and of copies of structs; they are no call of the sources."""


def undefined_symbols(sources, folder, design):
    """What the linked objects of the synthesis view want from elsewhere."""
    folder.mkdir(exist_ok=True)
    flags = synthesis_flags(sources, folder, design)
    whole = folder / "whole.o"
    command = ["g++", *flags, "-O2", "-fno-pie", "-fno-stack-protector", "-Wno-unknown-pragmas"]
    command += ["-r", "-nostdlib", *(str(sources / name) for name in SOURCES), "-o", str(whole)]
    subprocess.run(command, check=True, timeout=300)
    done = subprocess.run(
        ["nm", "-uC", str(whole)], check=True, capture_output=True, text=True, timeout=60
    )
    return {line.split()[-1] for line in done.stdout.splitlines() if line.strip()}


def test_the_objects_want_nothing_from_a_library(tmp_path):
    for design in ("16-dense", "8-sparse"):
        assert undefined_symbols(HLS, tmp_path / design, design) <= ALLOWED


@pytest.mark.parametrize(
    ("statement", "symbol"),
    [("if (count < 0) throw 1;", "__cxa_throw"), ("if (count < 0) std::abort();", "abort")],
)
def test_a_library_call_is_seen_in_the_objects(tmp_path, statement, symbol):
    include = '#include <cstdlib>\n#include "design.h"'
    changes = [
        ("memory.cpp", '#include "design.h"', include),
        ("memory.cpp", STORE, f"{STORE}  {statement}\n"),
    ]
    sources = planted(tmp_path / "src", changes)
    assert symbol in undefined_symbols(sources, tmp_path / "design", "8-sparse")


def test_every_design_has_a_header_that_parses(tmp_path):
    for design in PRESETS:
        (tmp_path / design).mkdir()
        flags = synthesis_flags(HLS, tmp_path / design, design)
        command = ["g++", *flags, "-fsyntax-only", "-Wno-unknown-pragmas", str(HLS / "plan.cpp")]
        subprocess.run(command, check=True, timeout=120)
