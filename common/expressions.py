r"""Mathematical expressions in LaTeX or plain text: one spelling, Python syntax, a value. For common/grading.py.

    read_value(clean(r"6\frac{1}{6}\text{ feet}"))     # Value(tree of (6+1/6), unit="ft")

Nothing is passed to eval: ast.parse reads the expression, and evaluate() knows a white list of operations. Rational
values are exact (Fraction), others have 150 digits (mpmath). Expressions with variables are compared at six random
rational points: two different polynomials of degree d agree there with a probability below (d / 10^6)^6 (Schwartz 1980,
Zippel 1979). Lengths, powers and arguments are bounded: what exceeds a bound is Unreadable, and never right.
"""

import ast
import dataclasses
import itertools
import operator
import random
import re
import string
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
    """An expression. unit: its known units, or "". step: one unit in the last place, if it is a decimal alone."""

    tree: ast.expr
    unit: str = ""
    step: Fraction | None = None


# ------------- Functions and names


def power(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1
    bits = max(a.numerator.bit_length(), a.denominator.bit_length()) if exact else max(abs(mp.mag(a)), 1)
    if abs(b) * bits > MAX_BITS:
        raise Unreadable("too large a power")
    return a ** int(b) if exact else mp.power(mp.convert(a), mp.convert(b))


def root(x, degree=Fraction(2)):
    """The principal root; the real one of a negative number if the degree is odd."""
    odd = degree in (3, 5, 7, 9) and not isinstance(x, mp.mpc) and x < 0
    return -power(-x, 1 / degree) if odd else power(x, 1 / degree)


EXACT = {"sqrt": root, "root": root, "cbrt": lambda x: root(x, Fraction(3)), "abs": abs, "Abs": abs}
EXACT |= {"Rational": operator.truediv}  # functions of Fractions or mpmath numbers
FUNCTIONS = (  # functions of mpmath numbers alone, by mpmath's names
    "sin cos tan cot sec csc sinh cosh tanh exp log floor ceil factorial binomial asin acos atan "
    "arcsin:asin arccos:acos arctan:atan ln:log lg:log10 ceiling:ceil"
)
FUNCTIONS = EXACT | {names.split(":")[0]: getattr(mp, names.split(":")[-1]) for names in FUNCTIONS.split()}
CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "E": +mp.e, "i": mp.mpc(0, 1), "I": mp.mpc(0, 1), "infty": mp.inf}
CONSTANTS |= {"percent": Fraction(1, 100), "degree": mp.pi / 180}
GREEK = "alpha beta gamma delta epsilon theta lambda mu nu rho sigma tau phi varphi omega triangle angle".split()
FUNCTION = r"(?<![a-zA-Z])\\?(" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![a-zA-Z])"

# ------------- One spelling for each thing

