"""Which command makes a data folder, looked up among the recipes in config/."""

import shlex
from pathlib import Path
from typing import Any

from configurator import run_file

CONFIG = Path(__file__).parents[2] / "config"
# prepare.py's defaults, as far as they matter here
DEFAULTS: dict[str, Any] = {"data_dir": "data/stdlib", "tokenizer": "bpe", "vocab_size": 4096}
GPT2_IDS = 50_257


def command_for(folder: Path) -> str:
    """The command that makes a data folder."""
    if folder == Path(DEFAULTS["data_dir"]):
        return "python prepare.py"
    if path := recipe_for(folder)[0]:
        return f"python prepare.py config/{path.name}"
    return f"python prepare.py --sources=FILES --data_dir={shlex.quote(str(folder))}"


def vocab_size_for(folder: Path) -> int:
    """The number of ids of its tokenizer; GPT-2's for a folder that no recipe makes."""
    path, settings = recipe_for(folder)
    if path is None and folder != Path(DEFAULTS["data_dir"]):
        return GPT2_IDS
    sizes = {"bpe": settings["vocab_size"], "bytes": 257}
    return sizes.get(settings["tokenizer"], GPT2_IDS)


def recipe_for(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """The recipe that makes a folder, and its settings; None and the defaults without one."""
    for path in sorted(CONFIG.glob("data_*.py")):
        settings = run_file(str(path), {}, [])
        if "data_dir" in settings and Path(settings["data_dir"]) == folder:
            return path, DEFAULTS | settings
    return None, DEFAULTS
