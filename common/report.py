"""From transcripts to results: results.json of one run, and the tables and the page of many runs.

    python evaluate.py report runs/miniature

A run folder holds run.json (its configuration), model.json ({"model", "parameters", "training"}) and one
transcripts.RANK.jsonl per process. Only these are read, so a report can be made while runs are in progress.
"""

import collections
import json
import math
import re
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from common import InputError, parse_object, read_jsonl, read_text, write_json


class Task(NamedTuple):
    """A benchmark of the paper. kind: "fact" | "math". domain: "in" | "out"."""

    label: str
    kind: str
    domain: str


TASKS = {  # in the paper's order
    "hotpotqa": Task("HotpotQA", "fact", "in"),
    "2wikimultihopqa": Task("2WikiMultiHopQA", "fact", "out"),
    "musique": Task("MuSiQue", "fact", "out"),
    "bamboogle": Task("Bamboogle", "fact", "out"),
    "math": Task("MATH", "math", "in"),
    "gsm_hard": Task("GSM-Hard", "math", "out"),
    "aime": Task("AIME", "math", "out"),
    "olymmath": Task("OlymMATH", "math", "out"),
}
LABELS = {name: task.label for name, task in TASKS.items()}
# The paper's names of methods and trainings, in the order of its table.
METHODS = {"cot": "CoT", "cot-rag": "CoT + RAG", "agent": "agent"}
TRAININGS = {"none": "prompting", "distill": "distilled", "distill+prefix": "distilled + prefix"}
SEED = re.compile(r"(seed[-_]?)\d+")
# Fields with their types (see common.parse_object): of any row, of a finished question, and of one to be graded.
KEY = {"task": str, "id": (str, int), "sample?": int}
FIELDS = dict.fromkeys(("task", "id", "kind", "question", "stop"), str)
FIELDS |= {"correct": bool, "steps": [], "sample?": int, "usage?": dict}
GRADED = FIELDS | {"answer": (str, int, float, list), "prediction": object}


# ------------- One run


def transcript_files(folder):
    return sorted(Path(folder).glob("transcripts.*.jsonl"))


def transcripts(where, fields=KEY):
    """Returns the rows of a run folder, or of one file of trajectories: one row per question and sample.

    The last row of a question counts; one that ended in an error counts only if there is no other. An incomplete last
    line is ignored: it is being written, or a kill left it. Raises InputError for a row without {field: type}.
    """
    rows = {}
    for path in [Path(where)] if Path(where).is_file() else transcript_files(where):
        for _, row in read_jsonl(path, fields, growing=True):
            key = row["task"], row["id"], row.get("question"), row.get("sample", 0)
            if key not in rows or row.get("stop") != "error":
                rows[key] = row
    return list(rows.values())


def outcome(row):
    """What the tables need of a transcript row. question: (id, text): two worlds may use one id for two questions."""
    kinds = collections.Counter(str(step.get("error_kind")) for step in row["steps"])
    figures = {
        "searches": sum(str(step.get("code")).count("web_search(") for step in row["steps"]),
        "steps": len(row["steps"]),
        "parse errors": kinds["no_code"] + kinds["syntax"],
        "run-time errors": sum(kinds[kind] for kind in ("runtime", "timeout", "memory", "killed")),
        "no answer": int(row["stop"] != "final_answer"),
        "tokens": (row.get("usage") or {}).get("completion_tokens") or 0,
    }
    domain = row.get("domain") or (TASKS[row["task"]].domain if row["task"] in TASKS else "out")
    about = {name: row.get(name) for name in ("task", "kind", "correct", "stop", "error", "why")}
    return about | {"domain": domain, "question": (row["id"], row["question"]), "figures": figures}


def means(outcomes):
    """Returns the figures of tool use as means per question."""
    return {name: fmean(o["figures"][name] for o in outcomes) for name in outcomes[0]["figures"]}


def in_order(tasks):
    """Returns the different names among these, the paper's tasks first and in its order."""
    return sorted(set(tasks), key=lambda task: (list(TASKS).index(task) if task in TASKS else len(TASKS), task))


def by_task(outcomes):
    """Returns {task: its outcomes}, in order."""
    return {task: [o for o in outcomes if o["task"] == task] for task in in_order(o["task"] for o in outcomes)}


