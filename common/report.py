"""From transcripts to results: results.json of one run, and the tables, the page and the pictures of many runs.

    python evaluate.py report runs/miniature

A run folder holds run.json (its configuration), model.json ({"model", "parameters", "training"}) and one
transcripts.RANK.jsonl per process. Everything here is computed from these files, so that it also works while runs are
in progress. If run.json has "questions": {task: number}, unfinished tasks are marked "n of number".
"""

import collections
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common import InputError, parse_object, read_text, write_json


class Task(NamedTuple):
    """A benchmark of the paper. kind: "fact" | "math". domain: "in" | "out". questions: in the paper's test set."""

    label: str
    kind: str
    domain: str
    questions: int


TASKS = {  # in the paper's order
    "hotpotqa": Task("HotpotQA", "fact", "in", 500),
    "2wikimultihopqa": Task("2WikiMultiHopQA", "fact", "out", 500),
    "musique": Task("MuSiQue", "fact", "out", 500),
    "bamboogle": Task("Bamboogle", "fact", "out", 125),
    "math": Task("MATH", "math", "in", 500),
    "gsm_hard": Task("GSM-Hard", "math", "out", 500),
    "aime": Task("AIME", "math", "out", 90),
    "olymmath": Task("OlymMATH", "math", "out", 200),
}

# The paper's averages over its eight tasks, in %. The students are Qwen2.5-Instruct 0.5B, 1.5B, 3B and 7B.
PAPER_SIZES = [494_032_768, 1_543_714_304, 3_085_938_688, 7_615_616_512]
PAPER = {
    ("cot distill", "greedy"): [13.64, 21.28, 27.72, 33.54],
    ("cot-rag distill", "greedy"): [15.90, 24.64, 28.53, 32.16],
    ("agent distill", "greedy"): [19.24, 28.06, 33.60, 39.85],
    ("agent distill+prefix", "sc8"): [21.90, 30.55, 36.60, 42.68],
}

METHODS = ["cot prompting", "cot-rag prompting", "agent prompting",
           "cot distill", "cot-rag distill", "agent distill", "agent distill+prefix"]  # fmt: skip

# Options that do not alter results. "prompts" is a path; the hash of the prompts' text counts instead.
NOT_SETTINGS = set(
    "seed out name quiet batch concurrency tasks limit questions url device api_key_env prompts system_prompt".split()
)
SEED = re.compile(r"(seed[-_]?)\d+")


# ---------------------------------------------------------------------------------------------
# One run
# ---------------------------------------------------------------------------------------------


def transcript_files(folder):
    return sorted(Path(folder).glob("transcripts.*.jsonl"))


def transcripts(folder):
    """All transcript rows of a run. An incomplete last line is ignored."""
    rows = []
    for path in transcript_files(folder):
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
            if line.endswith(b"\n") and line.strip():
                rows.append(parse_object(line, f"{path}:{number}"))
    return rows


class Outcome(NamedTuple):
    """What the tables need of one transcript row. figures: the row's numbers for the table of tool use."""

    task: str
    question: tuple  # (id, text): two worlds may use one id for two questions
    kind: str
    domain: str
    correct: bool
    figures: dict


def outcome(row):
    """The Outcome of a transcript row."""
    steps, kinds = row["steps"], collections.Counter(step.get("error_kind") for step in row["steps"])
    figures = {
        "searches": sum((step.get("code") or "").count("web_search(") for step in steps),
        "steps": len(steps),
        "parse errors": kinds["no_code"] + kinds["syntax"],
        "run-time errors": sum(kinds[kind] for kind in ("runtime", "timeout", "memory", "killed")),
        "no answer": int(row["stop"] != "final_answer"),
        "tokens": row.get("usage", {}).get("completion_tokens", 0),
    }
    task = row["task"]
    domain = row.get("domain") or (TASKS[task].domain if task in TASKS else "out")
    return Outcome(task, (row["id"], row["question"]), row["kind"], domain, bool(row["correct"]), figures)


def means(outcomes):
    """The figures of tool use as means per question."""
    return {name: float(np.mean([o.figures[name] for o in outcomes])) for name in outcomes[0].figures}


def by_task(outcomes):
    """{task: its outcomes}, the paper's tasks first and in its order."""
    tasks = collections.defaultdict(list)
    for o in sorted(outcomes, key=lambda o: _place(o.task)):
        tasks[o.task].append(o)
    return tasks


def _place(task):
    return (list(TASKS).index(task) if task in TASKS else len(TASKS), task)


