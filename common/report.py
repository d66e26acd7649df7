"""From transcripts to results: results.json of one run, and the tables and the page of many runs.

    python evaluate.py report runs/miniature

A run folder holds run.json (its configuration), model.json ({"model", "parameters", "training"}) and one
transcripts.RANK.jsonl per process. Only these are read, so a report can be made while runs are in progress; unfinished
tasks are marked if run.json has "questions": {task: number}.
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

# Options that do not alter results. "prompts" is a path; the hash of the prompts' text counts instead.
NOT_SETTINGS = set(
    "seed out name quiet batch concurrency tasks limit questions url device api_key_env prompts system_prompt".split()
)
SEED = re.compile(r"(seed[-_]?)\d+")


# ------------- One run


def transcript_files(folder):
    return sorted(Path(folder).glob("transcripts.*.jsonl"))


def transcripts(folder):
    """All transcript rows of a run. An incomplete last line is ignored."""
    rows = []
    for path in transcript_files(folder):
        lines = path.read_bytes().split(b"\n")[:-1]
        rows += [parse_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    return rows


def outcome(row):
    """What the tables need of a transcript row. question: (id, text): two worlds may use one id for two questions."""
    steps, kinds = row["steps"], collections.Counter(step.get("error_kind") for step in row["steps"])
    figures = {
        "searches": sum((step.get("code") or "").count("web_search(") for step in steps),
        "steps": len(steps),
        "parse errors": kinds["no_code"] + kinds["syntax"],
        "run-time errors": sum(kinds[kind] for kind in ("runtime", "timeout", "memory", "killed")),
        "no answer": int(row["stop"] != "final_answer"),
        "tokens": row.get("usage", {}).get("completion_tokens", 0),
    }
    domain = row.get("domain") or (TASKS[row["task"]].domain if row["task"] in TASKS else "out")
    about = {name: row[name] for name in ("task", "kind", "correct")}
    return about | {"domain": domain, "question": (row["id"], row["question"]), "figures": figures}


def means(outcomes):
    """The figures of tool use as means per question."""
    return {name: float(np.mean([o["figures"][name] for o in outcomes])) for name in outcomes[0]["figures"]}


def accuracy(outcomes):
    return float(np.mean([o["correct"] for o in outcomes]))


def by_task(outcomes):
    """{task: its outcomes}, the paper's tasks first and in its order."""
    tasks = collections.defaultdict(list)
    for o in sorted(outcomes, key=lambda o: place(o["task"])):
        tasks[o["task"]].append(o)
    return tasks


def place(task):
    return (list(TASKS).index(task) if task in TASKS else len(TASKS), task)


class Run:
    """A run folder: who answered, how, and all outcomes. Raises InputError if run.json is missing or broken.

    settings: the options that alter results. Seeds may have folders of their own (seed0/index, seed1/index), so the
    number after "seed" is left out of them. replicate: equal for runs of one seed.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        config, about = parse_object(read_text(self.folder / "run.json"), f"{folder}/run.json"), {}
        if (self.folder / "model.json").exists():
            about = parse_object(read_text(self.folder / "model.json"), f"{folder}/model.json")
        if "method" not in config:
            raise InputError(f"{folder}/run.json: not the configuration of an evaluation: it has no method")
        model = SEED.sub(r"\1*", str(config.get("name") or about.get("model") or config.get("model")))
        training = about.get("training") or "none"
        method = f"{config['method']} {'prompting' if training == 'none' else training}"
        greedy = config.get("sc", 1) == 1 and not config.get("sample")
        decoding = f"sc{config['sc']}" if config.get("sc", 1) > 1 else "greedy" if greedy else "sampled"
        self.who = (model, about.get("parameters"), method, decoding)
        self.seed, self.questions = config.get("seed", 0), config.get("questions") or {}
        unused = NOT_SETTINGS | ({"temperature", "top_p"} if greedy else set())
        given = {name: value for name, value in config.items() if value is not None}
        settings = json.dumps({name: value for name, value in given.items() if name not in unused})
        self.settings, self.replicate = json.loads(SEED.sub(r"\1*", settings)), (self.seed, settings)
        self.outcomes = [outcome(row) for row in transcripts(folder)]


def summarise(folder):
    """Write results.json of one run folder, one row per task, and return a line that describes it."""
    run, rows = Run(folder), []
    about = dict(zip(("model", "parameters", "method", "decoding"), run.who, strict=True))
    for task, outcomes in by_task(run.outcomes).items():
        n, mean = len(outcomes), accuracy(outcomes)
        row = about | {"task": task, "kind": outcomes[0]["kind"], "domain": outcomes[0]["domain"], "n": n}
        row |= {"correct": sum(o["correct"] for o in outcomes), "accuracy": mean}
        rows.append(row | {"ci95": [round(end, 4) for end in wilson(mean, n)], "errors": means(outcomes)})
    write_json(run.folder / "results.json", rows)
    average = np.mean([row["accuracy"] for row in rows]) if rows else 0.0
    return f"{len(run.outcomes)} questions, {len(rows)} tasks, average {average:.1%}"


# ------------- Intervals and tests

Z = 1.959964  # 95 % of a normal distribution lie within Z standard deviations


def wilson(p, n):
    """Wilson's 95 % interval of a proportion p among n. It is not empty at p = 0 and p = 1."""
    centre, half = p + Z * Z / (2 * n), Z * math.sqrt(p * (1 - p) / n + (Z / (2 * n)) ** 2)
    return max(0.0, (centre - half) / (1 + Z * Z / n)), min(1.0, (centre + half) / (1 + Z * Z / n))


