"""The report: intervals against closed forms and simulation, pooling of seeds, tables, the page and the pictures.

python -m pytest tests/test_report.py        # opens the page in Chromium where there is one
"""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest

from common import InputError, pictures, report, write_json, write_jsonl

HOSTILE = "</script><script>document.title = 'broken'</script><b>&amp;\x07"
SEARCH = {"thought": "I search.", "code": "print(web_search('x'))", "observation": "Observation:\no", "vote": 0}
FINAL = {"thought": "I know.", "code": "final_answer('a')", "observation": "", "vote": 0, "error_kind": None}
NO_CODE = {"thought": "Words. " * 200, "code": None, "observation": "Observation:\nno code", "vote": None,
           "error_kind": "no_code"}  # fmt: skip


def write_run(folder, rights, method="agent", training="distill", parameters=1000, steps=(SEARCH, FINAL), **options):
    """A run folder as evaluate.py writes it. rights: {task: right or wrong for each question}; returns the folder."""
    row_options = {name: options.pop(name) for name in ("question", "stop") if name in options}
    config = {"name": "S", "method": method, "sc": 1, "temperature": 0.4, "seed": 0, "out": str(folder),
              "max_tokens": 64, "prompts_sha256": "a" * 64, "search": f"{folder.parent}/index"}  # fmt: skip
    rows = [
        {"id": f"{i}", "task": task, "kind": "fact", "question": f"{task} {i}?", "answer": "a", "method": method,
         "prediction": "a" if right else "b", "correct": bool(right), "why": "exact", "stop": "final_answer",
         "error": None, "steps": list(steps), "usage": {"completion_tokens": 10}} | row_options
        for task, outcomes in rights.items() for i, right in enumerate(outcomes)
    ]  # fmt: skip
    write_json(folder / "run.json", config | options)
    write_json(folder / "model.json", {"model": "x", "parameters": parameters, "training": training})
    write_jsonl(folder / "transcripts.0.jsonl", rows)
    return folder


def lines_of(text):
    """The rows of the first table of a Markdown text, as {head: cell}."""
    lines = [line for line in text.split("Means per")[0].splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in rows]


# ------------- Intervals


@pytest.mark.parametrize(("right", "n"), [(0, 12), (12, 12), (5, 12), (37, 500)])
def test_wilson_ends_lie_1_96_standard_errors_from_the_estimate(right, n):
    """The definition: the ends are the p with |estimate - p| = z sqrt(p (1 - p) / n). None is empty."""
    low, high = report.wilson(right / n, n)
    assert low < high and 0 <= low <= right / n <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(right / n - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / n))


def seed_of(tasks):
    """The outcomes of one seed. tasks: {task: {question: right or wrong}}."""
    return [{"task": t, "question": q, "correct": right} for t, rights in tasks.items() for q, right in rights.items()]


def test_interval_counts_questions_once_and_seeds_by_their_distance():
    seed = seed_of({"a": dict(enumerate([1] * 5 + [0] * 15)), "b": dict(enumerate([1] * 10 + [0] * 10))})
    assert report.interval([seed]) == (0.375, *report.wilson(0.375, 40))
    assert report.interval([seed] * 3) == pytest.approx(report.interval([seed]), abs=0.03)
    mean, low, high = report.interval([seed_of({"a": dict.fromkeys(range(200), right)}) for right in (0, 1)])
    assert mean == 0.5 and low < 0.05 and high > 0.95  # two seeds that disagree in everything show nothing


def test_interval_covers_the_truth_when_seeds_differ():
    """100 experiments of three trainings, each with questions of its own: 95 % is aimed at, 90 % is demanded."""
    rng, hits, plain = np.random.default_rng(2), 0, 0
    for _ in range(100):
        levels = 0.7 + rng.normal(0, 0.08, 3)
        right = rng.random((3, 4, 25)) < levels[:, None, None]
        seeds = [{task: {(s, i): x for i, x in enumerate(right[s, task])} for task in range(4)} for s in range(3)]
        _, low, high = report.interval([seed_of(seed) for seed in seeds], draws=200)
        hits += low <= 0.7 <= high
        low, high = report.wilson(right.mean(), right.size)  # what counts all questions as independent
        plain += low <= 0.7 <= high
    assert hits >= 90 > plain


# ------------- results.json and the tables


