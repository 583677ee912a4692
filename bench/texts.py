"""Texts to calibrate on and to evaluate on, out of Debian's packages: books, manuals, documentation, source code.

`test/` and `calibration/` share no document. Five of the eight test texts (an essay, an administrator's handbook, a
bible, two manuals) are of kinds that calibration does not contain. Packages are downloaded with `apt-get download`
and unpacked into a scratch folder; nothing is installed, no root is needed, nothing is committed: the texts have
licences of their own, which their packages name.
"""

from __future__ import annotations

import argparse
import html
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
OUT = REPOSITORY / ".cache/texts"
#: Shorter than this is not the text that was looked for: 1,800 tokens of it are needed, from behind its front matter.
CHARACTERS_MIN = 20_000

AUSTEN = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
PYTHON_DOC = "usr/share/doc/python3.11/html/_sources"
PYTHON_LIB = "usr/lib/python3.11"
HANDBOOK = "usr/share/doc/debian-handbook/html/en-US"
CALIBRATION_CODE = ("asyncio/base_events.py", "tarfile.py", "zipfile.py", "difflib.py", "http/client.py")
POD = re.compile(r"perl(faq[3-6]|op|sub)\.pod$")
R_STRINGS, R_STRING = 16, 9


class NoText(Exception):
    """One line: why a text is not there."""


@dataclass(frozen=True)
class Text:
    """`read` gets the folder that holds all of `packages` unpacked; it raises NoText or OSError."""

    name: str
    packages: tuple[str, ...]
    read: Callable[[Path], str]


def pages(pattern: str, *, skip: int = 0, last: int | None = None) -> Callable[[Path], str]:
    """HTML pages [skip, last) without their markup, in the order of their names."""
    return lambda root: "\n\n".join(
        _plain(path.read_text("utf-8", "ignore")) for path in _found(root, pattern)[skip:last]
    )


def files(*patterns: str) -> Callable[[Path], str]:
    return lambda root: "\n\n".join(
        path.read_text("utf-8", "ignore") for pattern in patterns for path in _found(root, pattern)
    )


def novel(title: str) -> Callable[[Path], str]:
    """The novel whose first line is `title`, in any case."""

    def read(root: Path) -> str:
        for lines in _r_string_vectors((root / AUSTEN).read_bytes()):
            if lines and lines[0].lower() == title:
                return "\n".join(lines)
        raise NoText(f"{AUSTEN} holds no {title!r}")

    return read


def genesis(root: Path) -> str:
    """Genesis by the package's own program, which is the only reader of its format."""
    return _output([root / "usr/bin/bible", "-p", root / "usr/lib", "-f", "gen1:1-gen40:1"])


def perl_manual(root: Path) -> str:
    pods = [path for path in _found(root, "usr/share/perl/*/pod/*.pod") if POD.search(path.name)]
    return "\n".join(_output(["pod2text", "-u", pod]) for pod in pods)


TEST = (
    Text("persuasion", ("r-cran-janeaustenr",), novel("persuasion")),
    Text("anarchism", ("anarchism",), pages("usr/share/doc/anarchism/html/secC[1-4].html")),
    Text("debhandbook", ("debian-handbook",), pages(f"{HANDBOOK}/*.html", skip=20, last=70)),
    Text("py_whatsnew", ("python3.11-doc",), files(f"{PYTHON_DOC}/whatsnew/3.4.rst.txt")),
    Text("argparse", ("libpython3.11-minimal",), files(f"{PYTHON_LIB}/argparse.py")),
    Text("kjv", ("bible-kjv", "bible-kjv-text"), genesis),
    Text("vim_usr", ("vim-runtime",), files("usr/share/vim/vim*/doc/usr_0[2-9].txt")),
    Text("perlfaq", ("perl-doc",), perl_manual),
)
#: Taken in this order for test texts that cannot be had.
SPARE_TEST = (
    Text("developers_reference", ("developers-reference",), pages("usr/share/developers-reference/*.html")),
    Text("debian_policy", ("debian-policy",), pages("usr/share/doc/debian-policy/policy.html/ch-*.html")),
)
CALIBRATION = (
    Text("emma", ("r-cran-janeaustenr",), novel("emma")),
    Text("pride", ("r-cran-janeaustenr",), novel("pride and prejudice")),
    Text("sense", ("r-cran-janeaustenr",), novel("sense and sensibility")),
    Text("py_tutorial", ("python3.11-doc",), files(f"{PYTHON_DOC}/tutorial/*.txt")),
    Text("py_library", ("python3.11-doc",), files(f"{PYTHON_DOC}/library/[a-f]*.txt")),
    Text("py_howto", ("python3.11-doc",), files(f"{PYTHON_DOC}/howto/*.txt")),
    Text(
        "code",
        ("libpython3.11-minimal", "libpython3.11-stdlib"),
        files(*(f"{PYTHON_LIB}/{name}" for name in CALIBRATION_CODE)),
    ),
)


