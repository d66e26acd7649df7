r"""Mathematical expressions in LaTeX or plain text: one spelling, Python syntax, a value. For common/grading.py.

    read_value(clean(r"6\frac{1}{6}\text{ feet}"))     # Value(tree of (6+1/6), unit="feet")

Nothing is passed to eval: ast.parse reads the expression, and evaluate() knows a white list of operations. Rational
values are exact (Fraction), others have 150 digits (mpmath). Expressions with variables are compared at six random
rational points: two different polynomials of degree d agree there with a probability below (d / 10^6)^6 (Schwartz 1980,
Zippel 1979). Lengths and powers are bounded: what exceeds a bound is Unreadable, and never right.
"""

import ast
import dataclasses
import itertools
import operator
import random
import re
import string
from decimal import Decimal
from fractions import Fraction

import mpmath

MAX_NODES = 400  # of one expression: operations, numbers and names
MAX_BITS = 20_000  # of an exact numerator or denominator; 2^{4181} is a gold answer of MATH
mp = mpmath.MPContext()  # a context of its own: the precision that others chose for mpmath stays as it is
mp.dps = 150
LARGEST = mp.mpf(10) ** 40  # of inexact numbers: beyond it and 1 / LARGEST, 150 digits might not tell two sums apart
ROUNDING = mp.mpf(10) ** -90  # smaller differences are errors of the 150-digit arithmetic


class Unreadable(ValueError):
    """The text is no answer that can be read, or its value is out of range."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An expression. unit: the words and the mark after it. step: one unit in the last place of a decimal, or 0."""

    tree: ast.expr
    unit: str = ""
    step: Fraction = Fraction(0)


# ------------- Functions and names


def power(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1
    bits = max(a.numerator.bit_length(), a.denominator.bit_length()) if exact else max(abs(mp.mag(a)), 1)
    if abs(b) * bits > MAX_BITS:
        raise Unreadable("too large a power")
    return a ** int(b) if exact else mp.power(mp.convert(a), mp.convert(b))


FUNCTIONS = {name: getattr(mp, name) for name in "sin cos tan cot sec csc exp log asin acos atan".split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log}
FUNCTIONS |= {"sqrt": mp.sqrt, "cbrt": mp.cbrt, "abs": abs, "Abs": abs}
FUNCTION = r"(?<![a-zA-Z])\\?(" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![a-zA-Z])"
CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "E": +mp.e, "i": mp.mpc(0, 1), "I": mp.mpc(0, 1), "infty": mp.inf, "oo": mp.inf}
MARKS = {"percent": Fraction(1, 100), "degree": mp.pi / 180, "degrees": mp.pi / 180}

# ------------- One spelling for each thing

SPELLINGS = {
    **{"*": r"\cdot \times × · ⋅", "/": r"\div ÷", "-": "− –", "^": "**", "=": r"== \in ∈", "≈": r"\approx"},
    **{"∪": r"\cup", "±": r"\pm", r"\infty ": "∞", r"\pi ": "π", r"\sqrt ": "√", r"\frac": r"\dfrac \tfrac \cfrac"},
    **{"$": r"\$", "{": r"\{ \lbrace", "}": r"\} \rbrace", " degree ": r"^\circ ^{\circ} °", " percent ": r"\% %"},
    **{r"\text": r"\textbf \textit \textrm \textnormal \mbox \mathrm \mathbf \operatorname", "\\\\": "\\\\"},
    **{" ": r"\left \right \boxed \displaystyle \quad \, \; \: \! ~ \( \) \[ \]", "": "Matrix Interval.open"},
}
SPELLINGS = {old: new for new, spellings in SPELLINGS.items() for old in spellings.split()} | {"\\ ": " "}
SPELLING = re.compile(
    "|".join(re.escape(s) + r"(?![a-zA-Z])" * (s[-1] in string.ascii_letters) for s in sorted(SPELLINGS, key=len)[::-1])
)
MATRIX = re.compile(r"\[?\s*\\begin\s*\{([pbB]?matrix)\}(.*?)\\end\s*\{\1\}\s*\]?")


def clean(text):
    """The text without delimiters, closing points and thousands separators, and with one spelling per symbol.

    A matrix becomes [[a,b],[c,d]], as sympy prints it.
    """
    text = re.sub(r"^\$+((?:\\\$|[^$])+)\$+$", r"\1", text.strip().rstrip(" .")).strip().rstrip(" .")
    text = re.sub(r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ )(?=\d{3}(?!\d))", "", text)
    text = SPELLING.sub(lambda match: SPELLINGS[match[0]], text)
    text = re.sub(r"\\text\s*\{\s*(and|or|" + "|".join([*FUNCTIONS, *MARKS]) + r")\s*\}", r" \1 ", text)
    text = MATRIX.sub(_matrix, text)
    if not re.search(r"[(\[]|(?<!\\text)\{", text):  # between brackets, a comma separates two numbers
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return re.sub(r"\s+", " ", text).strip()


