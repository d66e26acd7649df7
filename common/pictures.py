"""The README's pictures as SVG, without scripts, in light and dark colours: accuracy bars, and one question in full.

python evaluate.py report runs/miniature        # writes bars.svg and episode.svg there
"""

import contextlib
import json
import re
import textwrap
from xml.sax.saxutils import escape

from common import InputError
from common.report import Run, label, load_systems, outcome, transcripts

WIDTH = 900
SVG = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}"
  viewBox="0 0 {width} {height}" role="img">
<title>{title}</title>
<style>
  svg {{ --ink: #1f2328; --soft: #59636e; --ground: #ffffff; --card: #f3f5f8; --line: #d1d9e0;
        --in: #0b62d6; --out: #c76a00; --good: #1a7f37; --bad: #cf222e; }}
  @media (prefers-color-scheme: dark) {{
    svg {{ --ink: #e6edf3; --soft: #9aa5b1; --ground: #0d1117; --card: #1a212b; --line: #3d444d;
          --in: #58a6ff; --out: #e3a04f; --good: #3fb950; --bad: #f85149; }} }}
  text {{ font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); white-space: pre; }}
  text.code {{ font: 12px ui-monospace, Menlo, Consolas, monospace; }} text.bold {{ font-weight: 600; }}
  text.soft {{ fill: var(--soft); }} text.good {{ fill: var(--good); }} text.bad {{ fill: var(--bad); }}
  .ground {{ fill: var(--ground); stroke: var(--line); }} line {{ stroke: var(--line); }}
  .in {{ fill: var(--in); }} .out {{ fill: var(--out); }} line.whisker {{ stroke: var(--ink); stroke-width: 1.5; }}
  rect.code {{ fill: var(--card); stroke: var(--line); }} rect.observation {{ fill: none; stroke: var(--line); }}
  rect.failed {{ fill: none; stroke: var(--bad); }} rect.thought {{ fill: none; }}
</style>
<rect class="ground" x=".5" y=".5" width="{inner}" height="{lower}" rx="8"/>
{body}
</svg>
"""


def _svg(title, height, body):
    sizes = {"width": WIDTH, "height": height, "inner": WIDTH - 1, "lower": height - 1}
    return SVG.format(**sizes, title=escape(title), body="\n".join(body))


def _text(x, y, text, kind="", anchor="start"):
    text = escape(re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text))  # not legal in XML
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}" xml:space="preserve">{text}</text>'


def _line(x1, y1, x2, y2, kind=""):
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _box(x, y, width, height, kind):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" class="{kind}"/>'


def bars_svg(folder):
    """Accuracy bars as SVG: for each system its in-domain and its out-of-domain average with 95 % intervals."""
    systems = load_systems(folder)
    models = sorted({s.model for s in systems})
    left, scale, group, top = 310, 520, 44, 66
    title = f"Accuracy, mean over tasks, with 95 % intervals: {', '.join(models)}"
    body = [_text(20, 30, _cut(title, 110), "bold")]
    for domain, x in (("in", left), ("out", left + 150)):
        body += [_box(x, 42, 12, 12, domain), _text(x + 18, 53, f"{domain}-{'of-' * (domain == 'out')}domain tasks")]
    bottom = top + group * len(systems)
    for tick in (0, 25, 50, 75, 100):
        x = left + scale * tick / 100
        body += [_line(x, top, x, bottom), _text(x, bottom + 18, f"{tick} %", "soft", "middle")]
    for i, system in enumerate(systems):
        y = top + group * i + 14
        lines = [(_words(system), "bold"), (system.model if len(models) > 1 else "", "soft"), (system.setting, "soft")]
        for j, (words, kind) in enumerate(line for line in lines if line[0]):
            body.append(_text(left - 12, y + 5 + 15 * j, _cut(words, 42), kind, "end"))
        for j, domain in enumerate(d for d in ("in", "out") if d in system.averages):
            middle, (mean, low, high) = y + 17 * j, (left + scale * end for end in system.averages[domain])
            body += [_box(left, middle - 7, mean - left, 14, domain), _line(low, middle, high, middle, "whisker")]
            body.append(_text(high + 7, middle + 5, f"{100 * system.averages[domain][0]:.0f} %", "soft"))
    return _svg(title, bottom + 34, body)


def _words(system):
    """The method and the decoding, for readers who do not know the options."""
    method, _, training = system.method.partition(" ")
    words = {"cot": "CoT", "cot-rag": "CoT + RAG"}.get(method, method)
    words += {"prompting": " prompting", "distill": " distilled"}.get(training, " distilled with prefix")
    vote = "SC-action" if method == "agent" else "self-consistency"
    return words if system.decoding == "greedy" else f"{words}, {vote}, N = {system.decoding.removeprefix('sc')}"


def episode_svg(base_run, student_run, question=None):
    """One question as the base model and the distilled student answered it, side by side, as SVG.

    base_run, student_run: run folders. question: (task, id), or None to pick one.
    Raises InputError if the two runs do not both have the question, or have none in common.
    """
    rows = [{(row["task"], row["id"]): row for row in transcripts(run)} for run in (base_run, student_run)]
    pairs = {key: (row, rows[1][key]) for key, row in rows[0].items()
             if key in rows[1] and row["question"] == rows[1][key]["question"]}  # fmt: skip
    if not pairs or question not in (None, *pairs):
        raise InputError(f"{base_run} and {student_run} do not both answer {question or 'any question'}")
    base, student = pair = pairs[question] if question else pick(list(pairs.values()))
    body = [_text(20, 30, f"{Run(student_run).model}: a test question of {label(base['task'])}", "soft")]
    lines = _wrap(base["question"], 112, 4)
    body += [_text(20, 52 + 18 * i, line, "bold") for i, line in enumerate(lines)]
    y = 52 + 18 * len(lines)
    body.append(_text(20, y, _cut(f"Right answer: {base['answer']}", 110), "soft"))
    names = ("Base model, prompted", "The same model, distilled")
    columns = [_column(row, x, y + 34, name) for row, x, name in zip(pair, (20, 460), names, strict=True)]
    height = max(bottom for _, bottom in columns) + 16
    return _svg("One question, two students", height, body + [part for parts, _ in columns for part in parts])


def pick(pairs):
    """The (base row, student row) to show: only the student is right, it searched twice or more, and both are short."""

    def flaws(pair):
        base, student = pair
        return [base["correct"], not student["correct"], outcome(student).figures["searches"] < 2]

    best = min(map(flaws, pairs))
    return min(
        (pair for pair in pairs if flaws(pair) == best),
        key=lambda pair: (max(_column(row, 0, 0, "")[1] for row in pair), pair[0]["id"]),
    )


def _column(row, x, y, name):
    """The elements of one transcript, 420 wide from (x, y) down, and the y of its end."""
    drawn = [_text(x, y, name, "bold"), _line(x, y + 8, x + 420, y + 8)]
    y += 14
    for number, step in enumerate(row["steps"], 1):
        observation = (step.get("observation") or "").removeprefix("Observation:").strip()
        if row["stop"] == "final_answer" and number == len(row["steps"]) and not step.get("error_kind"):
            observation = ""  # the answer itself stands in the last line
        kind = "failed" if step.get("error_kind") else "observation"
        parts = [("Thought", step.get("thought"), "thought", 6), ("Code", step.get("code"), "code", 8),
                 ("Observation", observation, kind, 8)]  # fmt: skip
        for head, text, kind, most in parts:
            if text and text.strip():
                lines = _wrap(text.strip(), 60 if head == "Thought" else 55, most)
                drawn.append(_text(x, y + 14, f"Step {number}: {head}", "soft"))
                drawn.append(_box(x, y + 20, 420, 16 * len(lines) + 8, kind))
                font = "" if head == "Thought" else "code"
                drawn += [_text(x + 8, y + 36 + 16 * i, line, font) for i, line in enumerate(lines)]
                y += 16 * len(lines) + 32
    ends = {"max_steps": f"no answer after {len(row['steps'])} steps", "error": "stopped by an error"}
    answer = f"answer {json.dumps(row['prediction'], ensure_ascii=False)}"
    words = answer if row["stop"] == "final_answer" else ends.get(row["stop"], "no answer")
    mark = "✓ Right: " if row["correct"] else "✗ Wrong: "
    drawn.append(_text(x, y + 18, mark + _cut(words, 50), "bold good" if row["correct"] else "bold bad"))
    return drawn, y + 24


def _wrap(text, columns, most):
    """At most `most` lines of at most `columns` characters. The last line says how many were left out."""
    lines = []
    for line in text.expandtabs(4).splitlines():
        wide = sum(c.isupper() or c > "\u2e80" for c in line) / max(1, len(line))  # capitals; Chinese, Japanese, ...
        width = int(columns / (1 + max(0, wide - 0.1)))  # English prose has fewer than 10 %
        lines += textwrap.wrap(line, width, replace_whitespace=False, break_on_hyphens=False) or [""]
    left_out = len(lines) - most + 1
    return lines if left_out <= 1 else [*lines[: most - 1], f"[{left_out} more lines]"]


def _cut(text, length):
    return text if len(text) <= length else text[: length - 4] + " ..."


def pictures(folder):
    """{file name: SVG text}: bars.svg and, if one model was run as an agent with and without training, episode.svg."""
    drawn = {"bars.svg": bars_svg(folder)}
    agents = [s for s in load_systems(folder) if s.method.startswith("agent") and s.decoding == "greedy"]
    for base in agents:
        for student in agents:
            if base.method == "agent prompting" != student.method and base.model == student.model:
                with contextlib.suppress(InputError):  # their seeds may have no question in common
                    drawn.setdefault("episode.svg", episode_svg(base.runs[0].folder, student.runs[0].folder))
    return drawn
