import sys

if sys.version_info < (3, 10):  # noqa: UP036
    sys.exit(f"error: plainGPT needs Python 3.10 or newer, not {sys.version.split()[0]}")
