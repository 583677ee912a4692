#!/bin/sh
# Fails when a generated file in the repository is not what its source generates now.
set -eu
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$BIN/python" -m grpc_tools.protoc -Iprotos --python_out="$scratch" --pyi_out="$scratch" \
    --grpc_python_out="$scratch" protos/kvstore_proto/v1/*.proto
for file in "$scratch"/kvstore_proto/v1/*; do
    diff -u "protos/kvstore_proto/v1/$(basename "$file")" "$file" ||
        { echo "stale stubs: run \`make protos\`" >&2; exit 1; }
done

"$BIN/python" -m nanobind.stubgen -q -m kvstore_codec._native -o "$scratch/_native.pyi"
diff -u codec/kvstore_codec/_native.pyi "$scratch/_native.pyi" ||
    { echo "stale _native.pyi: python -m nanobind.stubgen -m kvstore_codec._native -o codec/kvstore_codec/_native.pyi" >&2
      exit 1; }
