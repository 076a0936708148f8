"""The messages of the Open Inference Protocol over gRPC, as protobuf classes.

Written after the protocol's specification (kserve/open-inference-protocol, its
page on gRPC) and Triton's extensions of it. The classes are made here
from a table instead of by protoc: generated code asks for a version of protobuf at least its own,
and pynq 4.0 has an older one than today's clients.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"

MESSAGES = """
ServerLiveRequest
ServerLiveResponse
    bool live 1
ServerReadyRequest
ServerReadyResponse
    bool ready 1
ModelReadyRequest
    string name 1
    string version 2
ModelReadyResponse
    bool ready 1
ServerMetadataRequest
ServerMetadataResponse
    string name 1
    string version 2
    repeated string extensions 3
ModelMetadataRequest
    string name 1
    string version 2
ModelMetadataResponse
    string name 1
    repeated string versions 2
    string platform 3
    repeated ModelMetadataResponse.TensorMetadata inputs 4
    repeated ModelMetadataResponse.TensorMetadata outputs 5
ModelMetadataResponse.TensorMetadata
    string name 1
    string datatype 2
    repeated int64 shape 3
InferParameter
    oneof bool bool_param 1
    oneof int64 int64_param 2
    oneof string string_param 3
    oneof double double_param 4
    oneof uint64 uint64_param 5
InferTensorContents
    repeated bool bool_contents 1
    repeated int32 int_contents 2
    repeated int64 int64_contents 3
    repeated uint32 uint_contents 4
    repeated uint64 uint64_contents 5
    repeated float fp32_contents 6
    repeated double fp64_contents 7
    repeated bytes bytes_contents 8
ModelInferRequest
    string model_name 1
    string model_version 2
    string id 3
    map InferParameter parameters 4
    repeated ModelInferRequest.InferInputTensor inputs 5
    repeated ModelInferRequest.InferRequestedOutputTensor outputs 6
    repeated bytes raw_input_contents 7
ModelInferRequest.InferInputTensor
    string name 1
    string datatype 2
    repeated int64 shape 3
    map InferParameter parameters 4
    InferTensorContents contents 5
ModelInferRequest.InferRequestedOutputTensor
    string name 1
    map InferParameter parameters 2
ModelInferResponse
    string model_name 1
    string model_version 2
    string id 3
    map InferParameter parameters 4
    repeated ModelInferResponse.InferOutputTensor outputs 5
    repeated bytes raw_output_contents 6
ModelInferResponse.InferOutputTensor
    string name 1
    string datatype 2
    repeated int64 shape 3
    map InferParameter parameters 4
    InferTensorContents contents 5
ModelRepositoryParameter
    oneof bool bool_param 1
    oneof int64 int64_param 2
    oneof string string_param 3
    oneof bytes bytes_param 4
RepositoryIndexRequest
    string repository_name 1
    bool ready 2
RepositoryIndexResponse
    repeated RepositoryIndexResponse.ModelIndex models 1
RepositoryIndexResponse.ModelIndex
    string name 1
    string version 2
    string state 3
    string reason 4
RepositoryModelLoadRequest
    string repository_name 1
    string model_name 2
    map ModelRepositoryParameter parameters 3
RepositoryModelLoadResponse
RepositoryModelUnloadRequest
    string repository_name 1
    string model_name 2
    map ModelRepositoryParameter parameters 3
RepositoryModelUnloadResponse
"""
"""Each message, and below it its fields: kind, type, name and number. A message in a message has a
dot in its name. `oneof`: at most one of those fields; `map`: by names."""

METHODS = (
    *("ServerLive", "ServerReady", "ServerMetadata"),
    *("ModelReady", "ModelMetadata", "ModelInfer"),
    *("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload"),
)
"""Each takes the message of its name + Request, and returns that of its name + Response."""

_Field = descriptor_pb2.FieldDescriptorProto


def describe_messages() -> descriptor_pb2.FileDescriptorProto:
    """The table as protobuf describes a file of messages."""
    file = descriptor_pb2.FileDescriptorProto(
        name="pynq_kgrc/inference.proto", package=PACKAGE, syntax="proto3"
    )
    made: dict[str, Any] = {}
    message = None
    for line in MESSAGES.strip().splitlines():
        if line[0] != " ":
            outer, _, inner = line.rpartition(".")
            message = made[outer].nested_type.add() if outer else file.message_type.add()
            message.name = inner
            made[line] = message
        else:
            _add_field(message, line.split(), f".{PACKAGE}.{_name_of(made, message)}")
    return file


def _name_of(made: dict[str, Any], message: Any) -> str:
    return next(name for name, one in made.items() if one is message)


def _add_field(message: Any, words: list[str], place: str) -> None:
    kind = words.pop(0) if words[0] in ("repeated", "oneof", "map") else ""
    type_name, name, number = words
    field = message.field.add(name=name, number=int(number), label=_Field.LABEL_OPTIONAL)
    if kind == "oneof":
        if not message.oneof_decl:
            message.oneof_decl.add(name="parameter_choice")
        field.oneof_index = 0
    elif kind:
        field.label = _Field.LABEL_REPEATED
    if kind == "map":
        entry = message.nested_type.add(name=name.title().replace("_", "") + "Entry")
        entry.options.map_entry = True
        _add_field(entry, ["string", "key", "1"], place)
        _add_field(entry, [type_name, "value", "2"], place)
        field.type, field.type_name = _Field.TYPE_MESSAGE, f"{place}.{entry.name}"
    elif type_name[0].isupper():
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{type_name}"
    else:
        field.type = getattr(_Field, f"TYPE_{type_name.upper()}")


def _make_classes() -> dict[str, Any]:
    pool = descriptor_pool.DescriptorPool()
    file = describe_messages()
    pool.Add(file)
    return {
        message.name: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"{PACKAGE}.{message.name}")
        )
        for message in file.message_type
    }


CLASSES = _make_classes()
"""Name of a message -> its class."""