SPELLINGS = {
    **{"≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "≠": r"\ne \neq !=", "<": r"\lt", ">": r"\gt"},
    **{"∈": r"\in", "∪": r"\cup", "±": r"\pm", "∓": r"\mp", "*": r"\cdot \times × · ⋅ ∗", "/": r"\div ÷ ∕", "-": "− –"},
    **{"^": "**", "|": r"\vert \lvert \rvert", "(": r"\langle ⟨", ")": r"\rangle ⟩", "$": r"\$", "≈": r"\approx"},
    **{"{": r"\{ \lbrace", "}": r"\} \rbrace", "{}": r"\emptyset \varnothing ∅", r"\infty ": "∞", r"\pi ": "π"},
    **{r"\frac": r"\dfrac \tfrac \cfrac", r"\binom": r"\dbinom \tbinom", r"\sqrt ": "√", "\\\\": "\\\\", " cents": "¢"},
    **{r"\text": r"\textbf \textit \textrm \textnormal \mbox \mathrm \mathbf \operatorname", "=": "=="},
    **{" degree ": r"^\circ ^{\circ} \degree °", " percent ": r"\% %"},
    **{" ": r"\left \right. \right \displaystyle \quad \qquad \boxed \big \Big \, \; \: \! \> ~"},
}
SPELLINGS = {old: new for new, spellings in SPELLINGS.items() for old in spellings.split()} | {"\\ ": " "}
SPELLINGS |= {digit: f"^{i}" for i, digit in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {d: f"_{i}" for i, d in enumerate("₀₁₂₃₄₅₆₇₈₉")}
SPELLING = re.compile(
    "|".join(re.escape(s) + r"(?![a-zA-Z])" * (s[-1] in string.ascii_letters) for s in sorted(SPELLINGS, key=len)[::-1])
)
MATRIX = re.compile(r"\\begin\s*\{([pbB]?matrix)\}(.*?)\\end\s*\{\1\}")


def clean(text):
    """The text without delimiters, closing punctuation and thousands separators, and with one spelling per symbol.

    A matrix becomes ⟨a,b⟩ (a column) or ⟨⟨a,b⟩,⟨c,d⟩⟩.
    """
    text = re.sub(r"(?i)^\s*(?:the\s+)?(?:final\s+)?answer(?:\s+is)?\s*[:=]?\s+(?=\S)", "", text).strip()
    for opening, closing in (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        text = text.removesuffix(".").strip()
        inner = text[len(opening) : -len(closing)]
        delimited = text.startswith(opening) and text.endswith(closing)
        if delimited and not re.search(r"(?<!\\)" + re.escape(opening), inner):
            text = inner.strip()
    text = re.sub(r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ )(?=\d{3}(?!\d))", "", text.removesuffix("."))
    text = SPELLING.sub(lambda match: SPELLINGS[match[0]], text)
    text = re.sub(r"(:\s*\d\d)\s*(?:\\text\s*\{)?\s*([ap])\.?\s*m\b\.?\s*\}?", r"\1 \\text{\2m}", text)  # 8:34 p.m.
    text = re.sub(r"\\text\s*\{\s*(and|or|" + "|".join(FUNCTIONS) + r")[,.]?\s*\}", r" \1 ", text)
    text = re.sub(r"(?<![a-zA-Z\\])(?:oo|inf|infinity)(?![a-zA-Z])", r"\\infty ", text)
    text = re.sub(r"(?<=[)\]])\s*(?:U|union)\s*(?=[(\[])", "∪", text)
    text = MATRIX.sub(_matrix, text)
    if not re.search(r"[(\[⟨]|(?<!\\text)\{", text):  # between brackets, a comma separates two numbers
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return re.sub(r"\s+", " ", text).strip()


def _matrix(match):
    rows = [row.strip() for row in match[2].split(r"\\") if row.strip()]
    return "⟨" + ",".join(f"⟨{row.replace('&', ',')}⟩" if "&" in row else row for row in rows) + "⟩"


def depths(text):
    """0, and the depth of brackets after each character."""
    return [0, *itertools.accumulate((c in "([{⟨") - (c in ")]}⟩") for c in text)]


def split(text, separators):
    """The pieces of a text between those separators (single characters) that stand outside all brackets."""
    cuts = [i for i, depth in enumerate(depths(text)[1:]) if depth == 0 and text[i] in separators]
    return [text[i + 1 : j].strip() for i, j in zip([-1, *cuts], [*cuts, len(text)], strict=True)]


# ------------- Words after a value

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
UNITS = (  # one unit between two bars, with its spellings; plurals are found by their endings
    "$ dollar usd|€ euro|£|cent|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre|"
    "m meter metre|in inch|ft foot feet|yd yard|mi mile|g gram|kg kilogram|mg milligram|lb pound|oz ounce|"
    "s sec second|min minute|h hr hour|day|week|month|year|l liter litre|ml milliliter millilitre|am|pm|"
    "rad radian|degree deg|percent|/ per"
)
UNITS = {spelling: names.split()[0] for names in UNITS.split("|") for spelling in names.split()}
NOT_UNITS = re.compile(  # digits, and words that change the value before them: "5 factorial" is not 5 with a unit
    r"(?<!\^)\d|\b(squared|cubed|factorial|mod|modulo|plus|minus|times|over|base|not|more|less|least|most|to|from|if|"
    r"when|unless|except|above|below|negative|hal(f|ves)|(third|quarter|fifth|tenth|hundredth|thousandth|millionth)s?)\b"
)
LAST_WORD = re.compile(r"(?:\\text\s*\{([^{}]*)\}|(?<![\\a-zA-Z])([a-zA-Z]+\.?|[$€£/]))\s*(?:\^\s*\{?(\d)\}?)?$")


def unit_of(words):
    """The known units among some words, in one spelling: "square inches" and "in^2" are "in^2"; "" for none."""
    words = re.sub(r"\b(?:square|sq) (\w+)", r"\1^2", re.sub(r"\bcubic (\w+)", r"\1^3", words))
    words = re.sub(r"\bin (?=[a-z])", "", words.replace("mph", "mi / h"))
    units = []
    for name, exponent in re.findall(r"([a-z]+|[$€£/])(\^\d)?", words):
        spellings = [name, *(name.removesuffix(ending) for ending in ("s", "es") if len(name) > 2)]
        units += [UNITS[spelling] + exponent for spelling in spellings if spelling in UNITS][:1]
    return " ".join(units)


def split_words(text):
    """(expression, words): the words at its end are those in \\text{...}, known units, and others of four letters."""
    words = ""
    while match := LAST_WORD.search(text):
        word = (match[2] or match[1]).strip(" .").lower()
        letters = match[2] and word.isalpha() and (len(word) == 1 or (len(word) < 4 and not unit_of(word)))
        if letters or match[2] in FUNCTIONS or match[2] in GREEK or (word == "/" and not words):
            break  # a product of variables, or a quotient
        words = f"{word}^{match[3]} {words}" if match[3] else f"{word} {words}"
        text = text[: match.start()].rstrip()
    return text, words.strip()


def read_value(text):
    """The Value of a cleaned expression, with or without a unit; its words if there is no expression."""
    text, words = split_words(text)
    if not text and not words:
        raise Unreadable("nothing")
    if not text:
        return words
    if currency := re.match(r"(-?)\s*([$€£])\s*", text):
        text = currency[1] + text[currency.end() :]
        words = words if unit_of(words) == currency[2] else f"{currency[2]} {words}"
    if NOT_UNITS.search(words):
        raise Unreadable(f"{words!r} after a value")
    unit, step = unit_of(words), None
    if unit in CONSTANTS and (len(split(text[1:], "+-")) > 1 or re.search(FUNCTION, text)):
        text, unit = f"{text} {unit}", ""  # tan 15°, x + 10%: the sign belongs to a part of the expression
    if re.fullmatch(r"-?\d*\.?\d+([eE]-?\d{1,3})?", text) and Fraction(text).denominator > 1:
        digits, _, exponent = text.lower().partition("e")
        step = Fraction(10) ** (int(exponent or 0) - len(digits.partition(".")[2]))
    for word in words.split():
        text = f"({text})*{SCALES[word]}" if word in SCALES else text
    try:
        tree = ast.parse(to_python(text), mode="eval").body
    except (SyntaxError, MemoryError):  # MemoryError: nested too deeply for Python's parser
        raise Unreadable(text) from None
    if sum(isinstance(part, ast.expr) for part in ast.walk(tree)) > MAX_NODES:
        raise Unreadable("too long an expression")
    return Value(tree, unit, step)


# ------------- Python's syntax


def mixed_number(match):
    """1 4/5 is 1 + 4/5; 2 3/2 stays a product."""
    return f"({match[1]}+{match[2]}/{match[3]})" if 0 < int(match[2]) < int(match[3]) else match[0]


ARGUMENT = r"\s*(?:\{([^{}]*)\}|(\d|[a-zA-Z]|\\[a-zA-Z]+))"  # what a LaTeX command takes
REWRITES = [  # LaTeX commands without commands inside; repeated, from the inside out
    (r"([a-zA-Z])_\s*\{(\w+)\}", r"\1_\2 "),
    (rf"\\?log\s*_{ARGUMENT}", r"\\log[\1\2]"),
    (r"\\sqrt\s*(?:\[([^][]*)\])?\s*(?:\{([^{}]*)\}|(\d+|[a-zA-Z]))", lambda m: rf"\root({m[2] or m[3]},{m[1] or 2})"),
    (r"(?<![\w.^}])(\d+)\s*\\frac\s*\{?(\d+)\}?\s*\{(\d+)\}", mixed_number),
    (r"(?<![\w.^}])(\d+)\s*\\frac\s*(\d)\s*(\d)", mixed_number),
    (rf"\\frac{ARGUMENT}{ARGUMENT}", r"((\1\2)/(\3\4))"),
    (rf"\\binom(?!ial){ARGUMENT}{ARGUMENT}", r"\\binomial(\1\2,\3\4)"),
    (r"\^\s*\{([^{}]*)\}", r"^(\1)"),
]
FINAL_REWRITES = [
    (r"(?<![\w.^/)])(\d+) +(\d+)/(\d+)(?![\d.])", mixed_number),
    (r"\|([^|]*)\|", r"\\abs(\1)"),
    (r"\\l(floor|ceil)\b(.*?)\\r\1", r"\\\1(\2)"),
    (r"((?<![\d.])\d+|(?<![a-zA-Z])[a-zA-Z]|(?<![a-zA-Z])\([^()]*\))\s*!", r"\\factorial(\1)"),
    (rf"{FUNCTION}\s*\^\s*\(\s*-\s*1\s*\)", r"\\arc\1 "),
    (rf"(?!\\?log){FUNCTION}\s*\^\s*(?:\(\s*(\d+)\s*\)|(\d))", r"\\\1[\2\3]"),
    # sin 2x cos x: without brackets, the argument of a function is the product up to the next sign or function
    (
        rf"{FUNCTION}((?:\[\w+\])?)(?>\s*((?:\d[\d.]*)?(?:\s*(?!{FUNCTION})\\?[a-zA-Z]\w*(?:\^\d+)?)*))(?!\s*[\w([{{])",
        r"\\\1\2(\3)",
    ),
]
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d*[.^]))?)|\\?(?P<name>[a-zA-Z]+(?:_\w+)?)|"
    r"(?P<sign>\*\*|.))"
)