def _matrix(match):
    rows = [row.replace("&", ",") for row in match[2].split(r"\\") if row.strip()]
    return "[" + ",".join(f"[{row}]" for row in rows) + "]"


def depths(text):
    """0, and the depth of brackets after each character."""
    return [0, *itertools.accumulate((c in "([{") - (c in ")]}") for c in text)]


def split(text, separators):
    """The pieces of a text between those separators (single characters) that stand outside all brackets."""
    cuts = [i for i, depth in enumerate(depths(text)[1:]) if depth == 0 and text[i] in separators]
    return [text[i + 1 : j].strip() for i, j in zip([-1, *cuts], [*cuts, len(text)], strict=True)]


# ------------- An expression and the words after it

# The words after a value: those in \text{...}, others of four letters, and short units. Other letters are variables.
WORDS = re.compile(
    r"(?:(?:\s*\\text\s*\{[^{}]*\}|\s+(?!degree|percent|sin|cos|tan|log|sqrt)(?:[a-zA-Z]{4,}|cm|mm|km|kg|in|ft|mph)\b\.?)"
    r"(?:\s*\^\s*\{?\d\}?)?)*$"
)
NOT_UNITS = re.compile(  # digits, and words that change the value before them: "5 factorial" is not 5 with a unit
    r"(?<!\^)\d|\b(squared|cubed|factorial|mod|modulo|plus|minus|times|over|base|not|more|less|least|most|to|from|if|"
    r"when|unless|except|above|below|negative|hal(f|ves)|(third|quarter|fifth|tenth|hundredth|thousandth|millionth)s?|"
    r"dozen|hundred|thousand|million|billion|trillion)\b"
)


def read_value(text):
    """The Value of a cleaned expression, with or without words after it."""
    text = re.sub(r"^(-?)\s*\$(.*)", r"\1\2 dollars", text)
    start = WORDS.search(text).start()
    text, words = text[:start], text[start:].lower()
    if NOT_UNITS.search(words):
        raise Unreadable(f"{words!r} after a value")
    words = re.sub(r"\\text|s\b|[^a-z^\d]", "", words)  # cm^{2} is cm^2, and hours are an hour
    unit = " ".join(re.findall("degree|percent", text) + [words] * bool(words))
    step = Fraction(0)
    if re.fullmatch(r"-?\d*\.?\d+([eE]-?\d{1,3})?", text) and Fraction(text).denominator > 1:
        step = Fraction(10) ** Decimal(text).as_tuple().exponent
    try:
        tree = ast.parse(to_python(text), mode="eval").body
    except (SyntaxError, MemoryError):  # MemoryError: nested too deeply for Python's parser
        raise Unreadable(text) from None
    if sum(isinstance(part, ast.expr) for part in ast.walk(tree)) > MAX_NODES:
        raise Unreadable("too long an expression")
    return Value(tree, unit, step)


# ------------- Python's syntax

ARGUMENT = r"\s*(\d|[a-zA-Z]|\\[a-zA-Z]+)"  # of a LaTeX command, without braces
REWRITES = [  # LaTeX commands without commands inside; repeated, from the inside out
    (r"\\sqrt\s*(?:\{([^{}]*)\}|(\d+|[a-zA-Z]))", r"\\sqrt(\1\2)"),
    (r"\\sqrt\s*\[([^][]*)\]\s*\{([^{}]*)\}", r"((\2)^(1/(\1)))"),
    (rf"\\frac{ARGUMENT}", r"\\frac{\1}"),
    (rf"(\\frac\s*\{{[^{{}}]*\}}){ARGUMENT}", r"\1{\2}"),
    (r"(?<![\w.^}])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{(\d+)\}", r"(\1+\2/\3)"),  # a mixed number
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))"),
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
]
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d*[.^]))?)|\\?(?P<name>[a-zA-Z]+)|(?P<sign>\*\*|.))"
)


