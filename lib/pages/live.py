"""A figure that is redrawn in place while something else works, for notebooks that train in their own kernel."""

from __future__ import annotations

import contextlib
import contextvars
import io
import threading
from collections.abc import Callable, Iterator

from lib.pages.figure_style import Drawing, housestyle
from lib.pages.notebook_html import embedded


class Picture:
    """A drawing as it stands, for the screen alone: `figures.save` makes its files."""

    @housestyle
    def __init__(self, drawing: Drawing):
        buffer = io.BytesIO()
        drawing.canvas.savefig(buffer, format="png", dpi=128)
        self.alt, self.html = drawing.alt, embedded(buffer.getvalue(), drawing.alt)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.alt


@contextlib.contextmanager
def redrawn(draw: Callable[[], Drawing], every: float = 1.0) -> Iterator[None]:
    """Show `draw()`, again every so many seconds while the body runs, and once more when it has ended, however it
    ended.

    The drawing is done beside the body, which keeps the kernel's main thread: an interrupt reaches it.
    """
    from IPython.display import display

    handle, ended = display(Picture(draw()), display_id=True), threading.Event()

    def redraw() -> None:
        while not ended.wait(every):
            handle.update(Picture(draw()))

    # In a copy of this context, because a kernel finds the cell that an output belongs to in it.
    beside = threading.Thread(target=contextvars.copy_context().run, args=(redraw,), daemon=True)
    beside.start()
    try:
        yield
    finally:
        ended.set()
        beside.join()
        handle.update(Picture(draw()))