def interval(seeds, draws=1_000):
    """The mean over tasks of the accuracy, with its 95 % interval: (mean, low, high). seeds: the outcomes of each seed.

    It is Wilson's interval of the mean, with the n that gives the mean its variance if all tasks are equally hard
    (tasks of different difficulty make it a little too wide). With several seeds, it is widened to that of a bootstrap
    in two levels where that is wider: each draw takes S - 1 of the S seeds (S of S would give too small a variance:
    Rao and Wu, 1988) and as many questions as there are. A question that several seeds answered is drawn for all of
    them together.
    """
    tables = []  # of each task: (seeds, questions), 1 right, 0 wrong, NaN not answered
    for task, outcomes in by_task(o for seed in seeds for o in seed).items():
        questions = dict.fromkeys(o["question"] for o in outcomes)
        right = [{o["question"]: o["correct"] for o in seed if o["task"] == task} for seed in seeds]
        tables.append(np.array([[answers.get(q, np.nan) for q in questions] for answers in right], float))
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
    counts = collections.Counter(zip(map(bool, first), map(bool, second), strict=True))
    lost, won = counts[True, False], counts[False, True]
    p = 2 * sum(math.comb(lost + won, k) for k in range(min(lost, won) + 1)) / 2 ** (lost + won)
    return lost, won, min(p, 1.0)


