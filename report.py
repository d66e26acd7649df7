"""From transcripts to tables: results.json of a run, and the report over many runs.

    python evaluate.py report runs/miniature

A run folder holds run.json (its configuration), model.json (name and size of the student), one or
several transcripts.*.jsonl (one for each shard) and results.json, which is made from the others.
"""

import collections
import json
import math
from pathlib import Path

import numpy as np

from common import InputError, write_json

TASKS = {  # the paper's order: in-domain first within each kind
    "fact": ["hotpotqa", "2wikimultihopqa", "musique", "bamboogle"],
    "math": ["math", "gsm_hard", "aime", "olymmath"],
}


def transcript_files(folder):
    return sorted(Path(folder).glob("transcripts.*.jsonl"))


def transcripts(folder):
    """All transcript rows of a run. A torn last line, left by a kill, is not there yet."""
    rows = []
    for path in transcript_files(folder):
        text = path.read_bytes()
        rows += [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]
    return rows


def summarise(folder):
    """Write results.json of one run folder: one row a task. Returns a line for people."""
    folder = Path(folder)
    config = json.loads((folder / "run.json").read_text())
    about = json.loads((folder / "model.json").read_text()) if (folder / "model.json").exists() else {}
    by_task = collections.defaultdict(list)
    for row in transcripts(folder):
        by_task[row["task"], row["kind"], row["domain"]].append(row)
    results = []
    for (task, kind, domain), rows in sorted(by_task.items()):
        correct = sum(row["correct"] for row in rows)
        results.append(
            {
                "model": config["name"] or about.get("model"),
                "parameters": about.get("parameters"),
                "method": f"{config['method']} {config['training']}",
                "decoding": "greedy" if config["sc"] == 1 else f"sc{config['sc']}",
                "task": task,
                "kind": kind,
                "domain": domain,
                "n": len(rows),
                "correct": correct,
                "accuracy": correct / len(rows),
                "ci95": interval([(correct, len(rows))]),
                "errors": _errors(rows),
            }
        )
    write_json(folder / "results.json", results)
    mean = np.mean([row["accuracy"] for row in results]) if results else 0.0
    return f"{sum(row['n'] for row in results)} questions, {len(results)} tasks, average {mean:.1%}"


def _errors(rows):
    """The paper's error analysis, as means over questions."""
    steps = [step for row in rows for step in row["steps"]]
    kinds = collections.Counter(step["error_kind"] for step in steps)
    n = len(rows)
    return {
        "steps": len(steps) / n,
        "parse errors": (kinds["no_code"] + kinds["syntax"]) / n,
        "run-time errors": sum(kinds[k] for k in ("runtime", "timeout", "memory", "killed")) / n,
        "searches": sum((step["code"] or "").count("web_search(") for step in steps) / n,
        "no answer": sum(row["stop"] != "final_answer" for row in rows) / n,
        "tokens": sum(row["usage"].get("completion_tokens", 0) for row in rows) / n,
    }


def interval(counts, draws=10_000, seed=0):
    """95 % bootstrap interval of the mean of accuracies. counts: (correct, n) for each task.

    Resampling n right-or-wrong answers with replacement is a binomial draw, so it is drawn as one.
    """
    rng = np.random.default_rng(seed)
    means = np.mean([rng.binomial(n, correct / n, draws) / n for correct, n in counts], axis=0)
    return [round(float(q), 4) for q in np.quantile(means, [0.025, 0.975])]


def mcnemar(first, second):
    """Exact McNemar test on paired outcomes: (only first right, only second right, two-sided p)."""
    lost = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    won = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    n = lost + won
    p = 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    return lost, won, min(p, 1.0)