def test_results_of_one_run(tmp_path):
    run = write_run(tmp_path / "a", {"aime": [0] * 12, "hotpotqa": [1, 0]}, steps=(SEARCH, NO_CODE), stop="max_steps")
    (run / "transcripts.1.jsonl").write_text('{"id": "torn')  # a kill in the middle of a line
    assert report.summarise(run) == "14 questions, 2 tasks, average 25.0%"
    first, second = json.loads((run / "results.json").read_text())
    assert first == {
        "model": "S", "parameters": 1000, "method": "agent distill", "decoding": "greedy", "task": "hotpotqa",
        "kind": "fact", "domain": "in", "n": 2, "correct": 1, "accuracy": 0.5, "ci95": [0.0945, 0.9055],
        "errors": {"searches": 1, "steps": 2, "parse errors": 1, "run-time errors": 0, "no answer": 1, "tokens": 10},
    }  # fmt: skip
    assert second["domain"] == "out" and second["accuracy"] == 0 and second["ci95"] == [0.0, 0.2425]


def test_seeds_of_one_configuration_are_one_line(tmp_path):
    """Seeds may have a world and a student of their own. A seed that was run twice counts once."""
    write_run(tmp_path / "seed0" / "a", {"hotpotqa": [1] * 9 + [0], "aime": [1] * 6 + [0] * 4})
    write_run(tmp_path / "seed1" / "a", {"hotpotqa": [1] * 7 + [0] * 3, "aime": [1] * 8 + [0] * 2}, seed=1, batch=3)
    write_run(tmp_path / "seed1" / "again", {"hotpotqa": [1] * 7 + [0] * 3, "aime": [1] * 8 + [0] * 2}, seed=1)
    write_run(tmp_path / "seed0" / "c", {"hotpotqa": [0] * 10, "aime": [1] + [0] * 9}, "cot", None)
    base, agent = lines_of(report.markdown(tmp_path))
    assert [(row["method"], row["seeds"]) for row in (base, agent)] == [("cot prompting", "1"), ("agent distill", "2")]
    assert [agent[name] for name in ("HotpotQA", "AIME")] == ["80.0", "70.0"]
    for domain, mean in (("average", 75), ("in-domain", 80), ("out-of-domain", 70)):
        assert agent[f"{domain} [95 %]"].startswith(f"{mean}.0 [")


def test_other_configurations_are_other_lines(tmp_path):
    options = {"temperature": 1.0, "max_tokens": 8, "top_k": 5, "prompts_sha256": "b" * 64}
    for name in ("sc", *options):
        write_run(tmp_path / name, {"aime": [1, 0]}, **({"sc": 8} | {name: options.get(name, 8)}))
    settings = [row["setting"] for row in lines_of(report.markdown(tmp_path))]
    for name, value in options.items():
        assert len(settings) == 5 and sum(f"{name} {value}" in setting for setting in settings) == 1


def test_unfinished_results_are_marked(tmp_path):
    write_run(tmp_path / "a", {"hotpotqa": [1] * 4, "aime": [1] * 4})
    write_run(tmp_path / "b", {"hotpotqa": [1, 0]}, "cot")
    cot, agent = lines_of(report.markdown(tmp_path))
    assert (cot["HotpotQA"], cot["AIME"], agent["AIME"]) == ("50.0 (2 of 4)", "(0 of 4)", "100.0")
    write_run(tmp_path / "a", {"hotpotqa": [1] * 4, "aime": [1] * 4}, questions={"hotpotqa": 4, "aime": 25})
    assert lines_of(report.markdown(tmp_path))[1]["AIME"] == "100.0 (4 of 25)"


def test_the_papers_figures_stand_only_beside_its_students_on_its_tasks(tmp_path):
    rights = {name: [1] + [0] * (task.questions - 1) for name, task in report.TASKS.items()}
    for name, parameters, method in (("a", 1_543_714_304, "agent"), ("b", 1_543_714_304, "cot"), ("c", 1000, "cot")):
        write_run(tmp_path / name, rights, method, parameters=parameters)
    assert [row["paper's average"] for row in lines_of(report.markdown(tmp_path))] == ["", "28.06", "21.28"]
    write_run(tmp_path / "small" / "a", {name: [1] for name in report.TASKS}, parameters=1_543_714_304)
    assert "paper's average" not in report.markdown(tmp_path / "small")


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no run folder with finished questions"):
        report.markdown(tmp_path)
    write_json(write_run(tmp_path / "a", {"aime": [1]}) / "run.json", {"lr": 1})
    with pytest.raises(InputError, match=r"run.json: not the configuration of an evaluation"):
        report.markdown(tmp_path)


