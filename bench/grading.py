"""Math grading: agreement with math-verify, on pairs made from gold answers; speed over whole test sets.

    python bench/grading.py agree --data FOLDER     # needs math-verify[antlr4_13_2]==0.9.0 too
    python bench/grading.py speed --data FOLDER

FOLDER has test sets as JSON files ({"examples": [{"question", "answer"}, ...]}), such as the eight of the paper;
--math names those with mathematical answers. A pair is equal by rewriting (other LaTeX, plain text, what sympy prints,
decimals) or unequal by mutation (digits, signs, brackets, order, terms). sympy makes the pairs from math-verify's
reading of the gold answer, so that they do not depend on our own parser.
"""

import dataclasses
import json
import logging
import random
import re
import sys
import time
from collections import Counter
from pathlib import Path

import sympy

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import REQUIRED, InputError, option, progress, run_command_line
from common.grading import compare, grade

# Gold answers that math-verify 0.9.0 misreads, so that no pair is made from its reading: it drops the base of 52_8 and
# the degrees of \\tan 15^\\circ, reads the e of 2e-05 as 2.718, the time 8:34 as a quotient, capital variables as small
# ones, 2007 + \\frac\\pi 2 as 2, words as products, and a triple root as a set.
MISREAD = re.compile(r"\d\}?_|\d[eE]-|\\tan 15|:|(?<![a-zA-Z\\{])[A-Z]|\\frac\\pi|\\text\{[a-z]+ [a-z]+\}|,3,3|\\in\b")
MATH = ["math", "gsm_hard", "aime", "olymath"]


def load(folder, names):
    """(kind, question, answer, aliases) of every example with an answer, file by file."""
    files = sorted(Path(folder).rglob("*.json"))
    if not files:
        raise InputError(f"{folder}: no .json files; name the folder with the test sets")
    rows = []
    for file in files:
        kind = "math" if any(file.name.startswith(name) for name in names) else "fact"
        for example in json.loads(file.read_text(encoding="utf-8"))["examples"]:
            if example["answer"] not in (None, ""):
                rows.append((kind, example["question"], example["answer"], example.get("aliases") or []))
    return rows


# Pairs


def rewritings(gold, expression):
    """Yield (name, text) of answers equal to the LaTeX text `gold`; expression: its sympy object, or None."""
    yield "same", gold
    yield "dollars", f"${gold}$"
    yield "wide", re.sub(r"\s*([-+=]|(?<!\\),(?!\d{3}|\\))\s*", r" \1 ", gold)
    yield "left right", re.sub(r"(?<!left)\((.*)(?<!right)\)$", r"\\left(\1\\right)", gold.replace(r"\frac", r"\dfrac"))
    if not re.search(r"=|\\in|\\text|\\mbox|,", gold):
        yield "named", f"x = {gold}"
    if re.fullmatch(r"-?\d{4,}", gold):
        yield "thousands", f"{int(gold):,}"
    if "," in gold and not re.search(r"[\[({]|\d,\d{3}|\\!|text", gold):
        yield "reversed", ", ".join(reversed(gold.split(",")))
    if expression is None:
        return
    yield "sympy", str(expression)
    yield "sympy latex", sympy.latex(expression)
    if isinstance(expression, sympy.Expr) and not expression.has(sympy.oo):
        for function in (sympy.expand, sympy.factor, sympy.together):
            yield function.__name__, str(function(expression))
        if not expression.free_symbols:
            yield "radsimp", sympy.latex(sympy.radsimp(expression))
            if expression.is_real and abs(expression) < 10**15:
                yield "float", repr(float(expression))
            if expression.is_Rational:
                yield "unreduced", rf"\frac{{{3 * expression.p}}}{{{3 * expression.q}}}"