class Run:
    """A run folder: who answered, how, and all outcomes. Raises InputError if run.json is missing or broken.

    settings: the options that alter results. Seeds may have folders of their own (seed0/index, seed1/index), so the
    number after "seed" is left out of all names. replicate: equal for runs that repeat one seed.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        text = read_text(self.folder / "run.json")
        config, about = parse_object(SEED.sub(r"\1*", text), f"{folder}/run.json"), {}
        if (self.folder / "model.json").exists():
            about = parse_object(SEED.sub(r"\1*", read_text(self.folder / "model.json")), f"{folder}/model.json")
        if "method" not in config:
            raise InputError(f"{folder}/run.json: not the configuration of an evaluation: it has no method")
        self.model = str(config.get("name") or about.get("model") or config.get("model"))
        self.parameters, training = about.get("parameters"), about.get("training")
        self.method = f"{config['method']} {training if training not in (None, 'none') else 'prompting'}"
        self.decoding = "sampled" if config.get("sample") else "greedy"
        if config.get("sc", 1) > 1:
            self.decoding = f"sc{config['sc']}"
        self.seed, self.questions = config.get("seed", 0), config.get("questions") or {}
        self.settings, self.replicate = _settings(config), json.dumps([self.seed, _settings(json.loads(text))])
        self.outcomes = [outcome(row) for row in transcripts(folder)]


def _settings(config):
    """The options that alter results, named as on the command line; a hash is shortened."""
    greedy = config.get("sc", 1) == 1 and not config.get("sample")
    unused = NOT_SETTINGS | ({"temperature", "top_p"} if greedy else set())
    settings = {}
    for name, value in config.items():
        if name not in unused and value is not None:
            shown = value[:8] if name.endswith("_sha256") and value else value
            settings[name.removesuffix("_sha256").replace("_", "-")] = shown
    return settings


def summarise(folder):
    """Write results.json of one run folder, one row per task, and return a line that describes it."""
    run, rows = Run(folder), []
    for task, outcomes in by_task(run.outcomes).items():
        n, correct = len(outcomes), sum(o.correct for o in outcomes)
        about = {"model": run.model, "parameters": run.parameters, "method": run.method, "decoding": run.decoding}
        about |= {"task": task, "kind": outcomes[0].kind, "domain": outcomes[0].domain, "n": n, "correct": correct}
        ends = [round(end, 4) for end in wilson(correct / n, n)]
        rows.append(about | {"accuracy": correct / n, "ci95": ends, "errors": means(outcomes)})
    write_json(run.folder / "results.json", rows)
    mean = np.mean([row["accuracy"] for row in rows]) if rows else 0.0
    return f"{len(run.outcomes)} questions, {len(rows)} tasks, average {mean:.1%}"


# ---------------------------------------------------------------------------------------------
# Intervals and tests
# ---------------------------------------------------------------------------------------------


def wilson(p, n, z=1.959964):
    """Wilson's 95 % interval of a proportion p among n. Unlike the bootstrap, it is not empty at p = 0 and p = 1."""
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))


def interval(seeds, draws=1_000):
    """The mean over tasks of the accuracy, with its 95 % interval: (mean, low, high).

    seeds: one dict per seed, {task: {question: right or wrong}}.
    It is Wilson's interval of the mean, with the n that gives the mean its variance if all tasks are equally hard
    (tasks of different difficulty make it a little too wide). With several seeds, it is widened to that of a bootstrap
    in two levels where that is wider: each draw takes S - 1 of the S seeds (S of S would give too small a variance:
    Rao and Wu, 1988) and as many questions as there are. A question that several seeds answered is drawn for all of
    them together.
    """
    tables = []  # of each task: (seeds, questions), 1 right, 0 wrong, NaN not answered
    for task in sorted({task for seed in seeds for task in seed}):
        questions = sorted({question for seed in seeds for question in seed.get(task, {})})
        tables.append(np.array([[seed.get(task, {}).get(q, np.nan) for q in questions] for seed in seeds], float))
    mean = float(np.mean([np.nanmean(table) for table in tables]))
    low, high = wilson(mean, len(tables) ** 2 / sum(1 / table.shape[1] for table in tables))
    if len(seeds) > 1:
        rng, means = np.random.default_rng(0), []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a draw may lack a task that only one seed has answered so far
            for _ in range(draws):
                taken = rng.integers(len(seeds), size=len(seeds) - 1)
                drawn = [table[taken][:, rng.integers(table.shape[1], size=table.shape[1])] for table in tables]
                means.append(np.nanmean([np.nanmean(table) for table in drawn]))
        ends = np.nanquantile(means, [0.025, 0.975])
        low, high = min(low, float(ends[0])), max(high, float(ends[1]))
    return mean, low, high


def mcnemar(first, second):
    """Exact McNemar test on paired outcomes: (only first right, only second right, two-sided p)."""
    lost = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    won = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    n = lost + won
    p = 2 * sum(math.comb(n, k) for k in range(min(lost, won) + 1)) / 2**n
    return lost, won, min(p, 1.0)


