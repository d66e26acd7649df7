r"""Mathematical expressions in LaTeX, plain text or Python's notation: one spelling, a tree, a value. For grading.py.

    read_value(clean(r"6\frac{1}{6}\text{ feet}"))     # Value(("+", ("number", 6), ("/", ...)), unit="ft")

Nothing is passed to eval: Parser knows a white list of operations. Rational values are exact (Fraction), others have
150 digits (mpmath). Expressions with variables are compared at six random rational points: two different polynomials
of degree d agree at one with a probability below d / 10^6 (Schwartz 1980, Zippel 1979). They are real functions: a
point where neither has a real value does not count, so sqrt(1/n) is 1/sqrt(n), but sqrt(n^2) is not n. Lengths,
depths and powers are bounded: what exceeds a bound is Unreadable, and never right.
"""

import dataclasses
import functools
import itertools
import math
import operator
import random
import re
from decimal import Decimal
from fractions import Fraction

import mpmath

MAX_TOKENS = 800  # of one expression
MAX_BITS = 20_000  # of an exact numerator or denominator; 2^{4181} is a gold answer of MATH
MAX_FACTORIAL = 1000
mp = mpmath.MPContext()  # a context of its own: the precision that others chose for mpmath stays as it is
mp.dps = 150
LARGEST = mp.mpf(10) ** 40  # of inexact numbers: beyond it and 1 / LARGEST, 150 digits might not tell two sums apart
ROUNDING = mp.mpf(10) ** -90  # smaller differences are errors of the 150-digit arithmetic


class Unreadable(ValueError):
    """The text is no answer that can be read, or its value is out of range."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An expression. unit: the words and the mark after it. step: one unit in the last place of a decimal, or 0.

    tree: ("number", Fraction), ("name", text), or an operation of OPERATIONS with its trees.
    """

    tree: tuple
    unit: str = ""
    step: Fraction = Fraction(0)


# ------------- Operations and names


def power(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1
    bits = max(a.numerator.bit_length(), a.denominator.bit_length()) if exact else max(abs(mp.mag(a)), 1)
    if abs(b) * bits > MAX_BITS:
        raise Unreadable("too large a power")
    return a ** int(b) if exact else mp.power(mp.convert(a), mp.convert(b))


def natural(*numbers):
    """The numbers as int; refuses what has no factorial here."""
    if any(not isinstance(n, Fraction) or n.denominator > 1 or not 0 <= n <= MAX_FACTORIAL for n in numbers):
        raise Unreadable("a factorial of such a number")
    return map(int, numbers)


EXACT = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "^": power}
EXACT |= {"negative": operator.neg, "abs": abs, "Abs": abs, "Fraction": lambda a, b=1: a / b}
EXACT |= {"!": lambda n: Fraction(math.factorial(*natural(n)))}
EXACT |= {"binomial": lambda n, k: Fraction(math.comb(*natural(n, k)))}
FUNCTIONS = {name: getattr(mp, name) for name in "sqrt cbrt sin cos tan cot sec csc exp log asin acos atan".split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log}
OPERATIONS = EXACT | FUNCTIONS
CALLS = {name: name for name in OPERATIONS if name.isalpha() and name != "negative"}
CALLS |= {"frac": "/", "binom": "binomial", "Rational": "Fraction", "comb": "binomial", "factorial": "!"}
CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "E": +mp.e, "i": mp.mpc(0, 1), "I": mp.mpc(0, 1), "infty": mp.inf}
MARKS = {"percent": Fraction(1, 100), "degree": mp.pi / 180}
GREEK = "alpha beta gamma delta epsilon theta lambda mu phi varphi omega rho sigma tau".split()

# ------------- One spelling for each thing