def mutations(gold, expression, generator):
    """Yield (name, text) of answers that differ from gold in value."""
    digits = [match.start() for match in re.finditer(r"\d", gold)][:11]  # a double may be wrong after the 12th or so
    for at in generator.sample(digits, min(3, len(digits))):
        yield "digit", gold[:at] + str((int(gold[at]) + 1) % 10) + gold[at + 1 :]
    signs = [match.start() for match in re.finditer(r"(?<=[\w})\s])[-+](?=[\s\w\\])", gold)]
    for at in generator.sample(signs, min(2, len(signs))):
        yield "sign", gold[:at] + ("-" if gold[at] == "+" else "+") + gold[at + 1 :]
    if re.match(r"[1-9\\]", gold) and not re.search(r"text|mbox|begin|left|[,_:=\[\\]in|\{[A-Z]|\$|pm", gold):
        yield "negated", f"-{gold}"
    if "infty" in gold or "cup" in gold or "[" in gold:
        for bracket, other in [("(", "["), ("[", "("), (")", "]"), ("]", ")")]:
            at = gold.find(bracket)
            if at >= 0 and "infty" not in gold[max(at - 8, 0) : at + 8]:
                yield "bracket", gold[:at] + other + gold[at + 1 :]
    flat = re.fullmatch(r"\(([^()]*)\)", gold)
    if flat and len(parts := [part.strip() for part in flat[1].split(",")]) > 1:
        yield "dropped", f"({', '.join(parts[:-1])})"
        if parts[0] != parts[-1]:
            yield "order", f"({', '.join(parts[::-1])})"
    if re.search(r"(?<![a-zA-Z\\])x(?![a-zA-Z])", gold) and "=" not in gold and r"\in" not in gold:
        yield "variable", re.sub(r"(?<![a-zA-Z\\])x(?![a-zA-Z])", "q", gold)
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.oo, sympy.nan) or "%" in gold:
        return
    changed = [("plus one", expression + 1), ("doubled", 2 * expression), ("squared", expression**2)]
    for name, other in [*changed, ("inverse", 1 / (expression or 1))]:
        if sympy.N(other - expression, 30) != 0:
            yield name, str(other)
    if expression.is_real and not expression.free_symbols and 1e-9 < abs(expression) < 1e15:
        value = float(expression)
        yield "off by 1e-5", repr(value * (1 + 1e-5))
        if not expression.is_integer and abs(float(f"{value:.5g}") - value) > 2e-6 * abs(value):
            yield "rounded", f"{value:.5g}"


class MathVerify:
    """math-verify with its default settings; a text is read with and without $ around it."""

    def __init__(self):
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        self.parse = math_verify.parse
        self.verify = math_verify.verify

    def expression(self, gold):
        """The sympy object that math-verify reads in a gold answer; None if there is none, or if it misreads it."""
        if MISREAD.search(gold):
            return None
        found = [item for item in self.parse(f"${gold}$", raise_on_error=False) if not isinstance(item, str)]
        return found[0] if found else None

    def equal(self, prediction, gold):
        gold = self.parse(f"${gold}$", raise_on_error=False)
        return any(
            self.verify(gold, self.parse(text, raise_on_error=False), raise_on_error=False)
            for text in (f"${prediction}$", prediction)
        )


def make_pairs(answers, peer, seed=0):
    """Yield (truth, how, prediction, gold) for each gold answer."""
    generator = random.Random(seed)
    for i, gold in enumerate(answers):
        expression = peer.expression(gold)
        pairs = [(True, *pair) for pair in rewritings(gold, expression)]
        pairs += [(False, *pair) for pair in mutations(gold, expression, generator)]
        pairs.append((False, "next answer", answers[(i + 1) % len(answers)]))
        for truth, how, prediction in dict.fromkeys(pairs):
            if truth or prediction != gold:
                yield truth, how, prediction, gold


@dataclasses.dataclass(kw_only=True)
class Speed:
    data: str = option(REQUIRED, "folder with the test sets")
    math: list[str] = option(MATH, "first letters of the names of the math files")


@dataclasses.dataclass(kw_only=True)
class Agree(Speed):
    limit: int = option(0, "use this many distinct gold answers, chosen at random; 0: all")
    seed: int = option(0, "for that choice and for the mutations")


def agree(config):
    """Compare our verdicts with math-verify's and with the truth by construction; list every pair that we got wrong."""
    peer = MathVerify()
    answers = sorted({str(answer) for kind, _, answer, _ in load(config.data, config.math) if kind == "math"})
    answers = random.Random(config.seed).sample(answers, config.limit or len(answers))
    counts, seconds = Counter(), Counter()
    for truth, how, prediction, gold in progress(list(make_pairs(answers, peer, config.seed)), desc="pairs"):
        for name, equal in (("ours", lambda p, g: compare(p, g).correct), ("math-verify", peer.equal)):
            start = time.perf_counter()
            verdict = equal(prediction, gold)
            seconds[name] += time.perf_counter() - start
            counts[name, truth, verdict] += 1
            if name == "ours" and verdict != truth:
                print(f"{'missed' if truth else 'WRONG'} ({how}): {prediction!r} for {gold!r}")
    print("| grader | equal by construction: called equal | unequal: called equal | seconds |\n|---|---|---|---|")
    for name in seconds:
        shares = [
            f"{counts[name, truth, True]} of {counts[name, truth, True] + counts[name, truth, False]}"
            for truth in (True, False)
        ]
        print(f"| {name} | {' | '.join(shares)} | {seconds[name]:.1f} |")


def speed(config):
    """Grade every gold answer against itself and against the next question's answer."""
    rows = load(config.data, config.math)
    own = [answer for _, _, answer, _ in rows]
    for name, predictions in (("own answer", own), ("next answer", own[1:] + own[:1])):
        start = time.perf_counter()
        pairs = zip(predictions, rows, strict=True)
        verdicts = [grade(kind, text, answer, aliases, question) for text, (kind, question, answer, aliases) in pairs]
        right = sum(verdict.correct for verdict in verdicts)
        print(f"{name}: {len(rows)} answers, {right} right, {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    run_command_line(__doc__, {"agree": (Agree, agree), "speed": (Speed, speed)})
