"""README, Makefile, docstrings and --help agree with the code: files, commands, options, targets."""

import ast
import dataclasses
import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


@functools.cache
def help_of(script, *command):
    done = subprocess.run([sys.executable, script, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def commands():
    """Every `SCRIPT.py ...` in README, Makefile and docstrings: (where, script, the rest of the line)."""
    texts = {"README.md": README, "Makefile": MAKEFILE}
    texts |= {name: (ROOT / name).read_text(encoding="utf-8").split('"""')[1] for name in SCRIPTS}
    for where, text in texts.items():
        text = text.replace("\\\n", " ").replace("\\$$TEACHER_URL", "URL")
        for script, rest in re.findall(
            r"(?:python|\$\(RUN\)(?: \$\(TORCHRUN\))?|torchrun.*?) ([a-z_]+\.py)([^`\n#|]*)", text
        ):
            if script in SCRIPTS:
                yield where, script, rest


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize("where, script, rest", COMMANDS, ids=lambda value: value.strip()[:40])
def test_every_command_shown_has_its_options(where, script, rest):
    """An option in a shown command is an option of that command (or, for --then, of the command inside)."""
    rest = re.sub(r"--then [\"'].*", "--then COMMAND", rest)
    words = rest.split()
    general = help_of(script)
    subcommand = [words[0]] if words and re.search(rf"^    {re.escape(words[0])}\b", general, re.M) else []
    if not subcommand and "COMMAND" in general:
        default = re.search(r"^    (\S+) .*(?:\n .*)*?\(the default", general, re.M)
        subcommand = [default[1]] if default else []
    known = set(re.findall(r"--[a-z][a-z0-9-]*", help_of(script, *subcommand))) | {"--help"}
    used = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest))
    assert used <= known, f"{where}: {script} {rest.strip()}: {used - known}"


def test_there_are_commands_to_check():
    assert len(COMMANDS) > 25


def test_every_script_is_on_the_map_and_every_file_on_the_map_is_there():
    named = set(re.findall(r"`([a-z_]+\.py)`", README))
    assert set(SCRIPTS) == named & set(SCRIPTS)
    assert named <= set(SCRIPTS)


def test_every_make_target_shown_is_there():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.M))
    shown = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.M))
    assert shown and shown <= targets
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert all(f"make {target}" in listed for target in shown)


# Paper detail -> code -> setting


@functools.cache
def paper_commands():
    """What `make paper` would run, with every kind of option that the table speaks of."""
    variables = ["VENV=", f"PYTHON={sys.executable}", "YES=1", "PASSAGES=e5", "JUDGE_URL=http://judge", "PAPER=nowhere"]
    return subprocess.run(["make", "-n", "paper", *variables], cwd=ROOT, capture_output=True, text=True).stdout


DETAILS = re.findall(r"^\| ([^|]+) \| (?:`([^`]*)`)? ?\| `(\w+)\.([\w.]+)` \| (?:`(--[^`]*)`)? ?\|$", README, re.M)


def test_the_table_of_details_is_read():
    table = README.split("| detail of the paper |")[1].split("\n\n")[0]
    assert len(DETAILS) == table.count("\n") - 1 > 20


@pytest.mark.parametrize("detail, value, module, name, flag", DETAILS, ids=[row[0] for row in DETAILS])
def test_each_detail_of_the_paper_is_where_the_table_says(detail, value, module, name, flag):
    """The default of the named option, or the named constant, is the value; `make paper` passes the flag."""
    owner, *rest = name.split(".")
    found = getattr(importlib.import_module(module), owner)
    if rest:
        found = next(field.default for field in dataclasses.fields(found) if [field.name] == rest)
    if value:
        assert found == ast.literal_eval(value), detail
    else:
        assert callable(found), detail
    if flag:
        assert re.search(rf"(?<!\S){re.escape(flag)}(?!\S)", paper_commands()), detail


FORK = README.split("## Fork it")[1].split("## ")[0]


@pytest.mark.parametrize("module, name", re.findall(r"`([a-z_]+)\.([A-Za-z_]+)`", FORK.replace(".py`", "`")))
def test_each_line_to_touch_is_there(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert lines and all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", line) for line in lines)