SPELLINGS = {  # ours: what others write; a spelling that ends in a letter ends a word
    **{"*": r"\cdot \times × · ⋅", "/": r"\div ÷", "-": "− –", "^": "**", "^2": "²", "^3": "³", "=": "==", "∈": r"\in"},
    **{"≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "<": r"\lt", ">": r"\gt"},
    **{"≈": r"\approx", "∪": r"\cup", "±": r"\pm", " or ": r"\lor \vee ∨", "|": r"\vert \lvert \rvert \mid"},
    **{r"\infty ": "∞ oo inf infinity Infinity", r"\pi ": "π", r"\sqrt ": "√", r"\frac": r"\dfrac \tfrac \cfrac"},
    **{"$": r"\$", "{": r"\{ \lbrace", "}": r"\} \rbrace", "{}": r"\emptyset \varnothing ∅ EmptySet set()"},
    **{" degree ": r"^\circ ^{\circ} ° degrees deg", " percent ": r"\% %", "(": r"\langle ⟨", ")": r"\rangle ⟩"},
    **{r"\text": r"\textbf \textit \textrm \textnormal \mbox \mathrm \mathbf \operatorname", "\\\\": "\\\\"},
    **{" ": r"\left \right \boxed \displaystyle \quad \qquad \, \; \: \! ~ \( \) \[ \]", r"\binom": r"\dbinom \tbinom"},
}
SPELLINGS = {old: new for new, spellings in SPELLINGS.items() for old in spellings.split()} | {"\\ ": " "}
WORD_START, WORD_END = r"(?<![a-zA-Z\\])", r"(?![a-zA-Z])"
SPELLING = re.compile(
    "|".join(
        WORD_START * old[0].isalpha() + re.escape(old) + WORD_END * old[-1].isalpha()
        for old in sorted(SPELLINGS, key=len, reverse=True)
    )
)
SCALARS = "u?int|float|complex|str|bool|Integer|Float|Decimal|mpf|mpc"
MATRIX = r"\[?\s*\\begin\s*\{([pbB]?matrix|array)\}(?:\s*\{[lcr|]*\})?(.*?)\\end\s*\{\1\}\s*\]?"
MIXED_NUMBER = r"(?<![\w.^})/*!])(?<![a-z] )(\d+)(?: ?\\frac ?\{?(\d+)\}? ?\{?(\d+)\}?| (\d+)/(\d+))(?!\d)"
CLEANING = [  # (pattern, replacement, example, what becomes of it), in this order
    (r"^\$+((?:\\\$|[^$])+)\$+$", r"\1", "$5$", "5"),
    # Pandoc's rule: a closing $ follows no space, and no digit follows it
    (r"(?<!\\)\$(?=\S)((?:\\\$|[^$])*?(?<=\S))\$(?!\d)", r"\1", "$x=5$ or $x=6$", "x=5 or x=6"),
    (r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ )(?=\d{3}(?!\d))", "", r"10,\!080", "10080"),
    (r"\\\\\s*\[-?[\d.]+\s*[a-z]{2}\]", r"\\\\", r"1 \\[6pt] 2", r"1 \\ 2"),
    (r"(?<!\w)(['\"])([^'\"]*)\1", r"\2", "['A', 'B']", "[A, B]"),
    (r"\b(?:np|numpy|sympy|math|mpmath|fractions|decimal)\.(?=[a-zA-Z])", "", "np.array([1])", "array([1])"),
    (rf"\b(?:{SCALARS})\d*_?(?=\()|,\s*dtype=[^()]*(?=\))", "", "[int64(1), Decimal('0.5')]", "[(1), ('0.5')]"),
    (r"[₀-₉]+", lambda found: "_" + "".join(str(ord(digit) - ord("₀")) for digit in found[0]), "52₈", "52_8"),
    (r"\s*\(?(?:\bbase|\\text\s*\{\s*base\s*\})\s*(\d+)\)?$", r"_\1", "52 (base 8)", "52_8"),
    (r"_\s*\{(\w+)\}", r"_\1", "52_{8}", "52_8"),
    (r"\\text\s*\{([^{}]*)\}(?=_)", r"\1", r"\text{A5}_11", "A5_11"),
    (SPELLING, lambda found: SPELLINGS[found[0]], r"2 \times \dfrac12", r"2 * \frac12"),
    (r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{?(\d+)\}?", lambda found: repeating(*found.groups()), r".\bar{3}", "(3/9)"),
    (rf"\\text\s*\{{\s*({'|'.join([*CALLS, *MARKS])})\s*\}}", r" \1 ", r"5\text{ percent}", "5 percent "),
    (r"\\text\s*\{([^{}a-zA-Z]*(?:and|or)?[^{}a-zA-Z]*)\}", r" \1 ", r"\text{5 or 6}", " 5 or 6 "),
    (r"\bEq\(([^,()]*),([^()]*)\)", r"\1=\2", "Eq(x, 5)", "x= 5"),
    (r"(?<=\))\s*\|\s*(?=\()", " or ", "(x < 2) | (3 < x)", "(x < 2) or (3 < x)"),
    (r"\|([^|]+)\|", r"abs(\1)", "2|x|", "2abs(x)"),
    (MATRIX, lambda found: rows(found[2]), r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]"),
    (r"\(([^()<>≤≥]+[<≤]) (\w)\) & \(\2 ([<≤][^()<>≤≥]+)\)", r"\1 \2 \3", "(2 ≤ x) & (x < 5)", "2 ≤ x < 5"),
    (r"(?<=[)\]}])\s*U\s*(?=[(\[{])", "∪", "(1, 2) U (3, 4)", "(1, 2)∪(3, 4)"),
    (r"(?<=[{,])\s*([a-zA-Z]\w*): ", r"\1=", "{x: -2, y: 3}", "{x=-2,y=3}"),
    (r"\s+", " ", "1\n +  2", "1 + 2"),
    (MIXED_NUMBER, r"(\1+\2\4/\3\5)", r"1\frac45, 2 1/2", "(1+4/5), (2+1/2)"),
    (
        r"^\[[][\d .eE+-]*\]$",
        lambda found: re.sub(r"(?<=[\d.\]]) (?=-?[\d.\[])", ",", found[0]),
        "[1. -2.]",
        "[1.,-2.]",
    ),
    (r"^[^a-df-ik-zA-Z]*$", lambda found: re.sub(r"(?<=[\d.])j", "i", found[0]), "(6-5j)", "(6-5i)"),
]


def repeating(whole, start, digits):
    """The fraction of a repeating decimal."""
    return f"({int(whole + start + digits) - int((whole + start) or 0)}/{10 ** len(start) * (10 ** len(digits) - 1)})"


def rows(text):
    """The rows of a LaTeX matrix as a list of lists."""
    return "[" + ",".join(f"[{row.replace('&', ',')}]" for row in text.split("\\\\") if row.strip()) + "]"


@functools.lru_cache(1000)
def clean(text):
    """The text without delimiters, closing points and thousands separators, and with one spelling per symbol.

    A matrix becomes [[a,b],[c,d]], as sympy prints it.
    """
    text = text.strip().rstrip(" .")
    for pattern, replacement, *_ in CLEANING:
        text = re.sub(pattern, replacement, text).strip()
    text = text.rstrip(" .")
    if not re.search(r"[(\[]|(?<!\\text)\{", text):  # between brackets, a comma separates two numbers
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return text


def depths(text):
    """0, and the depth of brackets after each character."""
    return [0, *itertools.accumulate((c in "([{") - (c in ")]}") for c in text)]


def cuts(text, separators):
    """The positions of those separators (single characters) that stand outside all brackets."""
    return [i for i, depth in enumerate(depths(text)[1:]) if depth == 0 and text[i] in separators]


def split(text, separators):
    """The pieces of a text between those separators."""
    at = cuts(text, separators)
    return [text[i + 1 : j].strip() for i, j in zip([-1, *at], [*at, len(text)], strict=True)]


# ------------- An expression and the words after it

# The words after a value: those in \text{...}, others of four letters, and short units. Other letters are variables.
WORDS = re.compile(
    r"(?:(?:\s*\\text\s*\{[^{}]*\}|\s+(?!degree|percent|sin|cos|tan|log|sqrt)(?:[a-zA-Z]{4,}|cm|mm|km|kg|in|ft|mph|sq|USD|(?i:[ap]\.?m))\b\.?(?:/[a-z]+)?)"
    r"(?:\s*\^\s*\{?\d\}?)?)*$"
)
NOT_UNITS = re.compile(  # digits, and words that change the value before them: "5 factorial" is not 5 with a unit
    r"(?<!\^)\d|\b(squared|cubed|factorial|mod|modulo|plus|minus|times|over|base|not|more|less|least|most|to|from|if|"
    r"when|unless|except|above|below|negative|hal(f|ves)|(third|quarter|fifth|tenth|hundredth|thousandth|millionth)s?|"
    r"dozen|hundred|thousand|million|billion|trillion)\b"
)
UNITS = {"centimeter": "cm", "millimeter": "mm", "kilometer": "km", "meter": "m", "kilogram": "kg", "gram": "g"}
UNITS |= {"inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "usd": "dollar", "mph": "mile per hour", "h": "hour"}


def read_value(text):
    """The Value of a cleaned expression, with or without words after it."""
    text = re.sub(r"^(-?)\s*\$(.*)", r"\1\2 dollars", text)
    start = WORDS.search(text).start()
    text, words = text[:start], text[start:].lower()
    if NOT_UNITS.search(words):
        raise Unreadable(f"{words!r} after a value")
    words = re.sub(r"\\text|s\b|[^a-z^\d ]", "", words.replace("metre", "meter"))  # cm^{2} is cm^2, hours are an hour
    words = re.sub(r"[a-z]+", lambda match: UNITS.get(match[0], match[0]), words).replace(" ", "")
    words = re.sub(r"^sq(?:uare)?(.*)", r"\1^2", words)
    unit = " ".join(re.findall("degree|percent", text) + [words] * bool(words))
    step = Fraction(0)
    if re.fullmatch(r"-?\d*\.?\d+([eE]-?\d{1,3})?", text) and Fraction(text).denominator > 1:
        step = Fraction(10) ** Decimal(text).as_tuple().exponent
    return Value(Parser(text).parse(), unit, step)


# ------------- From a text to a tree

TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d*[.^]))?)|(?P<name>\\?[a-zA-Z]+)|(?P<sign>.))"
)
CLOSING = {"(": ")", "[": "]", "{": "}"}


