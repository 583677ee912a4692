#!/bin/sh
# One vLLM engine that offloads KV to a kvstore node, on this machine: the same long prompt before and after the engine
# is restarted. Needs `make vllm-setup`; run it from anywhere.
set -eu
cd "$(dirname "$0")/../.."
BIN=$PWD/.venv-vllm/bin
[ -x "$BIN/kvstore" ] || { echo "run 'make vllm-setup' first" >&2; exit 1; }
FOLDER=$(mktemp -d)
"$BIN/kvstore" serve --listen "unix://$FOLDER/kvstore.sock" --host-capacity 1GiB > "$FOLDER/node.log" 2>&1 &
NODE=$!
trap 'kill $NODE; wait $NODE || true; rm -r "$FOLDER"' EXIT
for turn in first second; do
  echo "$turn engine:"
  "$BIN/python" examples/vllm/offload.py "unix://$FOLDER/kvstore.sock" 2> "$FOLDER/$turn.log" \
    || { tail -n 30 "$FOLDER/$turn.log" >&2; exit 1; }
done
