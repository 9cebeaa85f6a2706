"""How messages write things: counts with their noun, sizes, and values of any length."""

from typing import Any


def quantity(number: int, noun: str, plural: str | None = None) -> str:
    """1 document, 2,000 documents."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def byte_size(of: float) -> str:
    """A number of bytes in three digits and the unit that suits them: 850 bytes, 6.6 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if of < 999.5:
            return quantity(round(of), "byte") if unit == "bytes" else f"{of:.3g} {unit}"
        of /= 1000
    return f"{of:,.4g} TB"


def shown(value: Any) -> str:
    """`repr`, shortened; the name of its type for a value that has none."""
    try:
        return shorten(repr(value), 200)
    except Exception:  # nested too deeply, too many digits, or whatever a config file defines
        return f"a value of type {type(value).__name__}"


def shorten(text: str, most: int) -> str:
    """`text` on one line, without its middle if it has more than `most` characters."""
    line = " ".join(text.splitlines())
    return line if len(line) <= most else f"{line[: most // 2]} … {line[-most // 2 :]}"
