"""The report. The page is opened in Chromium where there is one: python -m pytest tests/test_report.py"""

import json
import re
import shutil
import subprocess
import xml.etree.ElementTree

import numpy as np
import pytest

import evaluate
from common import InputError, pictures, report, write_json, write_jsonl

HOSTILE = "</script><script>document.title = 'broken'</script><b>&amp;\x07"
SEARCH = {"thought": "I search.", "code": "print(web_search('x'))", "observation": "Observation:\no", "vote": 0}
FINAL = {"thought": "I know.", "code": "final_answer('a')", "observation": "", "vote": 0, "error_kind": None}
NO_CODE = {"thought": "Words. " * 200, "code": None, "observation": "Observation:\nno code", "error_kind": "no_code"}
ROW = {"kind": "fact", "answer": "a", "prediction": "a", "why": "exact", "stop": "final_answer", "error": None,
       "steps": [SEARCH, FINAL], "usage": {"completion_tokens": 10}}  # fmt: skip
CONFIG = {"sc": 1, "temperature": 0.0, "seed": 0}


def write_run(folder, rights, method="agent", training="distill", parameters=1000, question="{} {}?", **options):
    """A run folder as evaluate.py writes it. rights: {task: right or wrong for each question}; returns the folder."""
    row = ROW | {name: options.pop(name) for name in ROW.keys() & options.keys()}
    asked = [(task, i, bool(right)) for task, outcomes in rights.items() for i, right in enumerate(outcomes)]
    rows = [row | {"id": str(i), "task": t, "question": question.format(t, i), "correct": yes} for t, i, yes in asked]
    questions = {task: len(outcomes) for task, outcomes in rights.items()}
    about = {"name": "S", "method": method, "search": f"{folder}/index", "questions": questions}
    write_json(folder / "run.json", CONFIG | about | options)
    write_json(folder / "model.json", {"model": "x", "parameters": parameters, "training": training})
    write_jsonl(folder / "transcripts.0.jsonl", rows)
    return folder


def tables_of(folder):
    tables = report.tables(report.load_systems(folder)).values()
    return [[dict(zip(heads, row, strict=True)) for row in rows] for heads, rows in tables]


def test_the_last_row_of_a_question_counts_and_an_error_only_if_it_is_alone(tmp_path):
    """Processes write files of their own, a question that ended in an error is asked again, a kill tears a line."""
    a, b, c = report.transcripts(write_run(tmp_path, {"aime": [0, 0, 0]}))
    failed = [row | {"stop": "error", "prediction": None} for row in (a, b, c)]
    write_jsonl(tmp_path / "transcripts.0.jsonl", [failed[1], a, a | {"prediction": "new"}, failed[2]])
    write_jsonl(tmp_path / "transcripts.1.jsonl", [b, failed[0]])
    with open(tmp_path / "transcripts.1.jsonl", "a") as file:
        file.write(json.dumps(c)[:-1])
    assert {r["id"]: r["prediction"] for r in report.transcripts(tmp_path)} == {"0": "new", "1": "a", "2": None}
    assert report.transcripts(tmp_path / "transcripts.1.jsonl") == [b, failed[0]]


def test_bad_folders_and_rows_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no run folder with finished questions"):
        report.markdown(tmp_path)
    path = write_run(tmp_path / "a", {"aime": [1]}) / "transcripts.0.jsonl"
    row = json.loads(path.read_text())
    for field in ("steps", "question", "correct", "id", "stop", "kind", "task"):
        for bad in (row | {field: None}, row | {field: 3}, {name: row[name] for name in row if name != field}):
            write_jsonl(path, [row, bad])
            with pytest.raises(InputError, match=f"transcripts.0.jsonl:2: the field '{field}' is"):
                report.markdown(tmp_path)
    for field in ("answer", "prediction"):
        write_jsonl(path, [row, {name: row[name] for name in row if name != field}])
        with pytest.raises(InputError, match=f"transcripts.0.jsonl:2: the field '{field}' is"):
            evaluate.regrade(evaluate.RegradeConfig(folder=str(tmp_path / "a")))
    write_jsonl(path, [row])
    write_jsonl(tmp_path / "starting" / "transcripts.0.jsonl", [])  # run.json is not written yet
    assert "CoT" not in report.markdown(tmp_path)
    write_run(tmp_path / "old", {"aime": [1]}, "cot", temperature=0.4, sample=False)  # of an earlier edition
    write_jsonl(write_run(tmp_path / "none", {"aime": [1]}) / "transcripts.0.jsonl", [])
    assert "sampled" not in report.markdown(tmp_path) and report.summarise(tmp_path / "none")[1] is False
    write_json(tmp_path / "a" / "run.json", {"lr": 1})
    with pytest.raises(InputError, match=r"run.json: not the configuration of an evaluation"):
        report.markdown(tmp_path)


