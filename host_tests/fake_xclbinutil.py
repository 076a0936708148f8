"""What `xclbinutil` does for pynq: write an xclbin with a metadata and a memory section.

Run as ``python -IS fake_xclbinutil.py PATH_OF_PYNQS_XCLBIN_PY``, in the folder that pynq fills.
"""

import ctypes
import json
import runpy
import sys
from pathlib import Path


def memories(xclbin, entries):
    """The section of the memories in mem.json."""
    entry, head = xclbin["mem_data"], xclbin["mem_topology"]
    raw = bytearray(ctypes.sizeof(head) + (len(entries) - 1) * ctypes.sizeof(entry))
    head.from_buffer(raw).m_count = len(entries)
    places = (entry * len(entries)).from_buffer(raw, head.m_mem_data.offset)
    for place, given in zip(places, entries, strict=True):
        place.m_type, place.m_used = 1, given["m_used"]  # 1: DDR4
        place.mem_u1.m_size = given["m_sizeKB"]
        place.mem_u2.m_base_address = given["m_base_address"]
        place.m_tag = given["m_tag"].encode()
    return bytes(raw)


def container(xclbin, sections):
    """An xclbin of {kind: bytes}."""
    head, entry = xclbin["axlf"], xclbin["axlf_section_header"]
    raw = bytearray(ctypes.sizeof(head) + (len(sections) - 1) * ctypes.sizeof(entry))
    start = head.from_buffer(raw)
    start.m_magic, start.m_header.m_numSections = b"xclbin2", len(sections)
    at = len(raw)
    places = (entry * len(sections)).from_buffer(raw, head.m_sections.offset)
    for place, (kind, inside) in zip(places, sections.items(), strict=True):
        place.m_sectionKind, place.m_sectionOffset, place.m_sectionSize = kind, at, len(inside)
        at += len(inside)
    return bytes(raw) + b"".join(sections.values())


if __name__ == "__main__":
    xclbin = runpy.run_path(sys.argv[1])
    kind = xclbin["AXLF_SECTION_KIND"]
    topology = json.loads(Path("mem.json").read_text())["mem_topology"]
    sections = {
        kind.EMBEDDED_METADATA: Path("metadata.xml").read_bytes(),
        kind.MEM_TOPOLOGY: memories(xclbin, topology["m_mem_data"]),
    }
    Path("t.xclbin").write_bytes(container(xclbin, sections))
