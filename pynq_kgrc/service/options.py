"""The options of a classification: their names, defaults and bounds, declared once.

The query of a request, the fields of a form, a live session and the command line all take the
bounds of `Options` and the spelling of numbers from here. Imports no web framework.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, inspect

from pynq_kgrc.service.refusal import Refusal

WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")
"""A whole number as it is accepted: ASCII digits without a plus, leading zeros, `_` or spaces."""

TopK = Annotated[int, Meta(ge=1, le=1000, description="number of labels")]
Window = Annotated[int, Meta(ge=1, le=100_000, description="frames of the video that a clip spans")]
Stride = Annotated[
    int, Meta(ge=1, le=1_000_000, description="frames between the starts of two clips")
]
ProgramName = Annotated[
    str, Meta(min_length=1, max_length=200, description="name of a loaded program")
]
Sampling = Annotated[
    Literal["windows", "centre", "uniform"],
    Meta(
        description="clips one after the other, one from the middle of the video, or one spread "
        "over all of it; by default as the program says"
    ),
]


class Options(msgspec.Struct, frozen=True):
    """Options of a request."""

    top_k: TopK = 5
    window: Window | None = None
    stride: Stride | None = None
    program: ProgramName | None = None
    sampling: Sampling | None = None


def is_whole(text: str, least: int, most: int) -> bool:
    """Whether a text is a whole number within bounds, in ASCII digits and nothing else."""
    return WHOLE.fullmatch(text) is not None and least <= int(text) <= most


def read_whole(text: str, name: str, least: int, most: int) -> int:
    """The whole number that a text gives, within bounds.

    >>> read_whole("3", "top_k", 1, 1000)
    3

    Raises:
        Refusal: 422, any other text; the message has the name, the text and the bounds.
    """
    if not is_whole(text, least, most):
        raise Refusal(
            422, f"{name}={text[:50]!r}; accepted are whole numbers from {least} to {most}"
        )
    return int(text)


def bounds(name: str) -> tuple[int, int]:
    """The smallest and largest value of an option that is a number."""
    kind = _KINDS[name]
    assert isinstance(kind, inspect.IntType) and kind.ge is not None and kind.le is not None
    return kind.ge, kind.le


def read_options(
    given: Iterable[tuple[str, str]], names: Iterable[str] = Options.__struct_fields__
) -> dict[str, Any]:
    """The values of the options in a query or a form, by name.

    Args:
        given: names and texts. A text is never stripped, and an empty one is not a default.
        names: the options that are accepted here.

    Raises:
        Refusal: 422, an unknown option, one that is given twice, or a value out of bounds.
    """
    accepted = tuple(names)
    found: dict[str, Any] = {}
    for name, text in given:
        if name not in accepted:
            raise Refusal(422, f"no option {name[:50]!r}; there are {', '.join(accepted)}")
        if name in found:
            raise Refusal(422, f"{name} is given twice; accepted is one value")
        found[name] = _read(name, text)
    return found


def make_options(values: dict[str, Any]) -> Options:
    """The options with these values, which `read_options` gave.

    Raises:
        Refusal: 422, a window or stride beside a sampling that has no windows.
    """
    options = Options(**values)
    if options.sampling not in (None, "windows"):
        for name in ("window", "stride"):
            if getattr(options, name) is not None:
                raise Refusal(
                    422,
                    f"{name}={getattr(options, name)} beside sampling={options.sampling!r}; "
                    f"accepted with sampling='windows' only",
                )
    return options


def _read(name: str, text: str) -> Any:
    kind = _KINDS[name]
    if isinstance(kind, inspect.IntType):
        return read_whole(text, name, *bounds(name))
    if isinstance(kind, inspect.LiteralType):
        if text not in kind.values:
            raise Refusal(
                422, f"{name}={text[:50]!r}; accepted are {', '.join(map(str, kind.values))}"
            )
        return text
    assert isinstance(kind, inspect.StrType)
    least, most = kind.min_length or 0, kind.max_length or 0
    if not least <= len(text) <= most:
        raise Refusal(
            422, f"{name}={text[:50]!r} has {len(text)} characters; accepted are {least} to {most}"
        )
    return text


def query_parameters() -> list[dict[str, Any]]:
    """The options as parameters of a query, for OpenAPI."""
    (schema,) = msgspec.json.schema_components([Options])[1].values()
    listed = []
    for name, described in schema["properties"].items():
        kinds = [kind for kind in described.get("anyOf", [described]) if kind.get("type") != "null"]
        parameter = {"name": name, "in": "query", "required": False, "schema": kinds[0]}
        if described.get("default") is not None:
            kinds[0]["default"] = described["default"]
        listed.append({**parameter, "description": kinds[0].pop("description")})
    return listed


def _kind(declared: inspect.Type) -> inspect.Type:
    """The type of an option, without None and without its description."""
    if isinstance(declared, inspect.Metadata):
        return _kind(declared.type)
    if isinstance(declared, inspect.UnionType):
        (kind,) = [each for each in declared.types if not isinstance(each, inspect.NoneType)]
        return _kind(kind)
    return declared


def _kinds() -> dict[str, inspect.Type]:
    described = inspect.type_info(Options)
    assert isinstance(described, inspect.StructType)
    return {field.name: _kind(field.type) for field in described.fields}


_KINDS = _kinds()
