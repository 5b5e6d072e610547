"""Writes everything.onnx: a model in which every field of every ONNX message is set.

It is not meant to run. The standard's own Python package writes it, so that a test can compare our
bytes with the standard's. Needs onnx 1.23 or newer: python everything.py [FILE]
"""

import sys
from pathlib import Path

from google.protobuf.descriptor import FieldDescriptor as Field
from onnx import ModelProto

VALUES = {
    Field.CPPTYPE_INT32: -3,
    Field.CPPTYPE_INT64: -5,
    Field.CPPTYPE_UINT64: 2**63,
    Field.CPPTYPE_FLOAT: 0.1,
    Field.CPPTYPE_DOUBLE: 0.1,
}
# Values the reader looks at, and zeros: a zero that is present must stay present.
NAMED = {"ir_version": 14, "version": 26, "data_type": 1, "elem_type": 1, "i": 0, "f": 0.0, "begin": 0}


def scalar(field):
    if field.name in NAMED:
        return NAMED[field.name]
    if field.cpp_type == Field.CPPTYPE_ENUM:
        return max(value.number for value in field.enum_type.values)
    if field.type == Field.TYPE_STRING:
        return "é"
    if field.type == Field.TYPE_BYTES:
        return b"\xff\x00"
    return VALUES[field.cpp_type]


def fill(message, written):
    """Sets all fields of a message of a kind not met before; leaves it empty if met before.

    Of alternatives (a oneof) one can be set: a message with some is filled once for each.
    """
    kind = message.DESCRIPTOR
    alternatives = [field for oneof in kind.oneofs for field in oneof.fields]
    left = [field for field in alternatives if field.full_name not in written]
    if kind.full_name in written and not left:
        return
    written.add(kind.full_name)
    written.update(field.full_name for field in left[:1])
    for field in kind.fields:
        if field in alternatives and field not in left[:1]:
            continue
        # The one place where we order otherwise: a type's alternatives stand together, all of them
        # before the denotation (6), though some have higher numbers.
        if field.name == "denotation" and left and left[0].number > field.number:
            continue
        value = getattr(message, field.name)
        if field.message_type and field.is_repeated:
            for _ in range(2):
                fill(value.add(), written)
        elif field.message_type:
            value.SetInParent()
            fill(value, written)
        elif field.is_repeated:
            value.extend([scalar(field)] * 2)
        else:
            setattr(message, field.name, scalar(field))


model = ModelProto()
fill(model, set())
path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("everything.onnx")
path.write_bytes(model.SerializeToString(deterministic=True))
