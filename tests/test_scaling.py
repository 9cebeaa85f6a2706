"""The figures of docs/scaling.md."""

import re
import shlex
from pathlib import Path

import train

REPO = Path(__file__).parents[1]
TEXT = (REPO / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_the_table_is_what_the_commands_above_it_print(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where there is no data: evaluating it would take time
    section = TEXT.partition("\n## 1 to 512 GPUs\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^python train.py (config.*)", section, re.MULTILINE)
    rows = re.findall(r"^\| (?:124M|1.5B), .*", section, re.MULTILINE)
    for command, row in zip(commands, rows, strict=True):
        assert train.main(shlex.split(f"{REPO}/{command}")) == 0
        out = capsys.readouterr().out
        memory, sent, step, efficiency, run = [cell.strip() for cell in row.split("|")][3:8]
        assert f"Memory: about {memory} GiB of" in out, row
        assert f"Time: about {run}, {step} per step" in out, row
        assert bool(sent) == ("sends" in out)
        if sent:
            assert f"sends {sent} GB" in out and f"an efficiency of {efficiency}" in out, row


def test_published_times_are_compared_with_those_of_the_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    section = TEXT.partition("\n## Compared with published runs\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+)M, (\d) × (.*?), .*", section, re.MULTILINE)
    assert len(rows) == 8
    for (size, count, device), row in zip(rows, re.findall(r"^\| \d+M, .*", section, re.M)):
        published, share, computed, ratio = [cell.strip() for cell in row.split("|")][2:6]
        config = f"{REPO}/config/gpt2_{size}m.py"
        assert train.main([config, f"--plan_for={count}x{device.replace('40 GB', '40GB')}"]) == 0
        out = capsys.readouterr().out
        step = float(re.search(r"([\d,]+) ms per step", out)[1].replace(",", ""))
        step *= 491_520 / 524_288 if "nanoGPT [" in row else 1
        ms = float(published.replace(",", ""))
        assert float(computed.replace(",", "")) == round(step), row
        assert abs(float(ratio) - step / ms) < 0.006, row
        efficiency = int(re.search(r"an efficiency of (\d+)%", out)[1]) / 100
        assert abs(int(share.removesuffix("%")) / 100 - 0.4 * efficiency * step / ms) < 0.01, row
