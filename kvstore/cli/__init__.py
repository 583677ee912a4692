"""The `kvstore` command. `app.py` declares the commands; each loads what it needs only when it runs.

Exit codes: 0 done, 1 the operation found a problem, 2 wrong usage or configuration, 3 the node cannot be reached.
Every error is one line on stderr.
"""

import os
import sys

__all__ = ["main"]


def main() -> None:
    """Entry point; ends the process with the command's exit code."""
    # gRPC's core would write lines of its own among ours, one for each peer that fails at TLS. Read when it is loaded.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        from kvstore.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in {"typer", "rich"}:
            raise
        print("kvstore: the command line needs more packages: pip install 'llm-kvstore[server]'", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:]))
