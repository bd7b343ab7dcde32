"""What must be known of an ONNX file, or written into it, without the onnx package.

Whether it wants tensors from other files, and facts for its metadata.

External data is a path that the runtime opens by itself, past the bundle's digests, so it is
refused before the runtime sees the model. This walks the protobuf wire format (tag = field << 3 |
type) along the few messages of onnx.proto that lead to a TensorProto.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_METADATA = 14
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_NODE_OP_TYPE, _NODE_DOMAIN = 4, 7
_OWN_DOMAINS = frozenset({"", "ai.onnx"})
_LOOPS = frozenset({"Loop", "Scan", "SequenceMap"})

# message -> field number -> message in that field (onnx.proto)
_PATHS: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 25: "Function"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
}  # fmt: skip


def has_external_data(model: bytes) -> bool:
    """Whether any tensor of the model lies in another file.

    Raises:
        ValueError: The bytes are no protobuf message.
    """
    return _has_external_data(memoryview(model), "Model")


def with_metadata(model: bytes, facts: Mapping[str, str]) -> bytes:
    """The model with these facts in its metadata (`ModelProto.metadata_props`, field 14).

    A repeated field of a message may be continued at its end, so nothing else is touched.

    Args:
        model: Its metadata has none of the keys.
        facts: Key and value.
    """
    entries = [
        _message(1, key.encode()) + _message(2, text.encode()) for key, text in facts.items()
    ]
    return b"".join([model, *(_message(_MODEL_METADATA, entry) for entry in entries)])


def _message(field: int, content: bytes) -> bytes:
    return _encoded(field << 3 | _BYTES) + _encoded(len(content)) + content


def _encoded(number: int) -> bytes:
    """Seven bits a byte, the lowest first; all but the last byte have the high bit."""
    groups = [number >> shift & 0x7F for shift in range(0, max(number.bit_length(), 1), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def _has_external_data(message: memoryview, kind: str) -> bool:
    if kind == "Tensor":
        return any(
            field == _TENSOR_EXTERNAL_DATA or (field == _TENSOR_DATA_LOCATION and value != 0)
            for field, value in _fields(message)
        )
    paths = _PATHS[kind]
    return any(
        _has_external_data(value, paths[field])
        for field, value in _fields(message)
        if field in paths and isinstance(value, memoryview)
    )


def refused_operators(model: bytes) -> list[str]:
    """Operators of a model that an import does not let in, by name, each once.

    Those of other domains than ONNX's own run code that only some runtimes have; loops run for as
    long as their numbers say; functions of the file's own hide both.

    Raises:
        ValueError: The bytes are no protobuf message.
    """
    return sorted(set(_refused(memoryview(model), "Model")))


def _refused(message: memoryview, kind: str) -> Iterator[str]:
    if kind == "Node":
        texts = {
            field: bytes(value).decode("utf-8", "replace")[:60]
            for field, value in _fields(message)
            if field in (_NODE_OP_TYPE, _NODE_DOMAIN) and isinstance(value, memoryview)
        }
        op_type, domain = texts.get(_NODE_OP_TYPE, ""), texts.get(_NODE_DOMAIN, "")
        if domain not in _OWN_DOMAINS:
            yield f"{domain}:{op_type}"
        elif op_type in _LOOPS:
            yield op_type
    paths = _PATHS.get(kind, {})
    for field, value in _fields(message):
        if field in paths and isinstance(value, memoryview):
            if paths[field] == "Function":
                yield "a function of the file's own"
            elif paths[field] not in ("Tensor", "SparseTensor"):
                yield from _refused(value, paths[field])


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Field numbers with a number, or with the bytes of a string or message."""
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            number, position = _varint(message, position)
            yield field, number
            continue
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ValueError(f"no protobuf message: wire type {wire_type}")
        if position + size > len(message):
            raise ValueError("no protobuf message: it ends inside a field")
        yield field, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """A number of up to ten bytes, seven bits each, and the position after it."""
    number = 0
    for count, byte in enumerate(message[position : position + 10]):
        number |= (byte & 0x7F) << (7 * count)
        if byte < 0x80:
            return number, position + count + 1
    raise ValueError("no protobuf message: a number does not end")