def to_python(text):
    r"""The expression in Python's syntax: \frac{1}{2}x^2 is ((1)/(2))*x**2."""
    before = None
    while text != before:
        before = text
        for pattern, replacement in REWRITES:
            text = re.sub(pattern, replacement, text)
    text = re.sub(rf"{FUNCTION}\s*((?:\d+|[a-zA-Z])(?: degree)?)(?=\s*([-+)]|$))", r"\\\1(\2)", text)  # \cot x
    source, last = [], "start"
    for match in TOKEN.finditer(text):
        kind, token = match.lastgroup, match[match.lastgroup]
        if last == "function" and token not in "({":
            raise Unreadable("a function without brackets")  # sin 2x, sin^2 x
        if kind == "number":
            token = f"({Fraction(token)})"
        elif kind == "name" and token in FUNCTIONS:
            kind = "function"
        elif kind == "name" and token not in CONSTANTS and token not in MARKS:
            # 1/ab may mean 1/(ab) or b/a
            if "\\" in match[0] or len(token) > 6 or (len(token) > 1 and source[-1:] == ["/"]):
                raise Unreadable(f"the word {token!r}")
            token = "*".join(token)  # a product of variables
        elif kind == "sign":
            token = {"^": "**", "{": "(", "}": ")"}.get(token, token)
            kind = {"(": "open", ")": "close"}.get(token, kind)
        starts = ("name", "function", "open", "number") if last == "close" else ("name", "function", "open")
        if last in ("number", "name", "close") and kind in starts:
            source.append("*")
        source.append(token)
        last = kind
    return " ".join(source)


# ------------- Values

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
OPERATORS |= {ast.Pow: power, ast.USub: operator.neg, ast.UAdd: operator.pos}


def evaluate(node, names):
    """The number that a tree stands for, a Fraction or an mpmath number; names: the values of the names.

    Raises ValueError or ArithmeticError where there is none, or where it is out of range.
    """
    match node:
        case ast.Constant(value=int(value)):
            value = Fraction(value)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=op, operand=a) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluate(a, names))
        case ast.BinOp(left=a, op=op, right=b) if type(op) in OPERATORS:
            a, b = evaluate(a, names), evaluate(b, names)
            if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
                a, b = mp.convert(a), mp.convert(b)
            value = OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=[a], keywords=[]) if name in FUNCTIONS:
            value = FUNCTIONS[name](mp.convert(evaluate(a, names)))
        case _:
            raise Unreadable(ast.dump(node)[:80])
    if isinstance(value, Fraction):
        in_range = max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
    else:
        value = mp.chop(value, tol=ROUNDING)
        in_range = not value or 1 / LARGEST < abs(value) < LARGEST
    if not in_range:
        raise Unreadable("out of range")
    return value


def same_value(p, g, question):
    """Whether two Values agree, with the marks ° and % or without them: 90 is 90°, and so is pi/2."""
    if p.unit and g.unit and p.unit != g.unit:
        return False
    if same_number(p, g, CONSTANTS | MARKS):
        return True
    may_leave_out = "percent" not in p.unit or "percent" in g.unit or re.search("percent|per cent|%", question)
    return bool(may_leave_out) and same_number(p, g, CONSTANTS | dict.fromkeys(MARKS, Fraction(1)))


def same_number(p, g, constants):
    """Whether two Values are equal at six random points; if there are no variables, decimals within a tolerance."""
    used = {part.id for value in (p, g) for part in ast.walk(value.tree) if isinstance(part, ast.Name)}
    variables = sorted(used - set(FUNCTIONS) - set(constants))
    generator = random.Random(0)
    for _ in range(6 if variables else 1):
        point = {name: Fraction(generator.randrange(-2_000_000, 2_000_000), 1_000_003) for name in variables}
        a, b = evaluate(p.tree, constants | point), evaluate(g.tree, constants | point)
        if a == b:
            continue
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)
        a, b = mp.convert(a), mp.convert(b)
        allowed = -1 if exact else ROUNDING * max(abs(a), abs(b), 1)  # -1: unequal fractions differ, however little
        if (p.step or g.step) and not variables:
            allowed = max(allowed, tolerance(abs(b), mp.convert(max(p.step, g.step)), bool(g.step)))
        if not abs(a - b) <= allowed < mp.inf:
            return False
    return True


def tolerance(size, step, gold_is_decimal):
    """How far apart two numbers of that size may be if one is a decimal, with `step` in its last place."""
    doubles = mp.mpf("1e-12") * (size or 1)
    rounded = min(step / 2, size / 10**6)
    gsm_hard = min(mp.mpf("6e-11"), size / 1000) if gold_is_decimal else 0  # it rounds its answers to 10 places
    return max(doubles, rounded, gsm_hard)
