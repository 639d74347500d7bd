"""A table on the terminal that follows an offload while it runs."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dataeff.offload.report import OffloadReport

if TYPE_CHECKING:
    from rich.table import Table

_REFRESH_HZ = 4
_MIB = float(1 << 20)


class LiveView:
    """Shows a report again and again until it is stopped; a context manager.

    Args:
        report: what is shown.
        console: where, a `rich.console.Console`; the standard one when None.
    """

    def __init__(self, report: Callable[[], OffloadReport], console: Any = None) -> None:
        self._report, self._console = report, console
        self._live: Any = None

    def start(self) -> None:
        """Begins to show. Starting twice is harmless. Raises ImportError without rich."""
        if self._live is not None:
            return
        try:
            from rich.live import Live
        except ImportError as error:
            raise ImportError("the live view needs rich: pip install rich") from error
        self._live = Live(
            get_renderable=lambda: table(self._report()),
            console=self._console,
            refresh_per_second=_REFRESH_HZ,
        )
        self._live.start()

    def stop(self) -> None:
        """Shows the last state and leaves it on the screen."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def __enter__(self) -> LiveView:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


def table(report: OffloadReport) -> Table:
    """The figures one looks at while training, as a rich table."""
    from rich.table import Table

    shown = Table(title="activation offload", title_justify="left", show_header=False, box=None)
    rows = {
        "held for backward": f"{report.saved_bytes / _MIB:.1f} MiB",
        "peak": f"{report.peak_saved_bytes / _MIB:.1f} MiB",
        "to disk": f"{report.bytes_written / _MIB:.1f} MiB",
        "to host memory": f"{report.bytes_host / _MIB:.1f} MiB",
        "read back": f"{report.bytes_read / _MIB:.1f} MiB",
        "never had to move": f"{(report.bytes_forwarded + report.bytes_cancelled) / _MIB:.1f} MiB",
        "waited": f"{report.exposed_wait_s:.3f} s of {report.transfer_s:.3f} s",
        "steps": f"{report.num_steps}, {report.step_s:.3g} s each",
        "written per day": f"{report.written_tb_per_day:.2f} TB",
    }
    if report.endurance_days is not None:
        rows["endurance lasts"] = f"{report.endurance_days:.1f} days"
    for name, value in rows.items():
        shown.add_row(name, value)
    if report.reason:
        shown.caption = report.reason
    return shown