class Run:
    """A run folder: who answered, how, and all outcomes. Raises InputError if run.json is not one of an evaluation.

    about: what results.json says of it. label: the method's name in the paper's table. order: sorts as that table.
    asked: {task: questions}; some may not be answered yet.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        config = parse_object(read_text(self.folder / "run.json"), f"{folder}/run.json")
        if "method" not in config:
            raise InputError(f"{folder}/run.json: not the configuration of an evaluation: it has no method")
        about = self.folder / "model.json"
        about = parse_object(read_text(about), about) if about.exists() else {}
        method, training, sc = config["method"], about.get("training") or "none", config.get("sc") or 1
        sampled = sc > 1 or (config.get("temperature", 0) > 0 and config.get("sample", True))  # sample: of older runs
        self.about = {
            "model": str(config.get("name") or about.get("model") or config.get("model")),
            "parameters": about.get("parameters"),
            "method": f"{method} {'prompting' if training == 'none' else training}",
            "decoding": f"sc{sc}" if sc > 1 else "sampled" if sampled else "greedy",
        }
        self.label = f"{METHODS.get(method, method)} {TRAININGS.get(training, training)}"
        if sampled:
            self.label += ", sampled" if sc == 1 else " + SC-action" if method == "agent" else " + self-consistency"
        rank = training != "none", [*METHODS, method].index(method), training, sc
        self.order = self.about["parameters"] or 0, self.about["model"], rank
        self.seed = config.get("seed")
        self.outcomes = [outcome(row) for row in transcripts(folder, FIELDS)]
        self.asked = collections.Counter(o["task"] for o in self.outcomes)
        self.asked |= collections.Counter(config.get("questions"))


def summarise(folder):
    """Write results.json of one run folder, one row per task. Returns (a line about it, whether all are errors)."""
    run, rows = Run(folder), []
    for task, outcomes in by_task(run.outcomes).items():
        right, n = sum(o["correct"] for o in outcomes), len(outcomes)
        row = {"task": task, "kind": outcomes[0]["kind"], "domain": outcomes[0]["domain"], "n": n, "correct": right}
        rows.append(run.about | row | {"accuracy": right / n, "ci95": [round(end, 4) for end in wilson(right / n, n)]})
    write_json(run.folder / "results.json", rows)
    mean = fmean(row["accuracy"] for row in rows) if rows else 0.0
    line = f"{len(run.outcomes)} questions, {len(rows)} tasks, average {mean:.1%}"
    if errors := collections.Counter(o["error"] for o in run.outcomes if o["stop"] == "error"):
        line += f"; {errors.total()} errors, most often: {errors.most_common(1)[0][0]}"
    if undecided := sum(o["why"] == "judge: no verdict" for o in run.outcomes):
        line += f"; {undecided} answers without a verdict of the judge count as wrong"
    return line, 0 < errors.total() == len(run.outcomes)


# ------------- Intervals and tests


def wilson(p, n):
    """Wilson's 95 % interval of a proportion p among n. It is not empty at p = 0 and p = 1."""
    z = 1.959964  # 95 % of a normal distribution lie within z standard deviations
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def averages(runs):
    """Returns {"all" | "in" | "out": (mean over tasks, low, high)}; {} as long as a task has no answer at all.

    The 95 % interval is Wilson's with the effective sample size of a mean over tasks, if all tasks are equally hard
    (tasks of different difficulty make it a little too wide). A question that several seeds answered counts once.
    """
    tasks, found = by_task([o for run in runs for o in run.outcomes]), {}
    for domain in ("all", "in", "out"):
        inside = [outcomes for outcomes in tasks.values() if domain in ("all", outcomes[0]["domain"])]
        if inside and all(task in tasks for run in runs for task in run.asked):
            mean = fmean(fmean(o["correct"] for o in outcomes) for outcomes in inside)
            sizes = [len({o["question"] for o in outcomes}) for outcomes in inside]
            found[domain] = mean, *wilson(mean, len(sizes) ** 2 / sum(1 / size for size in sizes))
    return found


def mcnemar(first, second):
    """Exact McNemar test on paired outcomes: (only first right, only second right, two-sided p)."""
    counts = collections.Counter(zip(map(bool, first), map(bool, second), strict=True))
    lost, won = counts[True, False], counts[False, True]
    p = 2 * sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    return lost, won, min(p, 1.0)


