"""The README's pictures, which `evaluate.py report` writes: bars.svg (accuracies) and episode.svg (one question)."""

import json
import re
import string
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

from common.report import LABELS, averages, load_systems, outcome, transcripts

COLUMN = 420  # width of one of the two transcripts


def _svg(title, height, body):
    """Returns picture.svg, which has the colours and fonts, with this content."""
    template = string.Template((Path(__file__).parent / "picture.svg").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), height=height, inside=height - 1, body="\n".join(body))


def _text(x, y, text, kind="", anchor="start"):
    text = escape(re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))  # not legal in XML
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}" xml:space="preserve">{text}</text>'


def _box(x, y, width, height, kind):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{kind}"/>'


def _wrap(text, columns, most):
    """At most `most` lines of at most `columns` characters. The last line says how many were left out."""
    lines = []
    for line in text.expandtabs(4).strip().splitlines():
        lines += textwrap.wrap(line, columns, replace_whitespace=False, break_on_hyphens=False) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], f"[{len(lines) - most + 1} more lines]"]


def bars_svg(systems):
    """Accuracy bars: for each system its in-domain and its out-of-domain average with 95 % intervals."""
    left, scale, y = 310, 520, 66
    title = "Accuracy, mean over tasks, with 95 % intervals"
    body = [_text(20, 30, title, "bold")]
    for domain, words, x in (("in", "in-domain tasks", left), ("out", "out-of-domain tasks", left + 150)):
        body += [_box(x, 42, 12, 12, domain), _text(x + 18, 53, words)]
    for (student, name), runs in systems.items():
        name, _, note = name.partition(" (")
        for line, kind, offset in ((name, "bold", 19), (f"{student} ({note}" if note else student, "soft", 34)):
            body.append(_text(left - 12, y + offset, textwrap.shorten(line, 45, placeholder=" ..."), kind, "end"))
        for domain, middle in (("in", y + 14), ("out", y + 31)):
            if domain in (found := averages(runs)):
                mean, low, high = (left + scale * end for end in found[domain])
                body += [_box(left, middle - 7, mean - left, 14, domain), _box(low, middle, high - low, 1.5, "whisker")]
                body.append(_text(high + 7, middle + 5, f"{100 * found[domain][0]:.0f} %", "soft"))
        y += 44
    return _svg(title, y + 16, body)


def episode_svg(model, base, student):
    """Returns two transcript rows of one question side by side: the base model's and the distilled student's."""
    question = _wrap(base["question"], 112, 4)
    body = [_text(20, 30, f"{model}: a test question of {LABELS.get(base['task'], base['task'])}", "soft")]
    body += [_text(20, 52 + 18 * i, line, "bold") for i, line in enumerate(question)]
    y = 52 + 18 * len(question)
    body.append(_text(20, y, textwrap.shorten(f"Right answer: {base.get('answer')}", 110, placeholder=" ..."), "soft"))
    columns = [_column(base, "Base model, prompted"), _column(student, "The same model, distilled")]
    for x, (drawn, height) in zip((20, 460), columns, strict=True):
        # An inner svg element cuts off what is wider than it, such as a line of Chinese.
        body += [f'<svg x="{x}" y="{y + 18}" width="{COLUMN}" height="{height}">', *drawn, "</svg>"]
    return _svg("One question, two students", y + 34 + max(height for _, height in columns), body)


def _column(row, name):
    """Returns the elements of one transcript, and their height."""
    drawn, y = [_text(0, 16, name, "bold"), _box(0, 24, COLUMN, 1, "rule")], 30
    for number, step in enumerate(row["steps"], 1):
        observation = (step.get("observation") or "").removeprefix("Observation:")
        parts = {"Thought": step.get("thought"), "Code": step.get("code"), "Observation": observation}
        for head, text in parts.items():
            lines = _wrap(text or "", 60 if head == "Thought" else 55, 8)
            kind = "failed" if head == "Observation" and step.get("error_kind") else head.lower()
            if lines:
                drawn.append(_text(0, y + 14, f"Step {number}: {head}", "soft"))
                drawn.append(_box(0.5, y + 20, COLUMN - 1, 16 * len(lines) + 8, kind))
                drawn += [_text(8, y + 36 + 16 * i, line, kind) for i, line in enumerate(lines)]
                y += 16 * len(lines) + 32
    answer = json.dumps(row.get("prediction"), ensure_ascii=False)
    words = f"answer {answer}" if row["stop"] == "final_answer" else "no answer"
    mark, kind = ("✓ Right", "good") if row["correct"] else ("✗ Wrong", "bad")
    return [*drawn, _text(0, y + 18, f"{mark}: {words}", f"bold {kind}")], y + 24


def pictures(folder):
    """Returns {file name: SVG text}: bars.svg and, if one model is an agent with and without training, episode.svg."""
    systems = load_systems(folder)
    drawn, pairs = {"bars.svg": bars_svg(systems)}, []
    runs = {(student, group[0].label): group[0] for (student, _), group in systems.items()}
    for (student, label), run in runs.items():
        base = runs.get((student, "agent prompting"))
        if base and label == "agent distilled":
            answers = {(row["task"], row["question"]): row for row in transcripts(base.folder)}
            for row in transcripts(run.folder):
                if other := answers.get((row["task"], row["question"])):
                    searches = outcome(row)["figures"]["searches"]
                    flaws = other["correct"], not row["correct"], searches < 2, len(str((other, row)))
                    pairs.append((flaws, student, other, row))
    if pairs:  # a short pair is shown in which only the student is right, and searched twice
        drawn["episode.svg"] = episode_svg(*min(pairs, key=lambda pair: pair[0])[1:])
    return drawn
