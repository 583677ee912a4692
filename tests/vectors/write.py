"""The only writer of golden files: `make vectors`. Run it when a format version is added, never to make a test pass."""

from __future__ import annotations

import json
import sys
from hashlib import blake2b
from importlib import resources
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "support"))

import golden
import golden_profiles
import golden_redis
from kv_strategies import bits

import kvstore_codec as codec


def main() -> None:
    write_profiles()  # which objects are coded with
    for case in golden.CASES:
        folder = golden.OBJECTS / case.name
        folder.mkdir(parents=True, exist_ok=True)
        kv = golden.make_input(case)
        blob = codec.encode(kv, case.layout, **case.arguments())
        decoded = {
            q: golden.digest_of(codec.decode(blob, case.layout, quality=q, profile=case.read_profile()))
            for q in golden.qualities(blob)
        }
        config = {
            "layout": json.loads(case.layout.canonical_bytes), "tokens": case.tokens,
            "arguments": {
                **case.arguments(), "chunk_hash": case.arguments()["chunk_hash"].hex(), "profile": case.profile,
            },
            "decoded_blake2b_256": decoded,
        }  # fmt: skip
        (folder / "input.bin").write_bytes(bits(kv))
        (folder / "encoded.kvc").write_bytes(blob)
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (golden.VECTORS / "identity.json").write_text(json.dumps(golden.identity(), indent=1) + "\n")
    golden_redis.PINNED.write_text(json.dumps(golden_redis.values(), indent=1) + "\n")
    tables = resources.files("kvstore_codec").joinpath("tables.bin").read_bytes()
    digest = {"tables.bin": blake2b(tables, digest_size=32).hexdigest()}
    (golden.VECTORS / "tables.json").write_text(json.dumps(digest) + "\n")


def write_profiles() -> None:
    golden.PROFILES.mkdir(exist_ok=True)
    golden_profiles.LEARNED_FROM.write_bytes(bits(golden_profiles.learned_input()))
    for name, profile in golden_profiles.profiles().items():
        profile.save(golden.PROFILES / f"{name}.kvp")
        described = json.dumps(golden_profiles.described(profile), ensure_ascii=False)
        (golden.PROFILES / f"{name}.json").write_text(described + "\n", "utf-8")


if __name__ == "__main__":
    main()
