"""What `grpcurl -plaintext -H … -d … ADDRESS SERVICE/METHOD` does, by reflection: for machines without grpcurl."""

import argparse
import sys

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-H", dest="header", required=True)
    parser.add_argument("-d", dest="data", required=True)
    parser.add_argument("address")
    parser.add_argument("method")
    given = parser.parse_args()
    service, _, name = given.method.partition("/")
    header, _, value = given.header.partition(": ")
    with grpc.insecure_channel(given.address) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName(service).methods_by_name[name]
        request, reply = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        call = channel.unary_unary(
            f"/{service}/{name}", request_serializer=request.SerializeToString, response_deserializer=reply.FromString
        )
        try:
            answer = call(json_format.Parse(given.data, request()), metadata=((header, value),), timeout=20)
        except grpc.RpcError as error:
            print(f"ERROR:\n  Code: {error.code().name}\n  Message: {error.details()}", file=sys.stderr)
            return 1
    print(json_format.MessageToJson(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