def to_python(text):
    """The expression in Python's syntax: ((1)/(2))*x**2, log[2](8) for \\log_2 8, sin[2](x) for sin^2 x."""
    before = None
    while text != before:
        before = text
        for pattern, replacement in REWRITES:
            text = re.sub(pattern, replacement, text)
    for pattern, replacement in FINAL_REWRITES:
        text = re.sub(pattern, replacement, text)
    source, last = [], "start"
    for match in TOKEN.finditer(text):
        kind, token = match.lastgroup, match[match.lastgroup]
        if kind == "number":
            token = f"({Fraction(token)})"
        elif kind == "name" and token in FUNCTIONS:
            kind = "function"
        elif kind == "name" and token not in CONSTANTS and token not in GREEK and "_" not in token:
            if len(token) > 6 or (len(token) > 1 and source[-1:] == ["/"]):  # 1/ab may mean 1/(ab) or b/a
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

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
OPERATORS |= {ast.Div: operator.truediv, ast.Pow: power}


def evaluate(node, point):
    """The number that a tree stands for, a Fraction or an mpmath number; point: the values of the names.

    Raises ValueError or ArithmeticError where there is none, or where it is out of range.
    """
    match node:
        case ast.Constant(value=int(value)):
            value = Fraction(value)
        case ast.Name(id=name) if name in point:
            return point[name]
        case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=a):
            return evaluate(a, point) * (-1 if isinstance(node.op, ast.USub) else 1)
        case ast.BinOp(left=a, op=op, right=b) if type(op) in OPERATORS:
            a, b = evaluate(a, point), evaluate(b, point)
            if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
                a, b = mp.convert(a), mp.convert(b)
            value = OPERATORS[type(op)](a, b)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments, keywords=[]) if name in FUNCTIONS:
            arguments = [evaluate(argument, point) for argument in arguments]
            if name not in EXACT:
                arguments = [*map(mp.convert, arguments)]
                if max(map(abs, arguments)) > {"factorial": 1500, "exp": 100}.get(name, 10**9):
                    raise Unreadable(f"{name} of too large a number")
            try:
                value = FUNCTIONS[name](*arguments)
            except TypeError:
                raise Unreadable(f"{name} of {len(arguments)} arguments") from None
        case ast.Call(func=ast.Subscript(value=ast.Name(id=name), slice=n), args=[x]):  # log[2](x), sin[2](x)
            value, n = evaluate(ast.Call(ast.Name(name), [x], []), point), evaluate(n, point)
            value = value / mp.log(mp.convert(n)) if name == "log" else power(value, n)
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