def names_in(run):
    r"""The tokens of a run of letters: xy is a product, AB and \theta are names, sin is a function."""
    name = run.lstrip("\\")
    if name in CALLS:
        return [("function", name)]
    if name in CONSTANTS or name in MARKS or name in GREEK:
        return [("name", name)]
    if name != run or name in ("nan", "zoo") or (len(name) > 3 and not name.isupper()):
        raise Unreadable(f"the word {run!r}")
    return [("name", name)] if name.isupper() else [("name", letter) for letter in name]


class Parser:
    r"""Recursive descent from a text to a tree. Products may be written without a sign: 2xy, 3\sqrt{2}, (a+5)(b+2).

    What may mean two things is Unreadable: 1/ab, \sin x/2, 5!!.
    """

    def __init__(self, text):
        self.text = text
        self.at = 0
        self.tokens = []  # of (kind, text), kind: "number", "name", "function", "sign"
        for match in TOKEN.finditer(text):
            token = match[0].strip()
            self.tokens += names_in(token) if match["name"] else [(match.lastgroup, token)]
        if len(self.tokens) > MAX_TOKENS:
            raise Unreadable("too long an expression")
        self.tokens.append(("end", ""))

    def fail(self):
        raise Unreadable(f"{self.text[:80]!r} at token {self.at}")

    def take(self, *texts):
        """Read the next token if it is one of these; returns its text, or None."""
        text = self.tokens[self.at][1]
        if text not in texts:
            return None
        self.at += 1
        return text

    def parse(self):
        tree = self.sum()
        return tree if self.tokens[self.at][0] == "end" else self.fail()

    def sum(self):
        tree = self.product()
        while sign := self.take("+", "-"):
            tree = (sign, tree, self.product())
        return tree

    def product(self):
        tree = self.factor()
        divided = False  # by something other than a number: 1/ab
        while True:
            if sign := self.take("*", "/"):
                tree = (sign, tree, self.factor())
                divided = sign == "/" and self.tokens[self.at - 1][0] != "number"
            elif self.starts_factor() and not divided:
                tree = ("*", tree, self.power())
            else:
                return tree

    def starts_factor(self):
        kind, text = self.tokens[self.at]
        after_bracket = self.tokens[self.at - 1][1] in CLOSING.values()
        return kind in ("name", "function") or text in CLOSING or (kind == "number" and after_bracket)

    def factor(self):
        """A power with signs before it."""
        negative = False
        while sign := self.take("+", "-"):
            negative ^= sign == "-"
        return ("negative", self.power()) if negative else self.power()

    def power(self):
        tree = self.operand()
        if self.take("!"):
            tree = ("!", tree)
        return ("^", tree, self.exponent()) if self.take("^") else tree

    def exponent(self):
        if self.take("-"):
            return ("negative", self.exponent())
        tree = self.operand()
        return ("^", tree, self.exponent()) if self.take("^") else tree

    def operand(self):
        """A number, a name, a function with its arguments, or a sum in brackets."""
        kind, text = self.tokens[self.at]
        self.at += kind != "end"
        if kind == "number":
            return ("number", Fraction(text))
        if kind == "name":
            return ("name", text + self.subscript())
        if kind == "function":
            return self.function(text)
        if text not in CLOSING:
            self.fail()
        tree = self.sum()
        return tree if self.take(CLOSING[text]) else self.fail()

    def subscript(self):
        """_1 of x_1, or nothing."""
        if not self.take("_"):
            return ""
        self.at += 1
        return "_" + (self.tokens[self.at - 1][1] or self.fail())

    def function(self, name):
        r"""The arguments of a function: f(x), f^2(x), \frac43, \sqrt[3]{x}, \log_2 8, \sin 2x."""
        if name in ("frac", "binom"):
            return (CALLS[name], self.argument(), self.argument())
        if name == "sqrt" and self.take("["):
            index = self.sum()
            return ("^", self.operand() if self.take("]") else self.fail(), ("/", ("number", Fraction(1)), index))
        base = [self.operand()] if name == "log" and self.take("_") else []
        exponent = self.exponent() if self.take("^") else None
        if bracket := self.take("(", "{"):
            arguments = [self.sum()]
            while self.take(","):
                arguments.append(self.sum())
            self.take(CLOSING[bracket]) or self.fail()
        else:
            arguments = [self.operand() if name == "sqrt" else self.bare_argument()]
        if exponent == ("negative", ("number", 1)):
            name, exponent = f"a{name}", None  # \tan^{-1}
        arguments += base
        if name not in CALLS or len(arguments) not in ARGUMENTS.get(name, (1,)):
            self.fail()
        tree = (CALLS[name], *arguments)
        return ("^", tree, exponent) if exponent else tree

    def argument(self):
        r"""The argument of a LaTeX command: {...}, one digit as in \frac43, or one name."""
        kind, text = self.tokens[self.at]
        if kind == "number" and text.isdigit():
            self.tokens[self.at : self.at + 1] = [(kind, digit) for digit in text]
        return self.operand()

    def bare_argument(self):
        r"""2x in \sin 2x: a product of numbers, names, fractions and roots."""
        if self.tokens[self.at] not in PLAIN and self.tokens[self.at][0] not in ("number", "name"):
            self.fail()
        tree = self.power()
        while self.tokens[self.at] in PLAIN or self.tokens[self.at][0] == "name":
            tree = ("*", tree, self.power())
        if self.tokens[self.at][1] in ("/", "*", "!", *CLOSING) and self.tokens[self.at + 1][0] != "function":
            self.fail()
        return tree


