"""What happens to trajectories once they are collected: which are learned from, and what the prefix gained.

python agent_distill.py filter agent.jsonl --out agent.train.jsonl
python agent_distill.py prefix-gain plain.jsonl agent.jsonl
"""

import collections
import dataclasses
import random
import re

from common import REQUIRED, InputError, option, read_jsonl, write_jsonl
from report import paired_table, table


@dataclasses.dataclass(kw_only=True)
class FilterConfig:
    trajectories: list[str] = option(REQUIRED, "files written by collect", positional=True)
    out: str = option(REQUIRED, "training file to write")
    per_question: int = option(1, "trajectories kept a question (paper: 1)")
    balance: bool = option(False, "as many fact as math trajectories: the larger kind is cut")
    seed: int = option(0, "which ones --balance drops")


def filter_trajectories(config):
    """Keep what is worth learning from: right answers, reached without a parse error or the step limit.

    Run-time errors that the teacher then mended stay: they teach recovery. Prints what was dropped and why.
    """
    rows = [row for path in config.trajectories for row in _read_trajectories(path)]
    # They lie in the order in which they were finished; training must not depend on that.
    rows.sort(key=lambda row: (row["task"], str(row["id"]), row.get("sample", 0)))
    kept, times = [], collections.Counter()
    counts = collections.defaultdict(collections.Counter)
    for row in rows:
        question = " ".join(sorted(re.findall(r"\w+", row["question"].lower())))  # word order, case, punctuation
        reason = drop_reason(row)
        if not reason and times[question] >= config.per_question:
            reason = "duplicate"
        if not reason:
            times[question] += 1
            kept.append(row)
        counts[row["task"]].update(["asked", reason or "kept", *(["right"] if row["correct"] else [])])
    if config.balance:
        kept = _balanced(kept, random.Random(config.seed), counts)
    if not kept:
        raise InputError(f"{', '.join(config.trajectories)}: none of {len(rows)} trajectories can be kept")
    fields = ("id", "task", "kind", "question", "method", "messages")
    write_jsonl(config.out, ({name: row.get(name) for name in fields} for row in kept))
    print(_counts_table(counts))


def _read_trajectories(path):
    for number, row in read_jsonl(path):
        for field in ("id", "task", "kind", "question", "messages", "steps", "correct", "stop"):
            if field not in row:
                raise InputError(f"{path}:{number}: not a trajectory: no {field!r}")
        yield row


def drop_reason(row):
    """Why a trajectory must not be learned from; None if it may be."""
    if row["stop"] == "error":
        return "error"
    if row["stop"] == "max_steps":
        return "no answer"
    if not row["correct"]:
        return "wrong"
    if any(step["error_kind"] in ("no_code", "syntax") for step in row["steps"]):
        return "parse error"
    return None


def _balanced(rows, rng, counts):
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("fact", "math")}
    size = min(map(len, by_kind.values()))
    chosen = {id(row) for kind in by_kind.values() for row in rng.sample(kind, size)}
    for row in rows:
        if id(row) not in chosen:
            counts[row["task"]].update({"kept": -1, "balance": 1})
    return [row for row in rows if id(row) in chosen]


def _counts_table(counts):
    columns = ["asked", "right", "kept", "wrong", "no answer", "parse error", "error", "duplicate", "balance"]
    columns = [c for c in columns if c in ("asked", "right", "kept") or any(row[c] for row in counts.values())]
    total = sum(counts.values(), collections.Counter())
    rows = [[name, *(row[c] for c in columns)] for name, row in [*sorted(counts.items()), ("all", total)]]
    return table(["task", *columns], rows)


@dataclasses.dataclass(kw_only=True)
class GainConfig:
    plain: str = option(REQUIRED, "trajectories without the prefix", positional=True)
    prefixed: str = option(REQUIRED, "trajectories with it, on the same questions", positional=True)


def prefix_gain(config):
    """The teacher's accuracy without and with the first-thought prefix, paired by question."""
    plain, prefixed = (
        {(row["task"], row["id"], row.get("sample", 0)): row["correct"] for _, row in read_jsonl(path)}
        for path in (config.plain, config.prefixed)
    )
    print(paired_table(plain, prefixed, ("without", "with")))
