"""README, Makefile, docstrings and --help agree with the code: files, commands, options, targets.

make test ROOM=readme
"""

import ast
import contextlib
import dataclasses
import functools
import importlib
import io
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["agent_distill.py", "retriever.py", "sandbox.py", "train.py", "evaluate.py"]
EXPERIMENTS = [f"experiments.{path.stem}" for path in (ROOT / "experiments").glob("[a-z]*.py")]
MODULES = ["miniature.world", "miniature.teacher", "miniature.student", "paper.data", "paper.rehearse", *EXPERIMENTS]
READMES = ("README.md", "paper/README.md", "experiments/README.md")
README = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in READMES)
MAKEFILES = ("Makefile", "paper/paper.mk", "experiments/experiments.mk")
MAKEFILE = "".join((ROOT / name).read_text(encoding="utf-8") for name in MAKEFILES)


def path_of(program):
    return ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")


@functools.cache
def help_of(program, *command):
    """What `PROGRAM COMMAND --help` prints. In this process, because a new one imports torch, which takes seconds."""
    out, run = io.StringIO(), runpy.run_path if program.endswith(".py") else runpy.run_module
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), warnings.catch_warnings():
        patch.setattr(sys, "argv", [program, *command, "--help"])
        patch.chdir(ROOT)
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy: the module was imported before
        with pytest.raises(SystemExit):
            run(program, run_name="__main__")
    return out.getvalue()


def commands():
    """Every `SCRIPT.py ...` or `-m MODULE ...` in README, Makefile and docstrings: (where, program, the rest)."""
    texts = {"README.md": README, "Makefile": MAKEFILE}
    texts |= {name: path_of(name).read_text(encoding="utf-8").split('"""')[1] for name in [*SCRIPTS, *MODULES]}
    for where, text in texts.items():
        text = text.replace("\\\n", " ").replace("\\$$TEACHER_URL", "URL")
        found = re.findall(r"(?:python|\$\(RUN\)(?: \$\(TORCHRUN\))?|torchrun.*?) (?:-m )?([a-z_.]+)([^`\n#|]*)", text)
        yield from ((where, program, rest) for program, rest in found if program in (*SCRIPTS, *MODULES))


COMMANDS = sorted(set(commands()))


@pytest.mark.parametrize("where, program, rest", COMMANDS, ids=lambda value: value.strip()[:40])
def test_every_command_shown_has_its_options(where, program, rest):
    rest = re.sub(r"--then [\"'].*", "--then COMMAND", rest)
    general = help_of(program)
    default = re.search(r"^    (\S+) .*(?:\n .*)*?\(the default", general, re.M)
    subcommand = [word for word in rest.split()[:1] if re.search(rf"^    {re.escape(word)}\b", general, re.M)]
    if not subcommand and default:
        subcommand = [default[1]]
    known = set(re.findall(r"--[a-z][a-z0-9-]*", help_of(program, *subcommand))) | {"--help"}
    used = set(re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", rest))
    assert used <= known, f"{where}: {program} {rest.strip()}: {used - known}"


def test_everything_that_is_named_exists():
    assert len(COMMANDS) > 25
    assert sorted(path.name for path in ROOT.glob("*.py")) == sorted(SCRIPTS)  # all that is at the root
    files = set(re.findall(r"`((?:[a-z]+/)?[a-z_0-9]+\.py)`", README))
    assert set(SCRIPTS) <= files
    assert all((ROOT / name).is_file() or (ROOT / "experiments" / name).is_file() for name in files)
    rooms = re.findall(r"make test ROOM=([a-z_]+)", README)
    assert rooms and all((ROOT / "tests" / f"test_{room}.py").is_file() for room in rooms)
    for path in (ROOT / "experiments").glob("[a-z]*.py"):
        assert len(path.read_text().splitlines()) <= 125
    shown = set(re.findall(r"`make ([a-z-]+)", README)) | set(re.findall(r"^make ([a-z-]+)", README, re.M))
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    assert shown and all(f"make {target}" in listed for target in shown)
    table = README.split("| detail of the paper |")[1].split("\n\n")[0]
    assert len(DETAILS) == table.count("\n") - 1 > 20


# Paper detail -> code -> setting


@functools.cache
def paper_commands():
    """What `make paper` would run, with every kind of option that the table speaks of."""
    variables = ["VENV=", f"PYTHON={sys.executable}", "YES=1", "PASSAGES=e5", "JUDGE_URL=http://judge", "PAPER=nowhere"]
    return subprocess.run(["make", "-n", "paper", *variables], cwd=ROOT, capture_output=True, text=True).stdout


NAME = r"([a-z_]+(?:\.[a-z_]+)*)\.([A-Z]\w+(?:\.\w+)?|[a-z_0-9]+)"
DETAILS = re.findall(rf"^\| ([^|]+) \| (?:`([^`]*)`)? ?\| `{NAME}` \| (?:`(--[^`]*)`)? ?\|$", README, re.M)


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


NAMES = re.findall(r"`((?:common\.)?[a-z_]+)\.([A-Za-z_]+)`", README.replace(".py`", "`"))


@pytest.mark.parametrize("module, name", sorted(set(NAMES)))
def test_every_name_that_the_readme_points_at_exists(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_runs_with_other_settings_are_refused(tmp_path):
    (tmp_path / "settings").write_text("others\n")
    command = ["make", "reproduce", "VENV=", f"PYTHON={sys.executable}", f"RUNS={tmp_path}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 2 and "has results with: others" in made.stderr and "Give another RUNS=" in made.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["settings"]


def test_requirements_are_pinned():
    for file in ("requirements.txt", "requirements-miniature.txt"):
        lines = (ROOT / file).read_text().split()
        assert lines and all(re.fullmatch(r"[a-z0-9-]+==[\d.]+", line) for line in lines)