PLAIN = [("function", "frac"), ("function", "sqrt")]  # what a function's argument without brackets may contain
ARGUMENTS = {"binomial": (2,), "comb": (2,), "log": (1, 2), "Fraction": (1, 2), "Rational": (1, 2)}  # else one

# ------------- Values


def evaluate(tree, names):
    """The number that a tree stands for, a Fraction or an mpmath number; names: the values of the names.

    Raises ValueError or ArithmeticError where there is none, or where it is out of range.
    """
    operation, *parts = tree
    if operation == "number":
        return parts[0]
    if operation == "name":
        return names[parts[0]]
    values = [evaluate(part, names) for part in parts]
    if operation == "negative":
        return -values[0]
    if operation not in EXACT or not all(isinstance(value, Fraction) for value in values):
        values = map(mp.convert, values)
    value = OPERATIONS[operation](*values)
    if isinstance(value, Fraction):
        in_range = max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
    else:
        value = mp.chop(value, tol=ROUNDING)
        in_range = not value or 1 / LARGEST < abs(value) < LARGEST
    if not in_range:
        raise Unreadable("out of range")
    return value


def variables(tree):
    """The names in a tree that are no constants, marks included."""
    if tree[0] == "name":
        return {tree[1]} - set(CONSTANTS)
    return set().union(*map(variables, tree[1:])) if tree[0] != "number" else set()


