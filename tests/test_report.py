"""Intervals, tables and the page: against closed forms, and in a real browser where there is one."""

import json
import shutil
import subprocess

import numpy as np
import pytest

import evaluate
import report
from common import InputError


def write_run(folder, name, method, rights, parameters=1000, **row):
    """A run folder as evaluate.py leaves it. rights: {task: list of outcomes}."""
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"name": name, "method": method, "training": "distill", "sc": 1}))
    (folder / "model.json").write_text(json.dumps({"model": "x", "parameters": parameters}))
    step = {"thought": "t", "code": "web_search('x')", "observation": "o", "error_kind": None}
    with open(folder / "transcripts.0.jsonl", "w") as file:
        for task, outcomes in rights.items():
            for i, right in enumerate(outcomes):
                base = {
                    "id": str(i), "task": task, "kind": "fact", "domain": "in" if task == "hotpotqa" else "out",
                    "question": f"Q {i}", "answer": "a", "prediction": "a" if right else "b", "correct": bool(right),
                    "why": "exact", "stop": "final_answer", "steps": [step], "usage": {"completion_tokens": 10},
                }  # fmt: skip
                file.write(json.dumps(base | row) + "\n")
    report.summarise(folder)


def test_interval_is_the_bootstrap_of_the_answers():
    """Drawing a binomial is resampling right-or-wrong answers: the same quantiles as the plain bootstrap."""
    rng = np.random.default_rng(1)
    outcomes = [np.array([1] * 30 + [0] * 20), np.array([1] * 9 + [0] * 51)]
    means = [np.mean([rng.choice(o, len(o)).mean() for o in outcomes]) for _ in range(10_000)]
    low, high = report.interval([(30, 50), (9, 60)])
    assert abs(low - np.quantile(means, 0.025)) < 0.01 and abs(high - np.quantile(means, 0.975)) < 0.01
    assert report.interval([(5, 5)]) == [1.0, 1.0]


def test_tables_pool_seeds_and_average_over_tasks(tmp_path):
    write_run(tmp_path / "seed0" / "a", "S", "agent", {"hotpotqa": [1] * 9 + [0], "aime": [1] * 6 + [0] * 4})
    write_run(tmp_path / "seed1" / "a", "S", "agent", {"hotpotqa": [1] * 7 + [0] * 3, "aime": [1] * 8 + [0] * 2})
    write_run(tmp_path / "seed0" / "c", "S", "cot", {"hotpotqa": [0] * 10, "aime": [1] + [0] * 9})
    write_run(tmp_path / "seed0" / "d", "M", "cot", {"hotpotqa": [0] * 10, "aime": [0] * 10}, parameters=9_000)
    text = report.markdown(tmp_path)
    assert "| S | 0.00M | agent distill | greedy | 80 | 70 | 80.0 | 70.0 | 75.0 [" in text
    assert "pooled over up to 2 seeds" in text
    comparison = [line for line in text.splitlines() if "apart" in line or "overlap" in line]
    assert len(comparison) == 2 and all("S: agent distill, greedy" in line for line in comparison)
    assert "| +70.0 | apart |" in comparison[0] and "M: cot distill" in comparison[1]


def test_the_papers_own_students_stand_beside_its_figures(tmp_path):
    """Known by their exact number of parameters; other students, and rows that the paper lacks, have no figure."""
    rights = {"hotpotqa": [1, 0]}
    write_run(tmp_path / "x" / "a", "Q", "agent", rights, parameters=1_543_714_304)
    write_run(tmp_path / "x" / "b", "Q", "cot", rights, parameters=1_543_714_304)
    write_run(tmp_path / "x" / "c", "S", "cot", rights)
    head, _, *rows = [line.split(" | ") for line in report.markdown(tmp_path).splitlines() if line.startswith("| ")][:5]
    assert head[-1] == "paper |" and [row[-1] for row in rows] == [" |", "21.28 |", "28.06 |"]
    figures = [
        system["paper"] for system in json.loads(report.html(tmp_path).split('id="data">')[1].split("<")[0])["systems"]
    ]
    assert figures == [None, 21.28, 28.06]
    write_run(tmp_path / "y" / "c", "S", "cot", rights)
    assert "paper |" not in report.markdown(tmp_path / "y")
    assert "| agent distill | 19.24 | 28.06 | 33.60 | 39.85 |" in report.markdown(tmp_path / "y")


def test_nothing_to_report_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no results.json below it"):
        report.markdown(tmp_path)


def test_page_holds_hostile_text_as_data(tmp_path):
    hostile = "</script><script>document.title = 'broken'</script><b>"
    write_run(tmp_path / "a", "S", "agent", {"hotpotqa": [1, 0, 1]}, question=hostile)
    page = report.html(tmp_path, per_task=2)
    assert hostile not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert len(data["episodes"]) == 2 and data["episodes"][0]["question"] == hostile
    assert data["systems"][0]["tasks"] == {"hotpotqa": [2, 3]}


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium on this machine")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_chromium(tmp_path, scheme):
    """The script runs to its end from a file:// URL: tables, bars and the first episode are drawn, text stays text."""
    hostile = "</script><script>document.title = 'broken'</script>"
    write_run(tmp_path / "a", "S", "agent", {"hotpotqa": [1, 0, 1]}, question=hostile)
    (tmp_path / "report.html").write_text(report.html(tmp_path), encoding="utf-8")
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        f"--user-data-dir={tmp_path / 'profile'}", *(["--force-dark-mode"] if scheme == "dark" else []), "--dump-dom",
        (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "<title>Agent distillation: report</title>" in dom
    assert dom.count('<rect x="300"') == 1 and dom.count("<circle") == 1
    assert dom.count('class="right"') == 3 and dom.count('class="wrong"') == 1  # three in the list, one episode shown
    assert "&lt;/script&gt;&lt;script&gt;" in dom and "web_search('x')" in dom


def test_two_runs_are_compared_on_the_questions_that_both_answered(tmp_path, capsys):
    write_run(tmp_path / "greedy", "M", "agent", {"hotpotqa": [1, 1, 0, 0, 0, 0, 0], "musique": [1, 0]})
    write_run(tmp_path / "sc8", "M", "agent", {"hotpotqa": [1, 0, 1, 1, 1, 1], "aime": [1]})
    evaluate.compare(evaluate.CompareConfig(first=str(tmp_path / "greedy"), second=str(tmp_path / "sc8")))
    lines = capsys.readouterr().out.splitlines()
    # Of six pairs, one only the first got right and four only the second: p = 2 (1 + 5) / 2^5.
    assert lines[2:] == [f"| {task} | 6 | 33.3 | 83.3 | +50.0 | 1 | 4 | 0.38 |" for task in ("hotpotqa", "all")]
    assert lines[0].startswith("| task | n | greedy | sc8 | gain | only greedy | only sc8 |")
    write_run(tmp_path / "other", "M", "agent", {"aime": [1]})
    for second in ("other", "missing"):
        with pytest.raises(InputError):
            evaluate.compare(evaluate.CompareConfig(first=str(tmp_path / "greedy"), second=str(tmp_path / second)))
