"""How messages write counts, sizes, times and values."""

import math
from typing import Any


def quantity(number: int, noun: str, plural: str | None = None) -> str:
    """1 document, 2,000 documents."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def byte_size(size: float) -> str:
    """A number of bytes in three digits and a fitting unit: 850 bytes, 6.6 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return quantity(round(size), "byte") if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.4g} TB"


def compact(number: float) -> str:
    """3 significant digits and a unit: 2.27M, 84.1k, 690."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = float(f"{number / size:.2e}")
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled)))}f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """1h12m, 3m20s or 8s."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


def shown(value: Any) -> str:
    """`repr`, shortened; if `repr` fails, the name of the type."""
    try:
        return shorten(repr(value), 200)
    except Exception:  # nested too deeply, too many digits, or whatever a config file defines
        return f"a value of type {type(value).__name__}"


def shorten(text: str, most: int) -> str:
    """`text` on one line; beyond `most` characters its middle becomes an ellipsis."""
    line = " ".join(text.splitlines())
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"