class Packages:
    """Debian packages unpacked side by side in one scratch folder, each downloaded once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._unpacked: dict[str, str | None] = {}  # package: why it is not there

    def unpack(self, names: Iterable[str]) -> Path:
        """The folder that then holds the packages. Raises NoText."""
        for name in names:
            if name not in self._unpacked:
                self._unpacked[name] = self._fetch(name)
            problem = self._unpacked[name]
            if problem is not None:
                raise NoText(problem)
        return self._scratch / "root"

    def _fetch(self, name: str) -> str | None:
        folder = self._scratch / name
        folder.mkdir()
        try:
            _output(["apt-get", "download", "-qq", name], folder)
            (archive,) = folder.glob("*.deb")
            _output(["dpkg", "-x", archive, self._scratch / "root"])
        except NoText as error:
            return f"package {name}: {error}"
        return None


def fetch(out: Path) -> list[str]:
    """Writes `out`/{test,calibration}/*.txt, keeping those that exist. Returns one line for each that is missing."""
    problems: list[str] = []
    with tempfile.TemporaryDirectory(prefix="kvstore-texts-") as scratch:
        packages = Packages(Path(scratch))
        spares = iter(SPARE_TEST)
        for folder, wanted in ((out / "test", TEST), (out / "calibration", CALIBRATION)):
            folder.mkdir(parents=True, exist_ok=True)
            for text in wanted:
                problem = _write(text, packages, folder)
                while problem is not None:
                    problems.append(problem)
                    spare = next(spares, None) if wanted is TEST else None
                    problem = _write(spare, packages, folder) if spare else None
    return problems


def _write(text: Text, packages: Packages, folder: Path) -> str | None:
    path = folder / f"{text.name}.txt"
    if path.exists():
        return None
    try:
        content = text.read(packages.unpack(text.packages))
    except (NoText, OSError) as error:
        return f"{text.name}: {' '.join(str(error).split())}"
    if len(content) < CHARACTERS_MIN:
        return f"{text.name}: {' and '.join(text.packages)} gave {len(content)} characters: the packages have changed"
    path.write_text(content, "utf-8")
    return None


def _found(root: Path, pattern: str) -> list[Path]:
    found = sorted(root.glob(pattern))
    if not found:
        raise NoText(f"no {pattern} in its packages")
    return found


def _output(command: list[str | Path], folder: Path | None = None) -> str:
    """Raises NoText with the last line that the command said."""
    if shutil.which(command[0]) is None:
        raise NoText(f"{Path(command[0]).name} is not on this machine")
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip().splitlines() or [f"exit code {done.returncode}"]
        raise NoText(f"{Path(command[0]).name}: {said[-1]}")
    return done.stdout.decode("utf-8", "replace")


def _plain(page: str) -> str:
    page = re.sub(r"(?is)<(script|style|head)\b.*?</\1>", "", page)
    page = re.sub(r"(?i)</?(p|br|h\d|li|div|tr|pre)\b[^>]*>", "\n", page)
    page = html.unescape(re.sub(r"<[^>]+>", "", page))
    return re.sub(r"\n\s*\n+", "\n\n", re.sub(r"[ \t]+", " ", page)).strip()


def _r_string_vectors(database: bytes) -> Iterator[list[str]]:
    """The character vectors of an R lazy-load database: records of a big-endian length and a zlib stream.

    What is inside is R's XDR serialisation, version 3 (R Internals, "Serialization Formats").
    """
    while database:
        stream = zlib.decompressobj()
        try:
            content = stream.decompress(database[4:])
        except zlib.error as error:
            raise NoText(f"{AUSTEN} is not what R 4 writes: {error}") from None
        database = stream.unused_data
        encoding_bytes = struct.unpack_from(">i", content, 14)[0]
        kind, count = struct.unpack_from(">ii", content, 18 + encoding_bytes)
        if content[:6] == b"X\n\0\0\0\3" and kind & 0xFF == R_STRINGS:
            yield _r_strings(content, 26 + encoding_bytes, count)


def _r_strings(content: bytes, at: int, count: int) -> list[str]:
    strings = []
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", content, at)
        if flags & 0xFF != R_STRING:
            raise NoText(f"{AUSTEN}: a vector of strings holds something else")
        strings.append(content[at + 8 : at + 8 + max(size, 0)].decode("utf-8", "replace"))
        at += 8 + max(size, 0)
    return strings


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.texts", description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, help="texts that exist there are kept (default: %(default)s)")
    parsed = parser.parse_args()
    problems = fetch(parsed.out)
    for problem in problems:
        print(f"texts: skipped {problem}", file=sys.stderr)
    found = sorted(parsed.out.glob("*/*.txt"))
    if not found:
        raise SystemExit(
            "texts: none could be had; is this Debian 12, and is its package index fresh (apt-get update)?"
        )
    for path in found:
        print(f"{path}  {len(path.read_text('utf-8')):,} characters")


if __name__ == "__main__":
    main()
