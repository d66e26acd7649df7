"""The README's pictures as SVG, without scripts, in light and dark colours: accuracy bars, and one question in full.

python evaluate.py report runs/miniature        # writes bars.svg and episode.svg there
"""

import itertools
import json
import re
import textwrap
from xml.sax.saxutils import escape

from common.report import label, load_systems, outcome, transcripts

WIDTH, COLUMN = 900, 420
STYLE = """<style>
  svg { --ink: #1f2328; --soft: #59636e; --ground: #ffffff; --card: #f3f5f8; --line: #d1d9e0;
        --in: #0b62d6; --out: #c76a00; --good: #1a7f37; --bad: #cf222e; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6edf3; --soft: #9aa5b1; --ground: #0d1117; --card: #1a212b; --line: #3d444d;
          --in: #58a6ff; --out: #e3a04f; --good: #3fb950; --bad: #f85149; } }
  text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--ink); white-space: pre; }
  text.code, text.observation, text.failed { font: 12px ui-monospace, Menlo, Consolas, monospace; }
  .bold { font-weight: 600; } .soft { fill: var(--soft); } .good { fill: var(--good); } .bad { fill: var(--bad); }
  .in { fill: var(--in); } .out { fill: var(--out); } .rule { fill: var(--line); } .whisker { fill: var(--ink); }
  rect.ground { fill: var(--ground); stroke: var(--line); } rect.code { fill: var(--card); stroke: var(--line); }
  rect.thought, rect.observation, rect.failed { fill: none; } rect.observation { stroke: var(--line); }
  rect.failed { stroke: var(--bad); }
</style>"""


def _svg(title, height, body):
    size = f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>{escape(title)}</title>'
    return "\n".join([head, STYLE, _box(0.5, 0.5, WIDTH - 1, height - 1, "ground"), *body, "</svg>\n"])


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
    left, scale, group, top = 310, 520, 44, 66
    title = "Accuracy, mean over tasks, with 95 % intervals"
    body = [_text(20, 30, title, "bold")]
    for domain, words, x in (("in", "in-domain tasks", left), ("out", "out-of-domain tasks", left + 150)):
        body += [_box(x, 42, 12, 12, domain), _text(x + 18, 53, words)]
    for i, system in enumerate(systems):
        y = top + group * i + 14
        for j, words in enumerate((f"{system.method}, {system.decoding}", f"{system.model} {system.setting}")):
            words = textwrap.shorten(words, 42, placeholder=" ...")
            body.append(_text(left - 12, y + 5 + 15 * j, words, "soft" if j else "bold", "end"))
        for j, domain in enumerate(d for d in ("in", "out") if d in system.averages):
            middle, (mean, low, high) = y + 17 * j, (left + scale * end for end in system.averages[domain])
            body += [_box(left, middle - 7, mean - left, 14, domain), _box(low, middle, high - low, 1.5, "whisker")]
            body.append(_text(high + 7, middle + 5, f"{100 * system.averages[domain][0]:.0f} %", "soft"))
    return _svg(title, top + group * len(systems) + 16, body)


def episode_svg(model, base, student):
    """One question as the base model and the distilled student answered it (two transcript rows), side by side."""
    question = _wrap(base["question"], 112, 4)
    body = [_text(20, 30, f"{model}: a test question of {label(base['task'])}", "soft")]
    body += [_text(20, 52 + 18 * i, line, "bold") for i, line in enumerate(question)]
    y = 52 + 18 * len(question)
    body.append(_text(20, y, textwrap.shorten(f"Right answer: {base['answer']}", 110, placeholder=" ..."), "soft"))
    columns = [_column(base, "Base model, prompted"), _column(student, "The same model, distilled")]
    for x, (drawn, height) in zip((20, 460), columns, strict=True):
        # An inner svg element cuts off what is wider than it, such as a line of Chinese.
        body += [f'<svg x="{x}" y="{y + 18}" width="{COLUMN}" height="{height}">', *drawn, "</svg>"]
    return _svg("One question, two students", y + 34 + max(height for _, height in columns), body)


def _column(row, name):
    """The elements of one transcript, and their height."""
    drawn, y = [_text(0, 16, name, "bold"), _box(0, 24, COLUMN, 1, "rule")], 30
    for number, step in enumerate(row["steps"], 1):
        observation = (step.get("observation") or "").removeprefix("Observation:")
        parts = [("Thought", step.get("thought"), "thought", 60), ("Code", step.get("code"), "code", 55),
                 ("Observation", observation, "failed" if step.get("error_kind") else "observation", 55)]  # fmt: skip
        for head, text, kind, columns in parts:
            lines = _wrap(text or "", columns, 8)
            if lines:
                drawn.append(_text(0, y + 14, f"Step {number}: {head}", "soft"))
                drawn.append(_box(0.5, y + 20, COLUMN - 1, 16 * len(lines) + 8, kind))
                drawn += [_text(8, y + 36 + 16 * i, line, kind) for i, line in enumerate(lines)]
                y += 16 * len(lines) + 32
    answered = row["stop"] == "final_answer"
    words = f"answer {json.dumps(row['prediction'], ensure_ascii=False)}" if answered else f"no answer ({row['stop']})"
    mark, kind = ("✓ Right", "good") if row["correct"] else ("✗ Wrong", "bad")
    return [*drawn, _text(0, y + 18, f"{mark}: {words}", f"bold {kind}")], y + 24


def flaws(pair):
    """The smallest (base row, student row) is shown: only the student is right, it searched, and both are short."""
    base, student = pair
    return base["correct"], not student["correct"], outcome(student)["figures"]["searches"] < 2, len(str(pair))


def pictures(folder):
    """{file name: SVG text}: bars.svg and, if one model was run as an agent with and without training, episode.svg."""
    systems = load_systems(folder)
    drawn = {"bars.svg": bars_svg(systems)}
    agents = [s for s in systems if s.method.startswith("agent") and s.decoding == "greedy"]
    for base, student in itertools.permutations(agents, 2):
        if base.method == "agent prompting" != student.method and base.model == student.model:
            folders = (base.runs[0].folder, student.runs[0].folder)
            rows = [{(row["task"], row["question"]): row for row in transcripts(folder)} for folder in folders]
            pairs = [(rows[0][key], rows[1][key]) for key in rows[0] if key in rows[1]]
            if pairs:
                drawn["episode.svg"] = episode_svg(student.model, *min(pairs, key=flaws))
    return drawn
