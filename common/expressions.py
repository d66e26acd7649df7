r"""Mathematical answers in LaTeX, plain text or Python's notation: one spelling, Python's syntax, a value.

    read(r"6\frac{1}{6}\text{ feet}")     # the unit "ft" and the ast of 6+1/6
    read("x = (1, 2]")                    # no unit, and Group("=", ("x", Group("(]", (1, 2))))

Nothing is passed to eval: ast.parse reads the text, and evaluate() allows only the operations listed here. Rational
values are exact (Fraction), others have 150 digits (mpmath). Expressions with variables are compared at six random
rational points, up to 2, 30 and 1,000: two different polynomials of degree d agree at one with a probability below
d / 10^6 (Schwartz 1980, Zippel 1979). They are real functions: a point where neither has a real value does not count,
so sqrt(1/n) is 1/sqrt(n), but sqrt(n^2) is not n. Lengths and powers are bounded.
"""

import ast
import contextlib
import dataclasses
import functools
import math
import operator
import random
import re
import string
import unicodedata
from decimal import Decimal
from fractions import Fraction

import mpmath

MAX_NODES = 1500  # of one answer: operations, numbers and names
MAX_BITS = 20_000  # of an exact numerator or denominator; 2^{4181} is a gold answer of MATH
MAX_FACTORIAL = 1000
SIZES = (2, 30, 1000)  # of the points at which expressions are compared
mp = mpmath.MPContext()  # a separate context, so that mpmath's global precision is not changed
mp.dps = 150
LARGEST = mp.mpf(10) ** 40  # of inexact numbers: beyond it and 1 / LARGEST, 150 digits might not tell two sums apart
ROUNDING = mp.mpf(10) ** -90  # smaller differences are errors of the 150-digit arithmetic
GSM_HARD = mp.mpf(10) ** -10 / 2  # GSM-Hard rounds its gold answers to ten places: 3.509e-07


@dataclasses.dataclass(frozen=True)
class Group:
    """Several nodes; a node is an expression (ast.expr) or a Group.

    kind: the brackets "()", "(]", "{}", ...; "∈()", "∈[]" if they can only be an interval; "" for a bare list, "json"
    for a Python list, "∪" for a union, ":" for a ratio; "=" for an equation or x ∈ [2, 5] (the name or expression on
    the left, the node on the right); "x, y" for the values of x = 1, y = 2, in the order of the names.
    """

    kind: str
    items: tuple


def is_group(node, *kinds):
    return isinstance(node, Group) and node.kind in kinds


# ------------- Operations and names


def power(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1
    bits = max(a.numerator.bit_length(), a.denominator.bit_length()) if exact else max(abs(mp.mag(a)), 1)
    if abs(b) * bits > MAX_BITS:
        raise ValueError("too large a power")
    return a ** int(b) if exact else mp.power(mp.convert(a), mp.convert(b))


def natural(number):
    """Returns the number as an int. Raises ValueError if it is no integer from 0 to MAX_FACTORIAL."""
    if not isinstance(number, Fraction) or number.denominator > 1 or not 0 <= number <= MAX_FACTORIAL:
        raise ValueError("a factorial of such a number")
    return int(number)


EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.MatMult: operator.mul}
EXACT |= {ast.Div: operator.truediv, ast.Pow: power, ast.USub: operator.neg, ast.UAdd: operator.pos}
EXACT |= {"abs": abs, "Abs": abs, "factorial": lambda n: Fraction(math.factorial(natural(n)))}
EXACT |= dict.fromkeys(["binomial", "comb"], lambda n, k: Fraction(math.comb(natural(n), natural(k))))
EXACT |= dict.fromkeys(["Fraction", "Rational"], lambda a, b=Fraction(1): a / b)
FUNCTIONS = {name: getattr(mp, name) for name in "sqrt cbrt sin cos tan cot sec csc exp log asin acos atan".split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log}
OPERATIONS = EXACT | FUNCTIONS | {"log10": mp.log10, "log2": lambda number: mp.log(number, 2)}
MARKS = {"percent": Fraction(1, 100), "degree": mp.pi / 180}
CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "E": +mp.e, "i": mp.mpc(0, 1), "I": mp.mpc(0, 1), "infty": mp.inf}
GREEK = "alpha beta gamma delta epsilon theta lambda mu phi varphi omega rho sigma tau".split()
# Names that sympy gives to sets: the kind of Group
CONTAINERS = {"Interval": "∈[]", "Interval.open": "∈()", "Interval.Lopen": "(]", "Interval.Ropen": "[)"}
CONTAINERS |= {"Union": "∪", "FiniteSet": "{}"}
CALLS = [name for name in [*OPERATIONS, *CONTAINERS] if isinstance(name, str)]