def paired_table(first, second, names):
    """Two runs on the questions that both answered, task by task. first, second: {(task, id, ...): right or not}."""
    common = sorted(first.keys() & second.keys())
    if not common:
        raise InputError(f"{names[0]} and {names[1]} have no question in common")
    rows = []
    for task in [*sorted({key[0] for key in common}), "all"]:
        pairs = [(first[key], second[key]) for key in common if task in (key[0], "all")]
        lost, won, p = mcnemar(*zip(*pairs, strict=True))
        a, b = (100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        rows.append([task, len(pairs), f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", lost, won, f"{p:.2g}"])
    head = ["task", "n", *names, "gain", f"only {names[0]}", f"only {names[1]}", "p (McNemar)"]
    return table(head, rows)


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------
# The report over many runs
# ---------------------------------------------------------------------------------------------

METHODS = ["cot none", "cot-rag none", "agent none", "cot distill", "cot-rag distill", "agent distill",
           "agent distill+prefix"]  # fmt: skip

# The paper's averages over its eight tasks, in %, of Qwen2.5-Instruct students with these numbers of parameters.
PAPER_SIZES = {494_032_768: "0.5B", 1_543_714_304: "1.5B", 3_085_938_688: "3B", 7_615_616_512: "7B"}
PAPER = {
    ("cot distill", "greedy"): ("CoT distill", [13.64, 21.28, 27.72, 33.54]),
    ("cot-rag distill", "greedy"): ("CoT distill + RAG", [15.90, 24.64, 28.53, 32.16]),
    ("agent distill", "greedy"): ("agent distill", [19.24, 28.06, 33.60, 39.85]),
    ("agent distill+prefix", "sc8"): ("agent distill + first-thought prefix + SC-action", [21.90, 30.55, 36.60, 42.68]),
}


class System:
    """One line of the table: a student under one method and decoding, pooled over its runs (seeds)."""

    def __init__(self, key, parameters):
        self.model, self.method, self.decoding = key
        self.parameters = parameters
        self.tasks = {}  # task -> [correct, n]
        self.runs = collections.defaultdict(dict)  # run folder's parent -> task -> accuracy
        self.domains, self.errors = {}, collections.defaultdict(list)

    def add(self, row, run):
        counts = self.tasks.setdefault(row["task"], [0, 0])
        counts[0] += row["correct"]
        counts[1] += row["n"]
        self.runs[run][row["task"]] = row["accuracy"]
        self.domains[row["task"]] = row["domain"]
        for name, value in row["errors"].items():
            self.errors[name].append(value)

    def counts(self, domain=None):
        return [tuple(c) for task, c in self.tasks.items() if domain in (None, self.domains[task])]

    def paper(self):
        """The paper's average for a student of this very size under this method; None if it has none."""
        if self.parameters in PAPER_SIZES and (self.method, self.decoding) in PAPER:
            return PAPER[self.method, self.decoding][1][list(PAPER_SIZES).index(self.parameters)]

    def average(self, domain=None):
        """Mean accuracy over tasks, as the paper averages, with its 95 % interval; None without tasks."""
        counts = self.counts(domain)
        return (float(np.mean([c / n for c, n in counts])), *interval(counts)) if counts else None


def load_systems(folder):
    """Every results.json below the folder, pooled into systems in the table's order."""
    systems = {}
    for path in sorted(Path(folder).rglob("results.json")):
        for row in json.loads(path.read_text(encoding="utf-8")):
            key = row["model"], row["method"], row["decoding"]
            system = systems.setdefault(key, System(key, row["parameters"]))
            system.add(row, str(path.parent.parent))
    if not systems:
        raise InputError(f"{folder}: no results.json below it: evaluate something first")
    order = {method: i for i, method in enumerate(METHODS)}
    return sorted(
        systems.values(), key=lambda s: (s.parameters or 0, str(s.model), order.get(s.method, 99), s.decoding)
    )


def task_order(systems):
    """The tasks that occur: the paper's in its order, then others."""
    names = [task for kind in TASKS.values() for task in kind]
    present = {task for system in systems for task in system.tasks}
    return [task for task in names if task in present] + sorted(present - set(names))


def markdown(folder):
    """The report as Markdown: accuracies, the paper's comparison, errors."""
    systems = load_systems(folder)
    parts = [_accuracy_table(systems, task_order(systems)), _comparison(systems), _error_table(systems), _paper_table()]
    return "\n".join(part for part in parts if part)


def html(folder, per_task=10):
    """The report as one self-contained page, report.html filled with data: tables, charts, a browser of episodes.

    per_task: episodes kept for each task of a run; the first ones, so that systems show the same questions.
    """
    systems = load_systems(folder)
    places = {(s.model, s.method, s.decoding): i for i, s in enumerate(systems)}
    episodes = []
    for path in sorted(Path(folder).rglob("results.json")):
        first = json.loads(path.read_text(encoding="utf-8"))[0]
        seen = collections.Counter()
        for row in sorted(transcripts(path.parent), key=lambda row: (row["task"], row["id"])):
            seen[row["task"]] += 1
            if seen[row["task"]] <= per_task:
                kept = ("task", "question", "answer", "prediction", "correct", "why", "stop", "steps")
                system = places[first["model"], first["method"], first["decoding"]]
                episodes.append({name: row[name] for name in kept} | {"system": system})
    data = {
        "tasks": task_order(systems),
        "systems": [_plain(s) for s in systems],
        "episodes": episodes,
        "per_task": per_task,
        "note": "Accuracies are over all questions.",
    }
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # A transcript may hold "</script>": escaped, it cannot end the element that carries the data.
    return template.replace("/*DATA*/", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))


def _plain(system):
    averages = {"all": system.average(), "in": system.average("in"), "out": system.average("out")}
    names = ("model", "method", "decoding", "parameters", "tasks")
    about = {"size": _size(system.parameters), "paper": system.paper()}
    return {name: getattr(system, name) for name in names} | about | averages


def _accuracy_table(systems, names):
    head = ["student", "parameters", "method", "decoding", *names, "in-domain", "out-of-domain", "average [95 %]"]
    compared = any(s.paper() for s in systems)  # with the paper's own students
    rows = []
    for s in systems:
        cells = [f"{100 * s.tasks[t][0] / s.tasks[t][1]:.0f}" if t in s.tasks else "" for t in names]
        domains = [f"{100 * s.average(d)[0]:.1f}" if s.average(d) else "" for d in ("in", "out")]
        paper = [s.paper() or ""] * compared
        rows.append([s.model, _size(s.parameters), s.method, s.decoding, *cells, *domains, _average(s), *paper])
    n = sorted({n for s in systems for _, n in s.tasks.values()})
    runs = max(len(s.runs) for s in systems)
    pooled = f", pooled over up to {runs} seeds" if runs > 1 else ""
    count = n[0] if n[0] == n[-1] else f"{n[0]} to {n[-1]}"
    note = f"{count} questions a task and system{pooled}; the average is over tasks, as in the paper."
    return f"Accuracy, %:\n\n{table(head + ['paper'] * compared, rows)}\n\n{note}\n"


def _comparison(systems):
    """What the paper compares: the agent with CoT at its own size, and with CoT of the next size up."""
    best = {}
    for s in systems:
        if s.parameters and "distill" in s.method:
            kind = "agent" if s.method.startswith("agent") else "CoT"
            if (s.parameters, kind) not in best or s.average()[0] > best[s.parameters, kind].average()[0]:
                best[s.parameters, kind] = s
    sizes = sorted({size for size, _ in best})
    head = ["agent", "average", "against", "average", "difference", "intervals"]
    rows = []
    for i, size in enumerate(sizes):
        for other in sizes[i : i + 2]:
            if (size, "agent") in best and (other, "CoT") in best:
                rows.append(_compare(best[size, "agent"], best[other, "CoT"]))
    return f"Agent against CoT, the best of each (average over tasks, %):\n\n{table(head, rows)}\n" if rows else ""


def _compare(agent, cot):
    (a, a_low, _), (c, _, c_high) = agent.average(), cot.average()
    names = [f"{s.model}: {s.method}, {s.decoding}" for s in (agent, cot)]
    apart = "apart" if a_low > c_high else "overlap"
    return [names[0], _average(agent), names[1], _average(cot), f"{100 * (a - c):+.1f}", apart]


def _error_table(systems):
    names = list(systems[0].errors)
    head = ["student", "method", "decoding", *names]
    rows = [[s.model, s.method, s.decoding, *(f"{np.mean(s.errors[name]):.2f}" for name in names)] for s in systems]
    return f"Means a question:\n\n{table(head, rows)}\n"


def _paper_table():
    rows = [[name, *(f"{figure:.2f}" for figure in figures)] for name, figures in PAPER.values()]
    title = "The paper's averages over its eight tasks (%), Qwen2.5-Instruct students, for orientation:"
    return f"{title}\n\n{table(['', *PAPER_SIZES.values()], rows)}\n"


def _average(system):
    mean, low, high = system.average()
    return f"{100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def _size(parameters):
    if parameters is None:
        return ""
    return f"{parameters / 1e9:.2f}B" if parameters >= 1e8 else f"{parameters / 1e6:.2f}M"