def paired_table(first, second, names):
    """Two runs on the questions that both answered, by task. first, second: {(task, id, ...): right or wrong}."""
    shared = first.keys() & second.keys()
    if not shared:
        raise InputError(f"{names[0]} and {names[1]} have no question in common")
    rows = []
    for task in [*in_order(key[0] for key in shared), "all"]:
        pairs = [(first[key], second[key]) for key in shared if task in (key[0], "all")]
        lost, won, p = mcnemar(*zip(*pairs, strict=True))
        a, b = (100 * fmean(side) for side in zip(*pairs, strict=True))
        rows.append([task, len(pairs), f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", lost, won, f"{p:.2g}"])
    return table(["task", "n", *names, "gain", *(f"only {name}" for name in names), "p (McNemar)"], rows)


def compare(*paths):
    """Two run folders, or files of trajectories, as paired_table. Raises InputError if one has no rows."""
    sides = []
    for path in paths:
        rows = transcripts(path, KEY | {"question": str, "correct": bool})
        if not rows:
            raise InputError(f"{path}: neither a run folder with transcripts in it nor a file of trajectories")
        sides.append({(row["task"], row["id"], row["question"], row.get("sample", 0)): row["correct"] for row in rows})
    names = [Path(path).name for path in paths]
    return paired_table(*sides, paths if names[0] == names[1] else names)


def table(head, rows):
    """Returns a Markdown table. In a cell, line breaks and what is not printable become spaces; | is escaped."""
    lines = [head, ["---"] * len(head), *rows]
    lines = (["".join(c if c.isprintable() else " " for c in str(cell)) for cell in line] for line in lines)
    lines = ([cell.strip().replace("\\", r"\\").replace("|", r"\|") for cell in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ------------- Many runs: tables and page

NOTES = "Averages are means over tasks. [Wilson's 95 % intervals] cover the choice of the questions, not of the seed."


def load_systems(folder):
    """Returns {(student, name): its runs} below a folder, in the order of the paper's table; InputError for none.

    Runs of one student and method whose paths differ only in the number after "seed" have one name.
    """
    folders = sorted({path.parent for path in Path(folder).rglob("run.json") if transcript_files(path.parent)})
    runs = sorted((run for run in map(Run, folders) if run.outcomes), key=lambda run: run.order)
    if not runs:
        raise InputError(f"{folder}: no run folder with finished questions in it: evaluate something first")
    groups, largest = collections.defaultdict(list), collections.Counter()
    for run in runs:
        path = SEED.sub(r"\1*", str(run.folder.relative_to(folder)))
        groups[Path(run.about["model"]).name or "?", run.label, path].append(run)
        largest |= run.asked
    labels, systems = collections.Counter((student, label) for student, label, _ in groups), {}
    for (student, label, path), group in groups.items():
        name = f"{label} ({path})" if labels[student, label] > 1 else label
        answered, most = sum(len(run.outcomes) for run in group), len(group) * largest.total()
        if answered < most:
            unfinished = "unfinished: " if answered < sum(run.asked.total() for run in group) else ""
            name += f" ({unfinished}{answered} of {most} questions)"
        systems[student, name] = group
    return systems


def tables(systems):
    """Returns {title: (heads, rows of cells)}, without columns that are empty."""
    shown = {"Accuracy in %: averages": [], "Accuracy in %: each task": [], "Tool use per question": []}
    tasks = in_order(task for runs in systems.values() for run in runs for task in run.asked)
    for (student, name), runs in systems.items():
        who, accuracy = {"student": student, "method": name}, {}
        for head, domain in (("average", "all"), ("in-domain", "in"), ("out-of-domain", "out")):
            ends = averages(runs).get(domain, ())
            accuracy[head] = "{:.1f} [{:.1f}, {:.1f}]".format(*(100 * end for end in ends)) if ends else ""
        if len(runs) > 1:
            seeds = [averages([run]).get("all") for run in runs]
            accuracy["each seed"] = ", ".join(f"{100 * seed[0]:.1f}" if seed else "unfinished" for seed in seeds)
        outcomes = [o for run in runs for o in run.outcomes]
        each = dict.fromkeys((LABELS.get(task, task) for task in tasks), "")
        for task, answered in by_task(outcomes).items():
            each[LABELS.get(task, task)] = f"{100 * fmean(o['correct'] for o in answered):.1f}"
        use = {"n": len(outcomes)}
        use |= {head: f"{mean:.2f}" if mean < 100 else f"{mean:.0f}" for head, mean in means(outcomes).items()}
        use["n with an error"] = sum(o["stop"] == "error" for o in outcomes)
        use["n graded by a judge"] = sum(str(o["why"]).startswith("judge:") for o in outcomes)
        use["n left open by the judge"] = sum(o["why"] == "judge: no verdict" for o in outcomes)
        for rows, cells in zip(shown.values(), (accuracy, each, use), strict=True):
            rows.append(who | cells)
    for title, rows in shown.items():
        heads = [head for head in dict.fromkeys(h for row in rows for h in row) if any(row.get(head) for row in rows)]
        shown[title] = heads, [[row.get(head, "") for head in heads] for row in rows]
    return shown


def averages_table(folder):
    """Returns the first table of the report. Makefile prints it after each row."""
    return table(*tables(load_systems(folder))["Accuracy in %: averages"])


def markdown(folder):
    """Returns the report as Markdown: accuracies, then the figures of tool use."""
    shown = tables(load_systems(folder))
    return "\n\n".join([*(f"{title}:\n\n{table(*cells)}" for title, cells in shown.items()), NOTES]) + "\n"


def html(folder, per_task=10):
    """Returns report.html, filled with tables and, for each task of a run, its first per_task episodes by id."""
    systems, episodes = load_systems(folder), []
    for (student, name), runs in systems.items():
        for run in runs:
            about = {"student": student, "system": name, "seed": run.seed, "messages": None}
            for task, rows in by_task(transcripts(run.folder)).items():
                first = sorted(rows, key=lambda row: (len(row["id"]), row["id"]))[:per_task]
                episodes += [row | about | {"task": LABELS.get(task, task)} for row in first]
    shown = [(title, *cells) for title, cells in tables(systems).items()]
    data = {"notes": NOTES, "tables": shown, "episodes": episodes}
    # Numbers that JavaScript cannot hold (NaN, integers of many digits) become texts.
    data = json.loads(json.dumps(data), parse_constant=str, parse_int=lambda n: int(n) if len(n) < 16 else n)
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # A transcript may hold "</script>": escaped, it cannot end the element that carries the data.
    return template.replace("/*DATA*/", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))