def test_results_of_one_run(tmp_path):
    run = write_run(tmp_path / "a", {"aime": [0] * 12, "hotpotqa": [1, 0]}, training="distill+prefix", sc=8)
    assert report.summarise(run) == ("14 questions, 2 tasks, average 25.0%", False)
    about = {"model": "S", "parameters": 1000, "method": "agent distill+prefix", "decoding": "sc8", "kind": "fact"}
    first = {"task": "hotpotqa", "domain": "in", "n": 2, "correct": 1, "accuracy": 0.5, "ci95": [0.0945, 0.9055]}
    second = {"task": "aime", "domain": "out", "n": 12, "correct": 0, "accuracy": 0.0, "ci95": [0.0, 0.2425]}
    assert json.loads((run / "results.json").read_text()) == [about | first, about | second]


@pytest.mark.parametrize(("right", "n"), [(0, 12), (12, 12), (5, 12), (37, 500)])
def test_wilson_ends_lie_1_96_standard_errors_from_the_estimate(right, n):
    """The definition: the ends are the p with |estimate - p| = z sqrt(p (1 - p) / n). None is empty."""
    low, high = report.wilson(right / n, n)
    assert low < high and 0 <= low <= right / n <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        assert abs(right / n - end) == pytest.approx(1.959964 * np.sqrt(end * (1 - end) / n))


def test_rows_stand_in_the_order_of_the_papers_table(tmp_path):
    names = ["CoT prompting", "agent prompting", "CoT distilled", "CoT + RAG distilled", "agent distilled"]
    names += [f"agent distilled + {more}" for more in ("SC-action", "prefix", "prefix + SC-action")]
    for i, name in enumerate(names):
        method = "cot-rag" if "RAG" in name else "cot" if "CoT" in name else "agent"
        training = "none" if "prompting" in name else "distill+prefix" if "prefix" in name else "distill"
        for student, size in (("A", 2000), ("B", 1000)):
            options = {"sc": 8 if "SC" in name else 1, "name": student}
            write_run(tmp_path / f"{student}{9 - i}", {"aime": [i % 2]}, method, training, size, **options)
    for rows in tables_of(tmp_path):
        assert [(row["student"], row["method"]) for row in rows] == [(s, name) for s in "BA" for name in names]


def test_seeds_are_one_row_and_other_folders_are_others(tmp_path):
    """A question that two seeds answered counts once in the interval, and each seed's own average is shown."""
    write_run(tmp_path / "seed0" / "a", {"hotpotqa": [1] * 9 + [0], "aime": [1] * 3 + [0]})
    write_run(tmp_path / "seed1" / "a", {"hotpotqa": [1] * 7 + [0] * 3, "aime": [1] * 2 + [0] * 2}, seed=1)
    write_run(tmp_path / "seed1" / "b", {"hotpotqa": [0] * 10, "aime": [1] * 4}, seed=1)
    (first, second), (tasks, _), (use, _) = tables_of(tmp_path)
    assert [row["method"] for row in (first, second)] == ["agent distilled (seed*/a)", "agent distilled (seed*/b)"]
    assert (first["each seed"], second["each seed"]) == ("82.5, 60.0", "")
    assert (tasks["HotpotQA"], tasks["AIME"], use["n"], use["searches"]) == ("80.0", "62.5", 28, "1.00")
    # Of two tasks, the mean has the variance (p q / 10 + p q / 4) / 4 = p q / 11.43.
    for domain, mean, n in (("average", 71.25, 4 / 0.35), ("in-domain", 80, 10), ("out-of-domain", 62.5, 4)):
        low, high = report.wilson(mean / 100, n)
        assert first[domain] == f"{mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def test_what_a_run_has_less_than_others_is_marked_and_errors_are_counted(tmp_path):
    write_run(tmp_path / "a", {"hotpotqa": [1] * 4, "aime": [1] * 4}, why="judge: no verdict")
    write_run(tmp_path / "b", {"aime": [1, 0, 0]}, "agent", "none", stop="error")
    write_run(tmp_path / "c", {"hotpotqa": [1, 0]}, "cot", questions={"hotpotqa": 4, "aime": 4})
    averages, tasks, use = tables_of(tmp_path)
    marked = ["agent prompting (3 of 8 questions)", "CoT distilled (unfinished: 2 of 8 questions)"]
    assert [row["method"] for row in averages] == [*marked, "agent distilled"]
    assert [row["average"][:4] for row in averages] == ["33.3", "", "100."]  # CoT has answered nothing of AIME
    assert list(tasks[0].items())[2:] == [("HotpotQA", ""), ("AIME", "33.3")] and tasks[1]["AIME"] == ""
    assert [(r["n with an error"], r["n left open by the judge"]) for r in use] == [(3, 0), (0, 0), (0, 8)]


