"""`kvstore`, as behind a relay: its bulk path listens where it is told to, and clients are sent to $RELAYED_AT (with
commas) instead. Where it really listens it writes to the file $RELAYED_INTO.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kvstore.cli import main
from kvstore.service import server
from kvstore.service.bulk.service import TransferService
from kvstore.service.bulk.tickets import Tickets


class Relayed(TransferService):
    def __init__(self, tickets: Tickets, addresses: Sequence[str]) -> None:
        super().__init__(tickets, os.environ["RELAYED_AT"].split(","))
        Path(os.environ["RELAYED_INTO"]).write_text("\n".join(addresses))


if __name__ == "__main__":
    server.TransferService = Relayed  # type: ignore[attr-defined]
    main()