# ------------- One spelling for each thing

SPELLINGS = {  # our spelling: other spellings; one that ends in a letter matches only at the end of a word
    **{"*": r"\cdot \times × · ⋅", "/": r"\div ÷ ⁄", "-": "− – ‐ ‑", "^": "**", "=": "==", "∈": r"\in"},
    **{"≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "<": r"\lt", ">": r"\gt"},
    **{"≈": r"\approx", "∪": r"\cup", "±": r"\pm", " or ": r"\lor \vee ∨", "|": r"\vert \lvert \rvert \mid"},
    **{r"\infty ": "∞ oo inf infinity Infinity", r"\pi ": "π", r"\sqrt ": "√", r"\frac": r"\dfrac \tfrac \cfrac"},
    **{"$": r"\$", "{": r"\{ \lbrace", "}": r"\} \rbrace", "(": r"\langle ⟨", ")": r"\rangle ⟩"},
    **{"{}": r"\emptyset \varnothing ∅ EmptySet set()", r"\binom": r"\dbinom \tbinom", "\\\\": "\\\\"},
    **{rf"\{name} ": letter for name, letter in zip(GREEK, "αβγδεθλμφϕωρστ", strict=True)},
    **{" degree ": r"^\circ ^{\circ} ° degrees deg", " percent ": r"\% %"},
    **{r"\text": r"\textbf \textit \textrm \textnormal \mbox \mathrm \mathbf \operatorname"},
    " ": r"\left \right \boxed \displaystyle \large \Large \rm \bf \quad \qquad \, \; \: \! ~ \( \) \[ \] "
    r"\big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \boldsymbol \underline",
}
SPELLINGS = {old: new for new, spellings in SPELLINGS.items() for old in spellings.split()} | {"\\ ": " "}
LETTERS = string.ascii_letters
SPELLING = re.compile(
    "|".join(
        r"(?<![a-zA-Z\\])" * (old[0] in LETTERS) + re.escape(old) + "(?![a-zA-Z])" * (old[-1] in LETTERS)
        for old in sorted(SPELLINGS, key=len, reverse=True)
    )
)
TYPES = r"u?int|float|complex(?=\d)|str|bool|Integer|Float|Decimal|mpf|mpc|array|(?:ImmutableDense)?Matrix"
TYPES += "|Tuple|Point(?:2D)?|tensor|(?:frozen)?set"
MATRIX = r"\[?\s*\\begin\s*\{([pbB]?matrix|array)\}(?:\s*\{[lcr|]*\})?(.*?)\\end\s*\{\1\}\s*\]?"
MIXED_NUMBER = r"(?<![\w.^})/*!])(?<![a-z] )(\d+)(?: ?\\frac ?\{?(\d+)\}? ?\{?(\d+)\}?| (\d+)/(\d+))(?!\d)"
UPRIGHT = "|".join([*FUNCTIONS, *MARKS, r"\\?pi", "i", "e"])  # these are no units in \text{}
CLEANING = [  # (pattern, replacement, example, what becomes of it), in this order
    (r"^\$+((?:\\\$|[^$])+)\$+$", r"\1", "$5$", "5"),
    # Pandoc's rule: a closing $ follows no space, and no digit follows it
    (r"(?<!\\)\$(?=\S)((?:\\\$|[^$])*?(?<=\S))\$(?!\d)", r"\1", "$x=5$ or $x=6$", "x=5 or x=6"),
    (r"\\\\\s*\[-?[\d.]+\s*[a-z]{2}\]", r"\\\\", r"1 \\[6pt] 2", r"1 \\ 2"),
    (r"(?<=\d)(?:,\\!\s*|\{,\}|\\,|\\ )(?=\d{3}(?!\d))", "", r"10,\!080", "10080"),
    (r"\b(?:np|numpy|sympy|math|mpmath|fractions|decimal)\.(?=[a-zA-Z])", "", "np.array([1])", "array([1])"),
    (rf"\b(?:{TYPES})\d*_?(?=\((?!\)))|,\s*dtype=[^()]*(?=\))", "", "[int64(1), Decimal('0.5')]", "[(1), ('0.5')]"),
    (r"(?<![\w)\]])(['\"])([^'\"]*)\1", r"\2", "['A', '1/2']", "[A, 1/2]"),
    (r"^Eq\((.*), (.*)\)$", r"\1 = \2", "Eq(y, 2*x)", "y = 2*x"),
    (r"_\s*\{(\w+)\}", r"_\1 ", r"\log_{2}3", r"\log_2 3"),
    (r"[⁰¹²³⁴-⁹⁻ⁿ]+", lambda found: f"^({plain(found[0])})", "x²³", "x^(23)"),
    (r"[½⅓⅔¼¾⅛]", lambda found: f" {plain(found[0])}", "2½", "2 1/2"),
    (SPELLING, lambda found: SPELLINGS[found[0]], r"2 \times \dfrac12", r"2 * \frac12"),
    (r"^\s*[a-zA-Z]?\s*≈|(?<=.)≈(?:(?!\b(?:or|and)\b)[^,;]|,\d{3}(?!\d))*", "", "x ≈ 3.46", " 3.46"),
    (rf"\\text\s*\{{\s*({UPRIGHT})\s*\}}", r" \1 ", r"3+4\text{i}", "3+4 i "),
    (r"\\text\s*\{([^{}a-zA-Z]*(?:and|or)?[^{}a-zA-Z]*)\}", r" \1 ", r"\text{5 or 6}", " 5 or 6 "),
    (r"\|([^|]+)\|(?! *[(\[{])", r"abs(\1)", "2|x|", "2abs(x)"),
    (MATRIX, lambda found: rows(found[2]), r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]"),
    (r"\(([^()<>≤≥]+[<≤]) (\w)\) & \(\2 ([<≤][^()<>≤≥]+)\)", r"\1 \2 \3", "(2 ≤ x) & (x < 5)", "2 ≤ x < 5"),
    (r"(?<=[)\]}])\s*[U|]\s*(?=[(\[{])", "∪", "(1, 2) U (3, 4)", "(1, 2)∪(3, 4)"),
    (r"^(.*[<>≤≥].*)\bor\b(.*[<>≤≥].*)$", r"(\1)∪(\2)", "x<2 or x>3", "(x<2 )∪( x>3)"),
    (r",?\s*\b(?:and|or)\b", ",", "5, 6, and 7", "5, 6, 7"),
    (r"\s+", " ", "1\n +  2", "1 + 2"),
    (MIXED_NUMBER, r"(\1+\2\4/\3\5)", r"1\frac45, 2 1/2", "(1+4/5), (2+1/2)"),
    (r"^[^a-df-ik-zA-Z]*$", lambda found: re.sub(r"(?<=[\d.])j", "i", found[0]), "(6-5j)", "(6-5i)"),
]


def plain(text):
    """Returns superscripts and fractions of one character as plain text: 2⁻³ is 2-3, ½ is 1/2."""
    return unicodedata.normalize("NFKC", text).replace("⁄", "/").replace("−", "-")


def rows(text):
    """Returns the rows of a LaTeX matrix as a list of lists."""
    return "[" + ",".join(f"[{row.replace('&', ',')}]" for row in text.split("\\\\") if row.strip()) + "]"


CLOSING_POINT = re.compile(r"(?<![.\s])\s*\.$")  # but 0.333... is no decimal


@functools.lru_cache(1000)
def clean(text):
    """Returns the text without delimiters, closing points and thousands separators, and with one spelling per symbol.

    A matrix becomes [[a,b],[c,d]], as sympy prints it.
    """
    text = CLOSING_POINT.sub("", text.strip())
    for pattern, replacement, *_ in CLEANING:
        text = re.sub(pattern, replacement, text).strip()
    text = CLOSING_POINT.sub("", text)
    if not re.search(r"[(\[]|(?<!\\text)\{", text):  # between brackets, a comma separates two numbers
        text = re.sub(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return text


# ------------- Units

UNIT = re.compile(  # at the end of an answer: \text{ cm}^2, square inches, km/h, percent
    rf"""(?x) (?<=[\w)\]}}]) ( (?: \s*\\text\s*\{{[^{{}}]*\}}
      | \s+(?!(?:{"|".join([*MARKS, *FUNCTIONS])})[a-zA-Z]?\b)  # no function, with its argument or without
        (?:[a-zA-Z]{{4,}}|per|cm|mm|km|kg|in|ft|mph|sq|USD|(?i:[ap]\.?m))
        \b\.?(?:/[a-z]+)? )+ (?:\s*\^\s*[({{]?\d[)}}]?)? | \s*(?:percent|degree) )$"""
)
NOT_UNITS = re.compile(  # digits, and words that change the value before them: "5 factorial" is not 5 with a unit
    r"(?<!\^)\d|\b(squared|cubed|factorial|mod|modulo|plus|minus|times|over|base|not|more|less|least|most|to|from|if|"
    r"when|unless|except|above|below|negative|hal(f|ves)|(third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|"
    r"tenth|eleventh|twelfth|[a-z]+teenth|[a-z]+tieth|hundredth|thousandth|millionth|billionth)s?|repeat(s|ing|ed)|"
    r"recurring|periodic|doubled|halved|[a-z]+pled|minimum|maximum|root|radical|choose|point|permille|(in)?correct|"
    r"wrong|one|two|three|four|five|six|seven|eight|nine|ten|for|th|k|mil|pairs?|dozens?|scores?|gross|lakhs?|crores?|"
    r"hundreds?|thousands?|[mbtr]illions?|quadrillions?)\b"
)
UNITS = {"centimeter": "cm", "millimeter": "mm", "kilometer": "km", "meter": "m", "kilogram": "kg", "gram": "g"}
UNITS |= {"inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "usd": "dollar", "mph": "mile/hour", "h": "hour"}
UNITS |= {"lbs": "lb", "pound": "lb", "cms": "cm", "kms": "km", "hrs": "hour", "hr": "hour", "min": "minute"}
UNITS |= {"second": "s", "sec": "s"}


def split_unit(text):
    r"""Returns a cleaned text without its unit, and the unit in one spelling: \text{ square inches} is in^2."""
    text, dollars = re.subn(r"(^|= ?)(-?)\$", r"\1\2", text)
    found = UNIT.search(text)
    words = re.sub(r"\^\s*[({]?(\d)", r"^\1", found[1].lower()) if found else ""
    if NOT_UNITS.search(words):
        raise ValueError(f"{words!r} after a value")
    words = re.sub(r"\s+per\s+", "/", words.replace("metre", "meter"))
    words = re.sub(r"\\text|(?<=[a-z]{3})s\b|[^a-z^\d/ ]", "", words)  # cm^{2} is cm^2, hours are an hour
    if re.fullmatch(r"\s*[^mghlcfsCFL\s]\s*", re.sub(r"\\text|[{}]", "", found[1] if found else "")):  # 5\text{k}
        raise ValueError(f"{words!r} after a value")
    words = re.sub(r"[a-z]+", lambda match: UNITS.get(match[0], match[0]), words).replace(" ", "")
    words = re.sub(r"^sq(?:uare)?(.*)", r"\1^2", words)
    return text if words in ("", *MARKS) else text[: found.start()], "dollar" * dollars + words


# ------------- Python's syntax

NESTED = r"[^()\[\]]*+"  # the text between two brackets
for _ in range(5):
    NESTED = rf"(?:[^()\[\]]++|\({NESTED}\))*+"
FUNCTION = r"(?:\\|(?<![a-zA-Z\\]))(" + "|".join(sorted(FUNCTIONS, key=len, reverse=True)) + r")(?![a-zA-Z])"
SHORT = r"\s*(\d|[a-zA-Z]|\\[a-zA-Z]+)"  # an argument of a LaTeX command, without braces
BARE = rf"((?:\s*+(?:\d++(?: degree)?|[a-zA-Z](?![a-zA-Z])|\\(?:pi|{'|'.join(GREEK)})(?![a-zA-Z])))++)"
BARE += rf"(?=\s*(?:[-+=<>≤≥,)\]}}]|$|{FUNCTION}))"
REWRITES = [  # (pattern, replacement, example, what becomes of it); repeated, from the inside out
    (r"\\sqrt\s*(?:\{([^{}]*)\}|(\d+|[a-zA-Z]))", r" sqrt(\1\2)", r"\sqrt3", " sqrt(3)"),
    (r"\\sqrt\s*\[([^][]*)\]\s*\{([^{}]*)\}", r"((\2)^(1/(\1)))", r"\sqrt[3]{x}", "((x)^(1/(3)))"),
    (rf"\\(frac|binom){SHORT}", r"\\\1{\2}", r"\frac43", r"\frac{4}3"),
    (rf"(\\(?:frac|binom)\s*\{{[^{{}}]*\}}){SHORT}", r"\1{\2}", r"\frac{4}3", r"\frac{4}{3}"),
    (r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"((\1)/(\2))", r"\frac{4}{3}", "((4)/(3))"),
    (r"\\binom\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r" binomial(\1,\2)", r"\binom{4}{3}", " binomial(4,3)"),
    (r"([\^_])\s*\{([^{}]*)\}", r"\1(\2)", "x^{2}", "x^(2)"),
    (rf"{FUNCTION}\s*\^\(-1\)", r" a\1", r"\sin^(-1)", " asin"),
    (rf"{FUNCTION}(\^(?:\w|\(\w+\))|_\w+)?(?:\s*\{{([^{{}}]*)\}}|{BARE})", r" \1\2(\3\4)", r"\sin^2 x", " sin^2( x)"),
    (rf"{FUNCTION}(\^(?:\w|\(\w+\)))\s*\(({NESTED})\)", r" (\1(\3))\2", r"sin^2(x)", r" (sin(x))^2"),
    (rf"((?<![\d.])\d+|(?<![a-zA-Z])[a-zA-Z]|\({NESTED}\))!(?!=)", r" factorial(\1)", "5!", " factorial(5)"),
    (rf"\\?log_(\w+)\s*\(({NESTED})\)", r" log(\2,\1)", r"\log_2(8)", " log(8,2)"),
    (rf"(?<!\w)\(({NESTED})\]", r" Interval.Lopen(\1)", "(1,2]", " Interval.Lopen(1,2)"),
    (rf"\[({NESTED})\)", r" Interval.Ropen(\1)", "[1,2)", " Interval.Ropen(1,2)"),
]
LABEL = re.compile(  # what may precede "=" besides a name, and be left out
    r"(?:^|(?<=[,{(\[])|(?<=, ))("
    r"\([a-z]\w*(?:, ?[a-z]\w*)+\)|[a-z](?:\^\(-1\))?\([a-z]\)|"  # (x, y), f(x); then P(A), Area, {mean: 5}
    r"[A-Z]+\([^()=]*(?:=[^()]*)?\)|[A-Z][A-Za-z]+|\\text ?\{[^{}]*\}|[a-z]{4,}(?=:))(?= ?[=∈:])"
)
TOKEN = re.compile(
    rf"""(?x) (?P<name> label_\w+ | (?:\d[\dA-Z]*|[A-Z]\d[\dA-Z]*)_\d+ | [a-zA-Z]_(?:\d+|[a-zA-Z]+) )  # 4210_5, x_1
      | (?P<call> \\?(?:{"|".join(map(re.escape, sorted(CALLS, key=len, reverse=True)))})(?=\s*\() )
      | (?P<number> (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{{1,3}}(?!\d*[.^]))? ) | \\?[a-zA-Z]+"""
)
# Between a value and a name or bracket: a product, which has a sign of its own because 1/ab is ambiguous.
PRODUCT = re.compile(r"(?<=[a-zA-Z\d]) +(?=[a-zA-Z(\[{])|(?<=[)\]}]) *(?=[\w(\[{])")
AMBIGUOUS = re.compile(rf"/ *(?:[a-zA-Z]\w*|\w* *\({NESTED}\)) *@")
SIGNS = {"^": "**", "=": "==", "∈": " in ", "≤": "<=", "≥": ">=", ";": ",", "∪": "|"}


def to_python(text):
    r"""Returns a cleaned text in Python's syntax: \frac{1}{2}x^2 is ((1)/(2))@x**2; @ is a product without a sign."""
    before = None
    while text != before:
        before = text
        for pattern, replacement, *_ in REWRITES:
            text = re.sub(pattern, replacement, text)
    text = LABEL.sub(lambda match: "label_" + re.sub(r"\W", "_", match[0]) + "x", text)
    text = PRODUCT.sub("@", TOKEN.sub(lambda match: f" {python_token(match.lastgroup, match[0])} ", text))
    if AMBIGUOUS.search(text):
        raise ValueError("what may be 1/(ab) or b/a")
    return re.sub(r"(?<=[\d)])\s*:", "<<", text).translate(str.maketrans(SIGNS))


def python_token(kind, token):
    """Returns the Python text of a token. xy is a product of two names, AB is a name; a call ends in an underscore."""
    name = token.lstrip("\\")
    if kind == "call":
        return name.replace(".", "_") + "_"
    if kind == "name":
        return f"base_{token}" if token[0].isdigit() else token
    if kind == "number":
        return re.sub(r"^0+(?=\d)", "", token)
    if name in CONSTANTS or name in MARKS or name in GREEK or (name == token and name.isupper()):
        return name.replace("lambda", "lamda")
    if name != token or len(name) > 3:
        raise ValueError(f"the word {token!r}")
    return " ".join(name)


# ------------- From Python's syntax to nodes

BRACKETS = {ast.Tuple: "()", ast.List: "[]", ast.Set: "{}"}
MIRRORED = {ast.Gt: ast.Lt, ast.GtE: ast.LtE}
INFINITY = ast.Name("infty")
MINUS_INFINITY = ast.UnaryOp(ast.USub(), INFINITY)


def read(value):
    """Returns the unit and the node of a JSON value or a text. Raises what ast.parse raises, or ValueError."""
    if isinstance(value, list):
        items = list(map(read, value))
        return "".join({unit for unit, _ in items}), group("json", [node for _, node in items])
    if isinstance(value, dict):
        return "", group("{}", [Group("=", (str(name), read(item)[1])) for name, item in value.items()])
    text, unit = split_unit(clean(str(value)))
    if re.search("±[^,]*±", text):
        raise ValueError("two signs ± in one answer")
    if "±" in text:  # two answers for each
        text = re.sub(r"^\{(.*)\}$", r"\1", text)
        trees = parse(text.replace("±", "+"))
        others = parse(text.replace("±", "-"))
        trees += [tree for tree in others if ast.unparse(tree) not in map(ast.unparse, trees)]
    else:
        trees = parse(text)
    return unit, group("", map(node, trees))


def parse(text):
    """Returns the ast nodes of the items of an answer."""
    answer = ast.parse(f"({to_python(text)},)", mode="eval").body
    if not isinstance(answer, ast.Tuple) or sum(1 for _ in ast.walk(answer)) > MAX_NODES:
        raise ValueError("brackets that do not match, or too long an answer")
    return answer.elts


def node(tree):
    """Returns the node of an answer in Python's syntax."""
    match tree:
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return group(BRACKETS[type(tree)], map(node, items))
        case ast.Dict(keys=names, values=items):
            return group("{}", [relation([a, b], [ast.Eq]) for a, b in zip(names, items, strict=True)])
        case ast.BinOp(left=left, op=ast.BitOr() | ast.LShift() as op, right=right):
            kind = "∪" if isinstance(op, ast.BitOr) else ":"
            left = node(left)
            return Group(kind, (*(left.items if is_group(left, kind) else [left]), node(right)))
        case ast.Compare(left=left, ops=signs, comparators=sides):
            return relation([left, *sides], list(map(type, signs)))
        case ast.Call(func=ast.Name(id=name), args=items) if kind := CONTAINERS.get(name[:-1].replace("_", ".")):
            return group(kind, map(node, items))
    return tree


def relation(sides, signs):
    """Returns the Group of an equation, or of an inequality of one name: the interval where it holds."""
    if signs in ([ast.Eq], [ast.In]):
        left, right = sides[0], node(sides[1])
        if signs == [ast.In] and is_group(right, "()", "[]"):
            right = Group("∈" + right.kind, right.items)
        return Group("=", (left.id if isinstance(left, ast.Name) else left, right))
    if signs[0] in MIRRORED:
        sides, signs = sides[::-1], [MIRRORED.get(sign) for sign in signs[::-1]]
    if len(signs) == 1 and isinstance(sides[0], ast.Name):
        sides, signs = [MINUS_INFINITY, *sides], [ast.Lt, *signs]
    elif len(signs) == 1:
        sides, signs = [*sides, INFINITY], [*signs, ast.Lt]
    if len(signs) > 2 or not set(signs) <= {ast.Lt, ast.LtE} or not isinstance(sides[1], ast.Name):
        raise ValueError("an inequality")
    kind = ("∈(" if signs[0] is ast.Lt else "∈[") + (")" if signs[1] is ast.Lt else "]")
    return Group("=", (sides[1].id, group(kind, [node(sides[0]), node(sides[2])])))


def group(kind, items):
    """Returns a Group, or a single item alone unless it is a row or an interval."""
    items = list(items)
    if len(items) == 1 and not (kind and is_group(items[0], "json", "∪", ":", "[]", "(]", "[)")):
        return items[0]
    if kind == "[]" and any(isinstance(item, Group) for item in items):
        kind = "json"  # the list that a program printed
    ends = [ast.unparse(item) for item in items if isinstance(item, ast.AST)] or [""]
    if ends[0] == "-infty":
        kind = kind.replace("[", "(")
    if ends[-1] == "infty":
        kind = kind.replace("]", ")")
    names = [item.items[0] for item in items if is_group(item, "=") and isinstance(item.items[0], str)]
    if len(names) == len(items) and len({name.partition("_")[0] for name in names}) > 1:  # x_1 = 1, x_2 = 2 is a list
        items = [item.items[1] for item in sorted(items, key=lambda item: item.items[0])]
        kind = ", ".join(sorted(names))
    return Group(kind.removeprefix("∈") if kind in ("∈(]", "∈[)") else kind, tuple(items))


# ------------- Values


def evaluate(tree, names):
    """Returns the value of a tree, a Fraction or an mpmath number. names: the values of the names.

    Raises ValueError or ArithmeticError if it has none, or if it is out of range.
    """
    match tree:
        case ast.Constant(value=int(value) | float(value)):
            return Fraction(str(value))
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Set(elts=[part]) | ast.List(elts=[part]):
            return evaluate(part, names)
        case ast.BinOp(left=left, op=op, right=right):
            operation, parts = type(op), [left, right]
        case ast.UnaryOp(op=op, operand=part):
            operation, parts = type(op), [part]
        case ast.Call(func=ast.Name(id=name), args=parts, keywords=[]):
            operation = name[:-1]
        case _:
            raise ValueError("no value")
    if operation not in OPERATIONS:
        raise ValueError("no value")
    values = [evaluate(part, names) for part in parts]
    if operation not in EXACT or not all(isinstance(value, Fraction) for value in values):
        values = map(mp.convert, values)
    value = OPERATIONS[operation](*values)
    if isinstance(value, Fraction):
        in_range = max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
    elif operation in (ast.USub, ast.UAdd):
        return value
    else:
        value = mp.chop(value, tol=ROUNDING)
        in_range = not value or 1 / LARGEST < abs(value) < LARGEST
    if not in_range:
        raise ValueError("out of range")
    return value


def variables(tree):
    """Returns the names in a tree that are neither constants nor functions; marks are included."""
    names = {part.id for part in ast.walk(tree) if isinstance(part, ast.Name)}
    return {name for name in names - set(CONSTANTS) if name[-1] != "_"}


def values_at_points(prediction, gold):
    """Yields the values of two trees at six random points, the first three positive; once if there is no variable.

    |x - 3| is 3 - x below 3, so points have three sizes; a large one, where a power is out of range, does not count.
    """
    names = sorted((variables(prediction) | variables(gold)) - set(MARKS))
    generator = random.Random(0)
    for i, size in enumerate(SIZES * 2 if names else SIZES[:1]):
        least = -1_000_000 * (i >= len(SIZES))
        point = {name: Fraction(size * generator.randrange(least, 1_000_000), 1_000_003) for name in names}
        point |= CONSTANTS | MARKS
        with contextlib.suppress(*([] if size == SIZES[0] else [ValueError, ArithmeticError])):
            yield evaluate(prediction, point), evaluate(gold, point)


def close(a, b, allowed=0):
    """Returns whether two numbers differ by no more than allowed, or by rounding. Fractions have no rounding."""
    if a == b or (not allowed and isinstance(a, Fraction) and isinstance(b, Fraction)):
        return a == b
    a, b = mp.convert(a), mp.convert(b)
    return bool(abs(a - b) <= max(ROUNDING * max(abs(a), abs(b), 1), allowed) < mp.inf)


def same_value(prediction, gold, question):
    """Returns whether two expressions agree, with the marks ° and % or without them: 90 is 90°, and so is pi/2."""
    if same_number(prediction, gold):
        return True
    if "percent" in variables(prediction) - variables(gold) and not re.search("percent|per cent|%", question):
        return False
    return same_number(without_mark(prediction), without_mark(gold))


def without_mark(tree):
    """Returns the tree of 90 for that of 90°; a mark inside a function is kept."""
    match tree:
        case ast.BinOp(left=number, op=ast.MatMult(), right=ast.Name(id="percent" | "degree")):
            return number
    return tree


def same_number(prediction, gold):
    """Returns whether two trees are equal at all points where one is real; without variables, within a tolerance.

    A decimal equals the numbers that round to it if it has six decimal places (as in Math-Verify) or seven digits.
    """
    pairs = list(values_at_points(prediction, gold))
    real = [(a, b) for a, b in pairs if not (mp.im(a) and mp.im(b))]
    step = max(last_place(prediction), last_place(gold))
    if len(pairs) > 1 or not step:
        return all(close(a, b) for a, b in real or pairs)
    a, b = map(mp.convert, pairs[0])
    size = max(abs(a), abs(b))
    allowed = (size if b else 1) / 10**14  # the error of a few operations on Python's floats
    if step * 999_999 <= max(1, size):  # six decimal places or seven digits: half a unit in the last place
        allowed = max(allowed, min(step / 2, max(2 * size / 10**6, min(GSM_HARD, size / 1000))))
    return close(a, b, allowed)


def last_place(tree):
    """Returns one unit in the last place of a decimal; 0 for other trees."""
    match without_mark(tree):
        case ast.Constant(value=float(value)) | ast.UnaryOp(operand=ast.Constant(value=float(value))) if value % 1:
            return mp.mpf(10) ** Decimal(str(value)).as_tuple().exponent
        case ast.BinOp(left=real, op=ast.Add() | ast.Sub(), right=ast.BinOp(left=part, right=ast.Name(id="i" | "I"))):
            return max(last_place(real), last_place(part))
    return mp.mpf(0)


def same_equation(prediction, gold):
    """Returns whether the differences of the two sides are proportional: 2x - 4 = 0 is x = 2."""
    sides = [*prediction.items, *gold.items]
    if any(isinstance(side, Group) for side in sides) or (isinstance(sides[0], str) and isinstance(sides[2], str)):
        return False
    left, right, gold_left, gold_right = (ast.Name(side) if isinstance(side, str) else side for side in sides)
    differences = ast.BinOp(left, ast.Sub(), right), ast.BinOp(gold_left, ast.Sub(), gold_right)
    (a0, b0), *others = values_at_points(*differences)
    return bool(others and a0 and b0) and all(close(a * b0, b * a0) for a, b in others)