def paired_table(first, second, names):
    """Two runs on the questions that both answered, by task. first, second: {(task, id, ...): right or wrong}."""
    shared = sorted(first.keys() & second.keys(), key=lambda key: _place(key[0]))
    if not shared:
        raise InputError(f"{names[0]} and {names[1]} have no question in common")
    rows = []
    for task in [*dict.fromkeys(key[0] for key in shared), "all"]:
        pairs = [(first[key], second[key]) for key in shared if task in (key[0], "all")]
        lost, won, p = mcnemar(*zip(*pairs, strict=True))
        a, b = (100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        rows.append([task, len(pairs), f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", lost, won, f"{p:.2g}"])
    head = ["task", "n", *names, "gain", f"only {names[0]}", f"only {names[1]}", "p (McNemar)"]
    return table(head, rows)


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------
# Many runs
# ---------------------------------------------------------------------------------------------


class System:
    """One line of the tables: the runs that differ in nothing but the seed.

    tasks: {task: (right, answered)}. averages: {"all" | "in" | "out": (mean over tasks, low, high)}, as the paper
    averages. load_systems sets the others: total, {task: questions that a complete system answers}; setting, the
    settings that distinguish this system from others of the same method; name, which is short and unique.
    """

    def __init__(self, runs):
        self.runs, first = runs, runs[0]
        self.model, self.parameters, self.method = first.model, first.parameters, first.method
        self.decoding, self.settings, self.setting, self.total = first.decoding, first.settings, "", {}
        seeds = collections.defaultdict(dict)
        for run in runs:
            seeds[run.replicate] |= {(o.task, o.question): o for o in run.outcomes}
        self.seeds = [list(seed.values()) for seed in seeds.values()]
        self.outcomes = [o for seed in self.seeds for o in seed]
        self.tasks = {task: (sum(o.correct for o in got), len(got)) for task, got in by_task(self.outcomes).items()}
        self.averages = {}
        for domain in ("all", "in", "out"):
            answered = [by_task(o for o in seed if domain in ("all", o.domain)) for seed in self.seeds]
            right = [{t: {o.question: o.correct for o in got} for t, got in seed.items()} for seed in answered if seed]
            if right:
                self.averages[domain] = interval(right)

    def complete(self):
        return all(self.tasks.get(task, (0, 0))[1] >= total for task, total in self.total.items())

    def paper(self):
        """The paper's average (%), if this is one of its students, methods and all its test questions; else None."""
        asked = {task: len({o.question for o in got}) for task, got in by_task(self.outcomes).items()}
        if self.parameters in PAPER_SIZES and asked == {task: fact.questions for task, fact in TASKS.items()}:
            figures = PAPER.get((self.method, self.decoding))
            return figures and figures[PAPER_SIZES.index(self.parameters)]


def load_systems(folder):
    """All run folders at or below a folder that have a finished question, as systems in the table's order.

    Raises InputError if there is none.
    """
    folders = sorted({path.parent for path in Path(folder).rglob("transcripts.*.jsonl")})
    runs = [run for run in map(Run, folders) if run.outcomes]
    if not runs:
        raise InputError(f"{folder}: no run folder with finished questions in it: evaluate something first")
    one, alike, largest = collections.defaultdict(list), collections.defaultdict(list), collections.Counter()
    for run in runs:
        one[json.dumps([run.model, run.parameters, run.method, run.settings], sort_keys=True)].append(run)
        largest |= collections.Counter(o.task for o in run.outcomes) | collections.Counter(run.questions)
    systems = [System(group) for group in one.values()]
    for s in systems:
        s.total = {task: len(s.seeds) * largest[task] for task in sorted(largest, key=_place)}
        alike[s.model, s.parameters, s.method, s.decoding].append(s)
    for group in alike.values():
        different = differing(group)
        for s in group:
            s.setting = ", ".join(f"{name} {s.settings.get(name)}" for name in different)
            model = [] if len({run.model for run in runs}) == 1 else [s.model]
            s.name = ", ".join([*model, s.method, s.decoding, *filter(None, [s.setting])])
    order = {method: i for i, method in enumerate(METHODS)}
    return sorted(systems, key=lambda s: (s.parameters or 0, s.model, order.get(s.method, 99), s.decoding, s.setting))


def differing(systems):
    """Names of the settings in which systems differ."""
    names = dict.fromkeys(name for s in systems for name in s.settings)
    return [name for name in names if len({json.dumps(s.settings.get(name)) for s in systems}) > 1]


def label(task):
    """The name of a task as the paper writes it."""
    return TASKS[task].label if task in TASKS else task


def markdown(folder):
    """The report as Markdown: accuracies, then the figures of tool use. Unfinished results are marked with n of N."""
    systems = load_systems(folder)
    columns = {
        "student": [s.model for s in systems],
        "size": [_size(s.parameters) for s in systems],
        "method": [s.method for s in systems],
        "decoding": [s.decoding for s in systems],
        "setting": [s.setting for s in systems],
        "seeds": [len(s.seeds) * any(len(s.seeds) > 1 for s in systems) for s in systems],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    accuracy = columns | {
        "average [95 %]": [_average(s, "all") for s in systems],
        "in-domain": [_average(s, "in").split(" [")[0] for s in systems],
        "out-of-domain": [_average(s, "out").split(" [")[0] for s in systems],
    }
    accuracy |= {label(task): [_task_cell(s, task) for s in systems] for task in systems[0].total}
    if any(s.paper() for s in systems):
        accuracy["paper's average"] = [s.paper() or "" for s in systems]
    figures = [means(s.outcomes) for s in systems]
    use = columns | {
        name: [f"{f[name]:.0f}" if name == "tokens" else f"{f[name]:.2f}" for f in figures] for name in figures[0]
    }
    tables = [table(list(t), zip(*t.values(), strict=True)) for t in (accuracy, use)]
    return f"Accuracy in %:\n\n{tables[0]}\n\n{notes(systems)}\n\nMeans per question:\n\n{tables[1]}\n"


def _average(system, domain):
    if domain not in system.averages:
        return ""
    mean, low, high = (100 * x for x in system.averages[domain])
    return f"{mean:.1f} [{low:.1f}, {high:.1f}]"


def _task_cell(system, task):
    right, n = system.tasks.get(task, (0, 0))
    total = system.total[task]
    return (f"{100 * right / n:.1f}" if n else "") + (f" ({n} of {total})" if n < total else "")


def notes(systems):
    """How the numbers were made, in one paragraph."""
    several = any(len(s.seeds) > 1 for s in systems)
    sizes = sorted({s.total[task] // len(s.seeds) for s in systems for task in s.total})
    n = sizes[0] if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    lines = [f"{n} questions per task{' and seed' * several}. Averages are means over tasks, as in the paper."]
    lines.append("The 95 % interval of an average is Wilson's, from all questions of its tasks.")
    if several:
        lines.append("With several seeds it is widened to that of a bootstrap over seeds and questions.")
    if not all(s.complete() for s in systems):
        lines.append('Where a cell says "n of N", not all questions are answered; averages are over those answered.')
    return " ".join(lines)


def _size(parameters):
    if not parameters:
        return ""
    return f"{parameters / 1e9:.2g}B" if parameters >= 1e9 else f"{parameters / 1e6:.3g}M"


def html(folder, per_task=10):
    """The report as one self-contained page, report.html filled with data: tables, charts, a browser of episodes.

    per_task: episodes kept for each task of a run; the first ones by id, so that systems show the same questions.
    """
    systems = load_systems(folder)
    kept = ("task", "id", "question", "answer", "prediction", "correct", "why", "stop", "error", "steps")
    episodes = []
    for number, system in enumerate(systems):
        for run in system.runs:
            questions = {task: sorted(o.question for o in got) for task, got in by_task(run.outcomes).items()}
            shown = {(task, question) for task, found in questions.items() for question in found[:per_task]}
            rows = [row for row in transcripts(run.folder) if (row["task"], (row["id"], row["question"])) in shown]
            for row in sorted(rows, key=lambda row: (_place(row["task"]), row["id"])):
                episode = {name: row.get(name) for name in kept}
                episodes.append(episode | {"system": number, "seed": run.seed if len(system.runs) > 1 else None})
    different = differing(systems)
    data = {
        "tasks": {task: label(task) for task in systems[0].total},
        "systems": [_plain(s) for s in systems],
        "same": {name: value for name, value in systems[0].settings.items() if name not in different},
        "different": different,
        "episodes": episodes,
        "notes": f"{notes(systems)} The browser shows up to {per_task} episodes per task and run.",
    }
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # A transcript may hold "</script>": escaped, it cannot end the element that carries the data.
    return template.replace("/*DATA*/", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))


def _plain(system):
    """A system as the page needs it."""
    tasks = {task: [right, n, system.total[task], *wilson(right / n, n)] for task, (right, n) in system.tasks.items()}
    about = {name: getattr(system, name) for name in ("model", "parameters", "method", "settings", "averages")}
    about |= {"name": system.name, "size": _size(system.parameters), "paper": system.paper(), "tasks": tasks}
    return about | {"seeds": [run.seed for run in system.runs], "use": means(system.outcomes)}