def variables(*values):
    names = {part.id for value in values for part in ast.walk(value.tree) if isinstance(part, ast.Name)}
    return names - set(FUNCTIONS) - set(CONSTANTS)


def samples(p, g):
    """The values of two Values at up to six points where either has one; None where one of them has none.

    Where there are variables and no i, a complex value is none: sqrt(x) at x < 0.
    """
    names = sorted(variables(p, g))
    real = names and not re.search(r"Name\(id='[iI]'", ast.dump(p.tree) + ast.dump(g.tree))
    generator, found = random.Random(0), 0
    for i in range(24 if names else 1):
        scale = Fraction(1 if i < 12 else 9, 1_000_003)
        point = {n: scale * generator.choice((-1, 1)) * generator.randrange(500_000, 2_000_000) for n in names}
        pair = []
        for tree in (p.tree, g.tree):
            try:
                value = evaluate(tree, CONSTANTS | point)
                pair.append(None if real and isinstance(value, mp.mpc) else value)
            except (ValueError, ArithmeticError, RecursionError):
                pair.append(None)
        if pair != [None, None] and found < 6:
            found += 1
            yield pair
    if found < (3 if names else 1):
        yield [None, None]


def equal_numbers(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = mp.convert(a), mp.convert(b)
    return a == b or abs(a - b) <= ROUNDING * max(abs(a), abs(b), 1) < mp.inf


def same_number(p, g, p_scale=1, g_scale=1):
    """Whether two Values times their scales are equal at all samples; decimals without variables within a tolerance."""
    constant = not variables(p, g)
    for a, b in samples(p, g):
        if a is None or b is None:
            return False
        if (p_scale, g_scale) != (1, 1):
            a, b = mp.convert(a) * p_scale, mp.convert(b) * g_scale
        if not equal_numbers(a, b) and not (constant and near(mp.convert(a), mp.convert(b), p.step, g.step)):
            return False
    return True


def near(a, b, a_step, b_step):
    """Whether a and b differ by float rounding only, or one is the other one rounded or cut to its last place."""
    if not (a_step or b_step) or isinstance(a - b, mp.mpc):
        return False
    difference, size = abs(a - b), abs(b)
    if difference <= mp.mpf("1e-12") * (size or 1) or (b_step and difference <= min(6e-11, size / 1000)):
        return True  # double arithmetic; GSM-Hard rounds its answers to 10 places
    step, decimal, other = max((a_step or 0, a, b), (b_step or 0, b, a), key=lambda item: item[0])
    step = mp.convert(step)
    return difference <= size / 10**6 and (difference <= step / 2 or 0 <= abs(other) - abs(decimal) < step)


def proportional(p, g):
    """Whether the quotient of two Values is the same at all samples."""
    ratios = [mp.convert(a) / mp.convert(b) if a and b else None for a, b in samples(p, g)]
    return None not in ratios and all(equal_numbers(ratio, ratios[0]) for ratio in ratios)
