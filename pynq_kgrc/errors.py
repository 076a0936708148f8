"""The errors that this package raises on purpose.

::

    KgrcError
      ConfigError     an accelerator that cannot be built or does not fit its board
      DataError       labelled videos whose index, files or decoded copies are wrong
      ModelError      a checkpoint that does not fit its network, weights that cannot be fetched, or
                      an ONNX file that is damaged
      CompileError    a layer that the accelerator or the compiler does not support
      ProgramError    a container that is damaged, of another version, or made for other hardware
      DeviceError     the device did not answer, or answered wrongly
      VideoError      bytes that are not a video, or a video without a frame

Every message names what is wrong, the value that was found, and what would be accepted.
"""


class KgrcError(Exception):
    """Base of every error that pynq_kgrc raises on purpose."""


class ConfigError(KgrcError):
    """An accelerator that cannot be built or does not fit its board."""


class DataError(KgrcError):
    """Labelled videos whose index, files or decoded copies are wrong."""


class ModelError(KgrcError):
    """A checkpoint that does not fit, weights that cannot be fetched, or a damaged ONNX file."""


class CompileError(KgrcError):
    """A layer that the accelerator or the compiler does not support."""


class ProgramError(KgrcError):
    """A container that is damaged, of another version, or made for other hardware."""


class DeviceError(KgrcError):
    """The device did not answer, or answered wrongly."""


class VideoError(KgrcError):
    """Bytes that are not a video, or a video without a frame."""


def to_install(extra: str) -> str:
    """What installs an extra of setup.py: the package is on no index."""
    return f"pip install '.[{extra}]' in the folder of the source"
