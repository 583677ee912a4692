"""What the demo's processes say to each other."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvstore.demo.processes import DemoFailed, Process

TALKER = """
import sys
for line in sys.stdin:
    sys.stdout.write('{"progress": "one"}\\n{"progress": "two"}\\n{"result": {"asked": "%s"}}\\n' % line.strip())
    sys.stdout.flush()
    if line.strip() == "last":
        break
"""


def test_lines_that_come_at_once_are_all_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talker.py").write_text(TALKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    told: list[str] = []
    with Process("talker", ["talker"], tmp_path / "log", asked=True) as talker:
        assert talker.ask("first", told.append) == {"asked": "first"}
        assert talker.ask("last", told.append) == {"asked": "last"}
        assert told == ["one", "two"] * 2
        with pytest.raises(DemoFailed, match="ended"):
            talker.line(10.0)
