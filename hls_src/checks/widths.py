"""The width of each stream's word: the sum of its fields by their declared widths.

Vitis HLS refuses streams of structs above 4096 bits. libclang parses top.cpp as synthesis sees it,
with a stand-in for the vendor's integers that keeps their widths in their types.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from ir import STUBS, CheckError

from pynq_kgrc.accelerator.config import AcceleratorConfig
from pynq_kgrc.accelerator.header import config_header

try:
    from clang import cindex  # type: ignore[import-untyped]
except ImportError:
    sys.exit("no libclang: pip install -c constraints.txt libclang")

MOST_BITS = 4096


def bits_of(kind: Any) -> int:
    """The declared bits of a type.

    Raises:
        CheckError: the type has no width on a wire.
    """
    kind = kind.get_canonical()
    integer = re.fullmatch(r"(?:const )?Integer<(\d+), (?:true|false)>", kind.spelling)
    if integer:
        return int(integer[1])
    if kind.kind == cindex.TypeKind.CONSTANTARRAY:
        return int(kind.element_count) * bits_of(kind.element_type)
    if kind.kind == cindex.TypeKind.BOOL:
        return 1
    if kind.kind == cindex.TypeKind.RECORD:
        return sum(bits_of(field.type) for field in kind.get_fields())
    if kind.kind in (cindex.TypeKind.POINTER, cindex.TypeKind.LVALUEREFERENCE):
        raise CheckError(f"{kind.spelling}: a pointer cannot pass a stream")
    return 8 * int(kind.get_size())


def stream_widths(sources: Path, config: AcceleratorConfig, folder: Path) -> dict[str, int]:
    """Bits of the word of each stream that top.cpp declares, by its name.

    Raises:
        CheckError: libclang cannot parse top.cpp.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.h").write_text(config_header(config), "utf-8")
    flags = ["-x", "c++", "-std=c++14", "-D__SYNTHESIS__", f"-I{folder}", f"-I{sources}"]
    flags += [f"-I{STUBS}", f"-I{STUBS / 'typed'}", "-isystem", compiler_headers()]
    unit = cindex.Index.create().parse(str(sources / "top.cpp"), flags)
    errors = [each.format() for each in unit.diagnostics if each.severity >= 3]
    if errors:
        raise CheckError(f"top.cpp cannot be parsed for its streams: {errors[0]}")
    found = {}
    for cursor in unit.cursor.walk_preorder():
        if cursor.kind == cindex.CursorKind.VAR_DECL:
            kind = cursor.type.get_canonical()
            if re.match(r"(?:kgrc::)?(?:hls::)?[\w:]*stream<", kind.spelling, re.I):
                found[cursor.spelling] = bits_of(kind.get_template_argument_type(0))
    if not found:
        raise CheckError(f"{sources}/top.cpp declares no stream")
    return found


def compiler_headers() -> str:
    """The folder of gcc's stddef.h: the wheel of libclang has none of its own."""
    done = subprocess.run(
        ["gcc", "-print-file-name=include"], capture_output=True, text=True, timeout=60
    )
    return done.stdout.strip()


def check_widths(widths: dict[str, int], design: str) -> list[str]:
    return [
        f"top.cpp: {name} is {bits} bits wide in {design}; {MOST_BITS} at most"
        for name, bits in widths.items()
        if bits > MOST_BITS
    ]