def paired_table(first, second, names):
    """Two runs on the questions that both answered, by task. first, second: {(task, id, ...): right or wrong}."""
    shared = sorted(first.keys() & second.keys(), key=lambda key: place(key[0]))
    if not shared:
        raise InputError(f"{names[0]} and {names[1]} have no question in common")
    rows = []
    for task in [*dict.fromkeys(key[0] for key in shared), "all"]:
        pairs = [(first[key], second[key]) for key in shared if task in (key[0], "all")]
        lost, won, p = mcnemar(*zip(*pairs, strict=True))
        a, b = (100 * sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        rows.append([task, len(pairs), f"{a:.1f}", f"{b:.1f}", f"{b - a:+.1f}", lost, won, f"{p:.2g}"])
    return table(["task", "n", *names, "gain", *(f"only {name}" for name in names), "p (McNemar)"], rows)


def table(head, rows):
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


# ------------- Many runs: tables and page

NOTES = "Averages are means over tasks, with Wilson's 95 % intervals, wider where seeds differ. (n of N): unfinished."


class System:
    """One line of the tables: the runs that differ in nothing but the seed.

    averages: {"all" | "in" | "out": (mean over tasks, low, high)}. load_systems sets total, {task: questions that a
    complete system answers}; setting, what distinguishes it from others of its method and model; and a unique name.
    """

    def __init__(self, runs):
        self.runs, self.settings, self.who = runs, runs[0].settings, runs[0].who
        self.model, self.parameters, self.method, self.decoding = self.who
        seeds = collections.defaultdict(dict)
        for run in runs:
            seeds[run.replicate] |= {(o["task"], o["question"]): o for o in run.outcomes}
        self.seeds, self.averages = len(seeds), {}
        self.outcomes = [o for seed in seeds.values() for o in seed.values()]
        for domain in ("all", "in", "out"):
            answered = [[o for o in seed.values() if domain in ("all", o["domain"])] for seed in seeds.values()]
            if any(answered):
                self.averages[domain] = interval([seed for seed in answered if seed])


def load_systems(folder):
    """The systems in and below a folder, small models and low averages first. Raises InputError if there is none."""
    folders = sorted({path.parent for path in Path(folder).rglob("transcripts.*.jsonl")})
    runs = [run for run in map(Run, folders) if run.outcomes]
    if not runs:
        raise InputError(f"{folder}: no run folder with finished questions in it: evaluate something first")
    alike, largest = collections.defaultdict(list), collections.Counter()
    for run in runs:
        alike[json.dumps([run.who, run.settings], sort_keys=True)].append(run)
        largest |= collections.Counter(o["task"] for o in run.outcomes) | collections.Counter(run.questions)
    systems = [System(group) for group in alike.values()]
    for s in systems:
        s.total = {task: s.seeds * largest[task] for task in sorted(largest, key=place)}
        rivals = [other.settings for other in systems if other.who == s.who]
        different = [name for name in s.settings if any(other.get(name) != s.settings[name] for other in rivals)]
        s.setting = ", ".join(f"{name} {s.settings[name]}" for name in different)
        model = s.model if len({other.model for other in systems}) > 1 else ""
        s.name = ", ".join(filter(None, [s.method, s.decoding, model, s.setting]))
    return sorted(systems, key=lambda s: (s.parameters or 0, s.model, s.averages["all"], s.name))


def label(task):
    """The name of a task as the paper writes it."""
    return TASKS[task].label if task in TASKS else task


def cells(system):
    """What the tables show of a system, as three dicts {head: cell}: who it is, its accuracy, its use of tools."""
    size = f"{system.parameters / 1e6:,.0f}M" if system.parameters else ""
    who = {"student": system.model, "size": size, "method": system.method, "decoding": system.decoding}
    who |= {"setting": system.setting, "seeds": system.seeds}
    right, tasks = {}, by_task(system.outcomes)
    for head, domain in (("average [95 %]", "all"), ("in-domain [95 %]", "in"), ("out-of-domain [95 %]", "out")):
        ends = [100 * end for end in system.averages.get(domain, ())]
        right[head] = "{:.1f} [{:.1f}, {:.1f}]".format(*ends) if ends else ""
    for task, total in system.total.items():
        answered = tasks.get(task, [])
        part = f"({len(answered)} of {total})" if len(answered) < total else ""
        right[label(task)] = f"{100 * accuracy(answered):.1f} {part}".strip() if answered else part
    # The paper's figures stand only beside its students, and only where all its test questions are answered.
    asked = {task: len({o["question"] for o in outcomes}) for task, outcomes in tasks.items()}
    figures = PAPER.get((system.method, system.decoding))
    if figures and system.parameters in PAPER_SIZES and asked == {name: task.questions for name, task in TASKS.items()}:
        right["paper's average"] = figures[PAPER_SIZES.index(system.parameters)]
    return who, right, {name: f"{mean:.2f}" for name, mean in means(system.outcomes).items()}


def columns(rows):
    """(heads, rows of cells) of a table given as dicts {head: cell}, without the columns that are empty."""
    heads = [head for head in dict.fromkeys(h for row in rows for h in row) if any(row.get(head) for row in rows)]
    return heads, [[row.get(head, "") for head in heads] for row in rows]


def markdown(folder):
    """The report as Markdown: accuracies, then the figures of tool use. Unfinished results are marked with n of N."""
    parts = [cells(system) for system in load_systems(folder)]
    accuracies = table(*columns([who | right for who, right, _ in parts]))
    use = table(*columns([who | use for who, _, use in parts]))
    return f"Accuracy in %:\n\n{accuracies}\n\n{NOTES}\n\nMeans per question:\n\n{use}\n"


def html(folder, per_task=10):
    """The page: report.html filled with tables and, for each task of a run, per_task episodes, the first ones by id."""
    tables, episodes = {"Accuracy in %": [], "Tool use, means per question": [], "Settings": []}, []
    for system in load_systems(folder):
        who, right, use = cells(system)
        for rows, part in zip(tables.values(), (right, use, who | system.settings), strict=True):
            rows.append({"system": system.name} | part)
        for run in system.runs:
            for task, rows in by_task(transcripts(run.folder)).items():
                about = {"system": system.name, "task": label(task), "seed": run.seed, "messages": None}
                episodes += [row | about for row in sorted(rows, key=lambda row: row["id"])[:per_task]]
    notes = f"{NOTES} The browser shows up to {per_task} episodes per task and run."
    data = {"tables": [[title, *columns(rows)] for title, rows in tables.items()], "notes": notes, "episodes": episodes}
    template = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    # A transcript may hold "</script>": escaped, it cannot end the element that carries the data.
    return template.replace("/*DATA*/", json.dumps(data, ensure_ascii=False).replace("<", "\\u003c"))