def test_two_runs_are_compared_on_the_questions_that_both_answered():
    greedy = {("musique", str(i)): right for i, right in enumerate([1, 1, 0, 0, 0, 0, 0])} | {("aime", "0"): 1}
    voted = {("musique", str(i)): right for i, right in enumerate([1, 0, 1, 1, 1, 1])} | {("math", "0"): 1}
    lines = report.paired_table(greedy, voted, ("greedy", "sc8")).splitlines()
    # Of six pairs, one only the first got right and four only the second: p = 2 (1 + 5) / 2^5.
    assert lines[2:] == [f"| {task} | 6 | 33.3 | 83.3 | +50.0 | 1 | 4 | 0.38 |" for task in ("musique", "all")]
    assert lines[0].startswith("| task | n | greedy | sc8 | gain | only greedy | only sc8 |")
    with pytest.raises(InputError, match="no question in common"):
        report.paired_table(greedy, {("math", "0"): 1}, ("greedy", "sc8"))


# ------------- The page and the pictures

THREE = [FINAL | {"vote": i, "final_answer": 3 + i, "observation": "the same"} for i in range(3)]
VOTED = THREE[0] | {"candidates": [*THREE, NO_CODE], "chosen": 0}


def test_page_holds_hostile_text_as_data(tmp_path):
    write_run(tmp_path / "a", {"hotpotqa": [1, 0, 1]}, question=HOSTILE)
    page = report.html(tmp_path, per_task=2)
    assert HOSTILE[:20] not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["episodes"]) == 2 and data["episodes"][0]["question"] == HOSTILE
    assert data["tables"][0][2] == [["agent distill, greedy", *["66.7 [20.8, 93.9]"] * 2, "66.7"]]


PROBE = """<script>
const found = {start: scrollY, wide: document.documentElement.scrollWidth > innerWidth,
               votes: [...document.querySelectorAll("summary")].map(node => node.textContent),
               systems: new Set(shown.map(e => e.system)).size, listed: shown.length};
document.getElementById("list").scrollIntoView();
document.querySelectorAll("#list button")[1].click();
found.top = document.getElementById("episode").getBoundingClientRect().top / innerHeight;
document.documentElement.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
@pytest.mark.parametrize("size", ["1280,900", "390,844"])
def test_page_in_chromium(tmp_path, size):
    """It opens at the top with one system; a tapped question is in view; votes are the stored ones."""
    runs = tmp_path / "runs"
    write_run(runs / "a", {task: [1, 0, 1] * 5 for task in report.TASKS}, question=HOSTILE, steps=(VOTED,), sc=4)
    write_run(runs / "b", {task: [0, 0, 0] for task in report.TASKS}, "cot", None, steps=(NO_CODE,))
    (tmp_path / "page.html").write_text(report.html(runs) + PROBE, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout  # after its scripts ran
    found = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"'))
    votes = ["4 candidates; votes 1 : 1 : 1; without a vote 1"]
    right = {"start": 0, "wide": False, "systems": 1, "listed": 80, "votes": votes}
    assert right.items() <= found.items() and 0 <= found["top"] < 0.5, found
    assert "<title>Agent distillation: report" in dom and "&lt;/script&gt;&lt;script&gt;" in dom


def test_pictures(tmp_path):
    """Bars of all systems, and one question of the base model and of the student: well-formed, without scripts."""
    steps, rights = [SEARCH, SEARCH, FINAL], {"hotpotqa": [1], "aime": [0]}
    options = {"training": None, "steps": [NO_CODE] * 5, "stop": "max_steps", "question": HOSTILE}
    write_run(tmp_path / "base", {"hotpotqa": [0], "aime": [1]}, **options)
    write_run(tmp_path / "agent", rights, steps=steps)
    assert list(pictures.pictures(tmp_path)) == ["bars.svg"]  # the two runs have no question in common
    write_run(tmp_path / "agent", rights, steps=steps, question=HOSTILE)
    drawn = pictures.pictures(tmp_path)
    roots = {name: xml.etree.ElementTree.fromstring(text) for name, text in drawn.items()}
    for text in drawn.values():
        assert text.count("http") == 1 and "<script" not in text and "prefers-color-scheme: dark" in text
    assert len([e for e in roots["bars.svg"].iter() if e.get("class") == "whisker"]) == 4
    words = [e.text for e in roots["episode.svg"].iter() if e.tag.endswith("text")]
    shown = {"✗ Wrong: no answer (max_steps)", '✓ Right: answer "a"', "Step 2: Code", HOSTILE.replace("\x07", "\ufffd")}
    assert shown <= set(words) and sum("more lines]" in word for word in words) == 5