def values_at_points(prediction, gold, constants):
    """The values of two trees at six random points, the first three positive; at one point if there is no variable."""
    names = sorted((variables(prediction) | variables(gold)) - set(constants))
    generator = random.Random(0)
    for i in range(6 if names else 1):
        point = {name: Fraction(generator.randrange(-2_000_000 * (i > 2), 2_000_000), 1_000_003) for name in names}
        yield evaluate(prediction, constants | point), evaluate(gold, constants | point)


def close(a, b, allowed=0):
    """Whether two numbers differ by no more than allowed, or by rounding. Fractions have no rounding."""
    if a == b or (not allowed and isinstance(a, Fraction) and isinstance(b, Fraction)):
        return a == b
    a, b = mp.convert(a), mp.convert(b)
    return bool(abs(a - b) <= max(ROUNDING * max(abs(a), abs(b), 1), allowed) < mp.inf)


def is_real(number):
    return isinstance(number, Fraction) or not mp.im(number)


def same_value(prediction, gold, question):
    """Whether two Values agree, with the marks ° and % or without them: 90 is 90°, and so is pi/2."""
    if prediction.unit and gold.unit and prediction.unit != gold.unit:
        return False
    if same_number(prediction, gold, CONSTANTS | MARKS):
        return True
    needless = "percent" not in prediction.unit or "percent" in gold.unit or re.search("percent|per cent|%", question)
    without = [dataclasses.replace(value, tree=without_mark(value.tree)) for value in (prediction, gold)]
    return bool(needless) and same_number(*without, CONSTANTS | MARKS)


