"""Math grading beside math-verify: agreement with the truth on pairs made from gold answers.

    python bench/grading.py agree --data FOLDER     # needs math-verify[antlr4_13_2]==0.9.0 too

FOLDER has test sets as JSON files ({"examples": [{"question", "answer"}, ...]}), such as those of the paper. A pair is
equal by rewriting (other LaTeX, plain text, what sympy prints, decimals) or unequal by mutation (digits, signs,
brackets, order, terms). sympy makes the pairs from math-verify's reading, so they do not depend on our own parser.
"""

import dataclasses
import json
import logging
import random
import re
import sys
from collections import Counter
from pathlib import Path

import math_verify
import sympy

sys.path.insert(0, str(Path(__file__).parent.parent))

from common import REQUIRED, InputError, option, progress, run_command_line
from common.grading import compare

# Gold answers that math-verify 0.9.0 misreads, so that no pair is made from its reading: it drops the base of 52_8 and
# the degrees of \\tan 15^\\circ, reads the e of 2e-05 as 2.718, the time 8:34 as a quotient, capital variables as small
# ones, 2007 + \\frac\\pi 2 as 2, words as products, and a triple root as a set.
MISREAD = re.compile(r"\d\}?_|\d[eE]-|\\tan 15|:|(?<![a-zA-Z\\{])[A-Z]|\\frac\\pi|\\text\{[a-z]+ [a-z]+\}|,3,3|\\in\b")
logging.getLogger("math_verify").setLevel(logging.CRITICAL)
MATH = ("math", "gsm_hard", "aime", "olymath")


def rewritings(gold, expression):
    """Answers equal to the LaTeX text `gold`; expression: its sympy object, or None."""
    texts = [gold, f"${gold}$", re.sub(r"\s*([-+=]|(?<!\\),(?!\d{3}|\\))\s*", r" \1 ", gold)]
    texts.append(re.sub(r"(?<!left)\((.*)(?<!right)\)$", r"\\left(\1\\right)", gold.replace(r"\frac", r"\dfrac")))
    if not re.search(r"=|\\in|\\text|\\mbox|,", gold):
        texts.append(f"x = {gold}")
    if re.fullmatch(r"-?\d{4,}", gold):
        texts.append(f"{int(gold):,}")
    if "," in gold and not re.search(r"[\[({]|\d,\d{3}|\\!|text", gold):
        texts.append(", ".join(gold.split(",")[::-1]))
    if expression is not None:
        texts += [str(expression), sympy.latex(expression)]
    if isinstance(expression, sympy.Expr) and not expression.has(sympy.oo):
        texts += [str(function(expression)) for function in (sympy.expand, sympy.factor, sympy.together)]
        if not expression.free_symbols:
            texts.append(sympy.latex(sympy.radsimp(expression)))
            if expression.is_real and abs(expression) < 10**15:
                texts.append(repr(float(expression)))
            if expression.is_Rational:
                texts.append(rf"\frac{{{3 * expression.p}}}{{{3 * expression.q}}}")
    return texts


def mutations(gold, expression, generator):
    """Answers that differ from gold in value."""
    texts = []
    exact = gold.partition(r"\approx")[0]
    # Digits and signs; a double may be wrong after the 12th digit or so.
    places = [match.start() for match in re.finditer(r"\d|(?<=[\w})\s])[-+](?=[\s\w\\])", exact)][:11]
    for at in generator.sample(places, min(4, len(places))):
        other = {"+": "-", "-": "+"}.get(gold[at]) or str((int(gold[at]) + 1) % 10)
        texts.append(gold[:at] + other + gold[at + 1 :])
    if re.match(r"[1-9\\]", gold) and not re.search(r"text|mbox|begin|left|[,_:=\[\\]in|\{[A-Z]|\$|pm", gold):
        texts.append(f"-{gold}")
    for bracket, other in ["([", "[(", ")]", "])"] if re.search(r"infty|cup|\[", gold) else []:
        at = gold.find(bracket)
        if at >= 0 and "infty" not in gold[max(at - 12, 0) : at + 12]:
            texts.append(gold[:at] + other + gold[at + 1 :])
    if flat := re.fullmatch(r"\(([^()]*), *([^(),]*)\)", gold):
        texts += [f"({flat[1]})", f"({flat[2]} + 1, {flat[1]})"]
    if not isinstance(expression, sympy.Expr) or expression.has(sympy.oo, sympy.nan) or "%" in gold:
        return texts
    for other in (expression + 1, 2 * expression, expression**2, 1 / (expression or 1)):
        if sympy.N(other - expression, 30) != 0:
            texts.append(str(other))
    if expression.is_real and not expression.free_symbols and 1e-9 < abs(expression) < 1e15:
        value = float(expression)
        texts.append(repr(value * (1 + 1e-5)))
        if not expression.is_integer and abs(float(f"{value:.5g}") - value) > 2e-6 * abs(value):
            texts.append(f"{value:.5g}")
    return texts


def math_verify_equal(prediction, gold):
    """math-verify with its default settings; the prediction is read with and without $ around it."""
    texts = (f"${gold}$", f"${prediction}$", prediction)
    gold, *readings = (math_verify.parse(text, raise_on_error=False) for text in texts)
    return any(math_verify.verify(gold, reading, raise_on_error=False) for reading in readings)


def make_pairs(answers):
    """Yield (truth, prediction, gold) for each gold answer."""
    generator = random.Random(0)
    for i, gold in enumerate(answers):
        read = [item for item in math_verify.parse(f"${gold}$", raise_on_error=False) if not isinstance(item, str)]
        expression = read[0] if read and not MISREAD.search(gold) else None
        pairs = [(True, text) for text in rewritings(gold, expression)]
        different = [*mutations(gold, expression, generator), answers[(i + 1) % len(answers)]]
        pairs += [(False, text) for text in different if text != gold]
        for truth, prediction in dict.fromkeys(pairs):
            yield truth, prediction, gold


@dataclasses.dataclass(kw_only=True)
class Config:
    data: str = option(REQUIRED, "folder with the test sets")
    limit: int = option(0, "use this many distinct gold answers, chosen at random; 0: all")


def agree(config):
    """Compare our verdicts and math-verify's with the truth by construction; print every pair that we got wrong."""
    files = [file for file in sorted(Path(config.data).rglob("*.json")) if file.name.startswith(MATH)]
    if not files:
        raise InputError(f"{config.data}: no .json files of {', '.join(MATH)}; name the folder with the test sets")
    examples = [example for file in files for example in json.loads(file.read_text(encoding="utf-8"))["examples"]]
    answers = sorted({str(example["answer"]) for example in examples} - {"None", ""})
    answers = random.Random(0).sample(answers, config.limit or len(answers))
    counts = Counter()
    for truth, prediction, gold in progress(list(make_pairs(answers)), desc="pairs", unit="pair"):
        equal = compare(prediction, gold).correct
        counts["pairs", truth] += 1
        counts["ours", truth] += equal
        counts["math-verify", truth] += math_verify_equal(prediction, gold)
        if equal != truth:
            print(f"{'missed' if truth else 'WRONG'}: {prediction!r} for {gold!r}")
    print("| grader | equal pairs called equal | unequal pairs called equal |\n|---|---|---|")
    for name in ("ours", "math-verify"):
        equal, unequal = (f"{counts[name, truth]} of {counts['pairs', truth]}" for truth in (True, False))
        print(f"| {name} | {equal} | {unequal} |")


if __name__ == "__main__":
    run_command_line(__doc__, {"agree": (Config, agree)})
