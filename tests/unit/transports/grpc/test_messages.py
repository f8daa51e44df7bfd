"""The descriptors that are shipped: what the .proto files say, and what the protocol's clients speak."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import Descriptor
from tritonclient.grpc import model_config_pb2, service_pb2

from parbake.contract.datatypes import NUMPY
from parbake.errors import MalformedBody
from parbake.transports.grpc.messages import INFERENCE, message, parse, pool
from tools.protos import compiled, main, shipped


def test_the_shipped_descriptors_are_what_the_proto_files_say() -> None:
    assert shipped() == compiled()
    assert main(["--check"]) == 0


def test_messages_live_beside_those_of_a_client_with_the_same_names() -> None:
    ours, theirs = message("ModelInferRequest"), service_pb2.ModelInferRequest
    assert ours is not theirs
    assert ours.DESCRIPTOR.full_name == theirs.DESCRIPTOR.full_name
    request = theirs(model_name="eta", raw_input_contents=[b"\0\1"])
    request.parameters["timeout"].int64_param = 5
    assert ours.FromString(request.SerializeToString()).parameters["timeout"].int64_param == 5


def same_fields(ours: Descriptor, theirs: Descriptor) -> None:
    for field in ours.fields:
        other = theirs.fields_by_number[field.number]
        assert (field.name, field.type, field.is_repeated) == (other.name, other.type, other.is_repeated)
        if field.message_type is not None and field.message_type.full_name not in CHECKED:
            CHECKED.add(field.message_type.full_name)
            same_fields(field.message_type, other.message_type)


CHECKED: set[str] = set()


def test_every_rpc_and_field_is_numbered_as_the_clients_know_it() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    for method in pool().FindServiceByName(INFERENCE).methods:
        other = theirs.methods_by_name[method.name]
        assert (method.client_streaming, method.server_streaming) == (
            other.client_streaming,
            other.server_streaming,
        )
        for mine, its in ((method.input_type, other.input_type), (method.output_type, other.output_type)):
            assert mine.full_name == its.full_name
            same_fields(mine, its)
    assert len(CHECKED) > 15
    for value in pool().FindEnumTypeByName("inference.DataType").values:
        assert model_config_pb2.DataType.Value(value.name) == value.number


def test_every_datatype_has_a_name_in_the_model_configuration() -> None:
    names = {value.name for value in pool().FindEnumTypeByName("inference.DataType").values}
    assert names == {"TYPE_INVALID", "TYPE_STRING"} | {f"TYPE_{name}" for name in NUMPY if name != "BYTES"}


def test_what_is_no_message_is_refused() -> None:
    with pytest.raises(MalformedBody, match=r"the message is no inference\.ModelInferRequest"):
        parse(message("ModelInferRequest"), b"\xff\xff")