def test_the_page_holds_hostile_text_and_numbers_as_data(tmp_path):
    write_run(tmp_path / "seed0", {"hotpotqa": [1, 0, 1]}, question=HOSTILE, prediction=[float("nan"), 2**70, 7], sc=8)
    write_run(tmp_path / "seed1", {"hotpotqa": [1]}, sc=8, seed=1)
    write_run(tmp_path / "cot", {"hotpotqa": [1]}, "cot", name="two\nlines | \\| \x1b[31mred")
    assert r"| two lines \| \\\|  [31mred | CoT distilled (1 of 3 questions) |" in report.markdown(tmp_path)
    page = report.html(tmp_path, per_task=2)
    assert HOSTILE[:20] not in page and str(tmp_path) not in page
    data = json.loads(page.split('id="data">')[1].split("</script>")[0], parse_constant=lambda _: pytest.fail())
    first = data["episodes"][0]
    assert (first["question"], first["prediction"], len(data["episodes"])) == (HOSTILE, ["NaN", str(2**70), 7], 4)


PROBE = """<script>
const frames = [...document.querySelectorAll(".frame")], wide = frames.filter(f => f.scrollWidth > f.clientWidth + 1);
const found = {start: scrollY, overflow: document.documentElement.scrollWidth > innerWidth, wide: wide.length,
               hints: frames.every(f => f.previousSibling.hidden !== wide.includes(f)), listed: shown.length,
               votes: [...document.querySelectorAll("summary")].map(node => node.textContent)};
document.getElementById("list").scrollIntoView();
document.querySelectorAll("#list button")[1].click();
found.top = document.getElementById("episode").getBoundingClientRect().top / innerHeight;
document.documentElement.dataset.found = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on this machine")
@pytest.mark.parametrize("size, wide", [("1280,900", 0), ("390,844", 2)])
def test_page_in_chromium(tmp_path, size, wide):
    """It opens at the top with one system; a tapped question is in view; a table that is cut off has a hint."""
    steps = [FINAL | {"candidates": [*(FINAL | {"vote": i} for i in range(3)), NO_CODE], "chosen": 0}]
    options = {"question": HOSTILE, "steps": steps, "sc": 4, "name": "a student with a very long name " * 9}
    write_run(tmp_path / "a", {task: [1, 0, 1] * 5 for task in report.TASKS}, **options)
    write_run(tmp_path / "b", {task: [0, 0, 0] for task in report.TASKS}, "cot", None, steps=[NO_CODE])
    (tmp_path / "page.html").write_text(report.html(tmp_path) + PROBE, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", f"--window-size={size}",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / "page.html").as_uri()]  # fmt: skip
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout  # after its scripts ran
    found = json.loads(re.search(r'data-found="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert found.pop("votes") == ["4 candidates; votes 1 : 1 : 1; without a vote 1"] and 0 <= found.pop("top") < 0.5
    assert found == {"start": 0, "overflow": False, "wide": wide, "hints": True, "listed": 80}
    assert "<title>Agent distillation: report" in dom and "&lt;/script&gt;&lt;script&gt;" in dom


def test_pictures(tmp_path):
    """Bars of all systems, and one question of the base model and of the student: well-formed, without scripts."""
    options = {"steps": [NO_CODE] * 5, "stop": "max_steps", "question": HOSTILE}
    write_run(tmp_path / "base", {"hotpotqa": [0], "aime": [1]}, training=None, **options)
    write_run(tmp_path / "agent", {"hotpotqa": [1], "aime": [0]})
    assert list(pictures.pictures(tmp_path)) == ["bars.svg"]  # the two runs have no question in common
    write_run(tmp_path / "agent", {"hotpotqa": [1], "aime": [0]}, steps=[SEARCH, SEARCH, FINAL], question=HOSTILE)
    drawn = pictures.pictures(tmp_path)
    for text in drawn.values():
        assert text.count("http") == 1 and "<script" not in text and "prefers-color-scheme: dark" in text
    bars, episode = (list(xml.etree.ElementTree.fromstring(text).iter()) for text in drawn.values())
    assert [e.get("class") for e in bars].count("whisker") == 4
    words = [e.text for e in episode if e.tag.endswith("text")]
    shown = {"✗ Wrong: no answer", '✓ Right: answer "a"', "Step 2: Code", HOSTILE.replace("\x07", "\ufffd")}
    assert shown <= set(words) and sum("more lines]" in word for word in words) == 5
