"""Sample two actions; if they observe the same, take it; otherwise sample two more, up to N.

Source: TrACE (arXiv 2604.08369): in most steps two samples agree. Only the other steps need the budget of N.

    make experiment NAME=agree_early

Replaced: the episode (`--episode MODULE.FUNCTION` of evaluate.py). Nothing is trained. Baselines on the same questions:
SC-action with N samples in every step, and the majority answer of N whole episodes, sampled at the same temperature.
Result (three seeds): 84.2 % with 234 tokens per question; the baselines 81.9 % with 888, and 83.9 % with 876.
"""

import collections
import contextlib
import dataclasses
import json
import shutil
from pathlib import Path

import evaluate
from agent_distill import Running, TurnFailed, agent_episode, parse_action, votes_of
from common import load_tasks, option, report, run_command_line, write_json, write_jsonl
from experiments import Setting, compare, evaluate_student

MOST = 8  # N


@dataclasses.dataclass(kw_only=True)
class Config(Setting):
    """`model` is a distilled student here."""

    data: list[str] = option([], "not used: nothing is trained", positional=True)


def agreed(sandbox, texts, opening):
    """Returns whether two of these candidates observe the same, from the sandbox's state, and without an error."""
    codes = [action.code for action in (parse_action(text, opening) for text in texts) if action.code is not None]
    votes = collections.Counter(votes_of(sandbox.run_candidates(codes) if codes else []))
    del votes[None]
    return max(votes.values(), default=0) >= 2


def episode(question, prompts, open_sandbox, **options):
    """agent_distill.agent_episode, with its arguments, for a driver that answers each turn with two candidates."""
    with open_sandbox() as sandbox:
        inner = Running(agent_episode(question, prompts, lambda: contextlib.nullcontext(sandbox), **options))
        while inner.turn:
            texts = []
            try:
                while len(texts) < MOST and not agreed(sandbox, texts, inner.turn.opening):
                    texts += yield inner.turn
            except TurnFailed as failure:
                texts = failure
            inner.advance(texts)
        return inner.result


def repeat_questions(tests, limit, folder):
    """Write the test files with every question MOST times. Returns the paths of the files."""
    paths = []
    for path in tests:
        rows = [row | {"id": f"{row['id']}#{i}"} for row in load_tasks([path], limit=limit) for i in range(MOST)]
        paths.append(str(Path(folder, Path(path).stem + ".jsonl")))
        write_jsonl(paths[-1], rows)
    return paths


def vote_over_episodes(run, out):
    """Write a run folder with one row per question of a run on repeated questions: one with the majority answer.

    Episodes without an answer do not vote; a tie goes to the answer that came first. The usage is that of all episodes.
    """
    groups = collections.defaultdict(list)
    for row in report.transcripts(run):
        question, _, number = row["id"].rpartition("#")
        groups[row["task"], question].append((int(number), row))
    chosen = []
    for (_, question), rows in groups.items():
        rows = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
        answers = [None if row["stop"] == "error" else json.dumps(row["prediction"]) for row in rows]
        votes = collections.Counter(answer for answer in answers if answer not in (None, "null"))
        best = answers.index(max(votes, key=votes.get)) if votes else 0
        usage = sum((collections.Counter(row["usage"]) for row in rows), collections.Counter())
        chosen.append(rows[best] | {"id": question, "usage": dict(usage)})
    write_jsonl(Path(out, "transcripts.0.jsonl"), chosen)
    config = json.loads(Path(run, "run.json").read_text())
    config["questions"] = collections.Counter(row["task"] for row in chosen)  # each was asked several times
    write_json(Path(out, "run.json"), config)
    if Path(run, "model.json").exists():
        shutil.copy(Path(run, "model.json"), out)


def run(config):
    """Evaluate the student in the three ways, and compare."""
    eval_folder, repeated = Path(config.out, "eval"), Path(config.out, "repeated")
    early = evaluate_student(config, config.model, "early", sc=2, episode="experiments.agree_early.episode")
    every_step = evaluate_student(config, config.model, "sc8", sc=MOST)
    tests = repeat_questions(config.tests, config.limit, repeated)
    options = {"tasks": tests, "limit": None, "temperature": evaluate.SC_TEMPERATURE}
    episodes = evaluate_student(config, config.model, "episodes", **options)
    vote_over_episodes(episodes, eval_folder / "majority of episodes")
    compare(every_step, early)
    compare(every_step, eval_folder / "majority of episodes")


if __name__ == "__main__":
    run_command_line(__doc__, {"run": (Config, run)}, default="run")
