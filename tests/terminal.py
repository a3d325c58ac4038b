"""A pseudo-terminal for tests."""

import codecs
import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
import threading

from tests.conftest import until


class Terminal:
    """A real pseudo-terminal of `columns`, and what a person would see on it."""

    def __init__(self, columns: int = 100):
        self.ours, self.theirs = pty.openpty()
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
        self.written = ""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                self.written += decoder.decode(os.read(self.ours, 4096))
            except OSError:
                return

    def screen(self, written: str | None = None) -> list[str]:
        """The lines on it, after all that was `written` so far.

        Of what moves the cursor or erases, only what rich's live block uses is known here."""
        lines, row, fresh = [""], 0, True  # fresh: what is written next begins its line
        written = self.written if written is None else written
        whole = re.sub(r"\x1b(\[[?\d;]*)?$", "", written)  # the rest of a sequence may still be on its way
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", whole):
            if part[0] == "\x1b":
                assert re.search(r"\[(\d*A|2K|J|\?25[lh]|[\d;]*m)$", part), (
                    f"an escape sequence that is not ours: {part!r}"
                )
                if part.endswith("A"):
                    row = max(0, row - int(part[2:-1]))
                elif part.endswith(("K", "J")):
                    lines[row:] = [""] if part.endswith("J") else ["", *lines[row + 1 :]]
            elif part == "\n":
                row, fresh = row + 1, True
                lines += [""] * (row + 1 - len(lines))
            elif part == "\r":
                fresh = True
            else:
                lines[row], fresh = part if fresh else lines[row] + part, False
        return lines

    def wait_for(self, process: subprocess.Popen | None, *texts: str) -> str:
        """The first line that holds all of these, once `process` has written it; None: it may have ended before we read
        it."""

        def found() -> list[str]:
            return [line for line in self.screen() if all(text in line for text in texts)]

        return until(found, lambda: f"no {texts} on the screen:\n" + "\n".join(self.screen()), process)[0]
