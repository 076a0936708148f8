"""3-D CNN action recognition on an FPGA with balanced kernel group sparsity (KGRC).

>>> import pynq_kgrc
>>> sorted(pynq_kgrc.__all__)
['Program', 'Session', 'compile_network', 'load_clip', 'load_program', 'recognize']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pynq_kgrc.compiler.network import compile_network
    from pynq_kgrc.program import Program
    from pynq_kgrc.program import load as load_program
    from pynq_kgrc.recognition import recognize
    from pynq_kgrc.runtime import Session
    from pynq_kgrc.video import load_clip

__version__: str

_EXPORTS = {
    "__version__": ("pynq_kgrc.version", "VERSION"),
    "Program": ("pynq_kgrc.program", "Program"),
    "Session": ("pynq_kgrc.runtime", "Session"),
    "compile_network": ("pynq_kgrc.compiler.network", "compile_network"),
    "load_clip": ("pynq_kgrc.video", "load_clip"),
    "load_program": ("pynq_kgrc.program", "load"),
    "recognize": ("pynq_kgrc.recognition", "recognize"),
}
"""Public name -> (module, attribute); imported on first use, so that a board needs no torch."""

__all__ = ["Program", "Session", "compile_network", "load_clip", "load_program", "recognize"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'pynq_kgrc' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    return getattr(import_module(module), attribute)