def without_mark(tree):
    """The tree of 90 for that of 90°; a mark inside a function stays."""
    return tree[1] if tree[0] == "*" and tree[2] in [("name", mark) for mark in MARKS] else tree


def same_number(prediction, gold, constants):
    """Whether two Values are equal at all points where one is real; if there are no variables, within a tolerance."""
    pairs = list(values_at_points(prediction.tree, gold.tree, constants))
    if len(pairs) == 1:
        return close(*pairs[0], tolerance(*pairs[0], max(prediction.step, gold.step), gold.step))
    real = [(a, b) for a, b in pairs if is_real(a) or is_real(b)]
    return all(close(a, b) for a, b in real or pairs)


def tolerance(a, b, step, gold_step):
    """How far apart two numbers may be if one is a decimal, with `step` in its last place; 0: it is none.

    A decimal stands for what rounds to it if it has six decimal places (as in Math-Verify) or seven digits.
    """
    if not step:
        return 0
    step, gold_step = mp.convert(step), mp.convert(gold_step)
    size = max(abs(mp.convert(a)), abs(mp.convert(b)))
    doubles = (size if b else 1) / 10**14
    if step * 999_999 > max(1, size):
        return doubles
    rounded = max(2 * size / 10**6, min(gold_step, size / 1000))  # GSM-Hard rounds to ten places: 3.509e-07
    return max(doubles, min(step / 2, rounded))


def proportional(prediction, gold):
    """Whether one tree with variables is a constant times the other: 2x - 4 is 2 times x - 2."""
    pairs = list(values_at_points(prediction, gold, CONSTANTS | MARKS))
    (a0, b0), *others = pairs
    return bool(others and a0 and b0) and all(close(a * b0, b * a0) for a, b in others)
