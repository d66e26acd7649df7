r"""Mathematical answers in LaTeX, plain text or Python's notation: one spelling, Python's syntax, a value.

    read(r"6\frac{1}{6}\text{ feet}")     # Value(tree of (6+1/6), unit="ft")
    read("x = (1, 2]")                    # Group("=", ("x", Group("(]", (Value(...), Value(...)))))

Nothing is passed to eval: ast.parse reads the text, and evaluate() allows only the operations listed here. Rational
values are exact (Fraction), others have 150 digits (mpmath). Expressions with variables are compared at six random
rational points: two different polynomials of degree d agree at one with a probability below d / 10^6 (Schwartz 1980,
Zippel 1979). They are real functions: a point where neither has a real value does not count, so sqrt(1/n) is 1/sqrt(n),
but sqrt(n^2) is not n. Lengths and powers are bounded: an answer beyond the bounds is Unreadable, and never right.
"""

import ast
import dataclasses
import functools
import math
import operator
import random
import re
from decimal import Decimal
from fractions import Fraction

import mpmath

MAX_NODES = 1500  # of one answer: operations, numbers and names
MAX_BITS = 20_000  # of an exact numerator or denominator; 2^{4181} is a gold answer of MATH
MAX_FACTORIAL = 1000
mp = mpmath.MPContext()  # a separate context, so that mpmath's global precision is not changed
mp.dps = 150
LARGEST = mp.mpf(10) ** 40  # of inexact numbers: beyond it and 1 / LARGEST, 150 digits might not tell two sums apart
ROUNDING = mp.mpf(10) ** -90  # smaller differences are errors of the 150-digit arithmetic


class Unreadable(ValueError):
    """The text cannot be read as an answer, or its value is out of range."""


@dataclasses.dataclass(frozen=True)
class Value:
    """An expression. unit: the words and the mark after it. step: one unit in the last place of a decimal, or 0."""

    tree: ast.expr
    unit: str = ""
    step: Fraction = Fraction(0)


@dataclasses.dataclass(frozen=True)
class Group:
    """Several nodes; a node is a Value or a Group.

    kind: the brackets "()", "(]", "{}", ...; "" for a bare list, "json" for a Python list, "∪" for a union, ":" for a
    ratio; "=" for an equation (the name or tree on its left side, the node of its right side); "∈" for a name, or "",
    and an interval: x < 2.
    """

    kind: str
    items: tuple


# ------------- Operations and names


def power(a, b):
    exact = isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1
    bits = max(a.numerator.bit_length(), a.denominator.bit_length()) if exact else max(abs(mp.mag(a)), 1)
    if abs(b) * bits > MAX_BITS:
        raise Unreadable("too large a power")
    return a ** int(b) if exact else mp.power(mp.convert(a), mp.convert(b))


def natural(number):
    """Returns the number as an int. Raises Unreadable if it is no integer from 0 to MAX_FACTORIAL."""
    if not isinstance(number, Fraction) or number.denominator > 1 or not 0 <= number <= MAX_FACTORIAL:
        raise Unreadable("a factorial of such a number")
    return int(number)


EXACT = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
EXACT |= {ast.Pow: power, ast.USub: operator.neg, ast.UAdd: operator.pos, "abs": abs, "Abs": abs}
EXACT |= dict.fromkeys(["Fraction", "Rational"], lambda a, b=Fraction(1): a / b)
EXACT |= {"factorial": lambda n: Fraction(math.factorial(natural(n)))}
EXACT |= dict.fromkeys(["binomial", "comb"], lambda n, k: Fraction(math.comb(natural(n), natural(k))))
FUNCTIONS = {name: getattr(mp, name) for name in "sqrt cbrt sin cos tan cot sec csc exp log asin acos atan".split()}
FUNCTIONS |= {"arcsin": mp.asin, "arccos": mp.acos, "arctan": mp.atan, "ln": mp.log}
OPERATIONS = EXACT | FUNCTIONS
CALLS = [name for name in OPERATIONS if isinstance(name, str)]
CONSTANTS = {"pi": +mp.pi, "e": +mp.e, "E": +mp.e, "i": mp.mpc(0, 1), "I": mp.mpc(0, 1), "infty": mp.inf}
MARKS = {"percent": Fraction(1, 100), "degree": mp.pi / 180}
GREEK = "alpha beta gamma delta epsilon theta lambda mu phi varphi omega rho sigma tau".split()
# Names that sympy and numpy give to sets and rows: the kind of Group
CONTAINERS = {"Interval": "[]", "Interval.open": "()", "Interval.Lopen": "(]", "Interval.Ropen": "[)"}
CONTAINERS |= {"Eq": "=", "Union": "∪", "FiniteSet": "{}", "Tuple": "()", "Point2D": "()"}
CONTAINERS |= dict.fromkeys(["array", "Matrix", "ImmutableDenseMatrix", "list", "tuple", "set", "frozenset"], "json")

# ------------- One spelling for each thing

SPELLINGS = {  # our spelling: other spellings; one that ends in a letter matches only at the end of a word
    **{"*": r"\cdot \times × · ⋅", "/": r"\div ÷", "-": "− –", "^": "**", "^2": "²", "^3": "³", "=": "==", "∈": r"\in"},
    **{"≤": r"\le \leq \leqslant <=", "≥": r"\ge \geq \geqslant >=", "<": r"\lt", ">": r"\gt"},
    **{"≈": r"\approx", "| ": r"\cup ∪", "±": r"\pm", " or ": r"\lor \vee ∨", "|": r"\vert \lvert \rvert \mid"},
    **{r"\infty ": "∞ oo inf infinity Infinity", r"\pi ": "π", r"\sqrt ": "√", r"\frac": r"\dfrac \tfrac \cfrac"},
    **{"$": r"\$", "$-": r"-\$ -$", "{": r"\{ \lbrace", "}": r"\} \rbrace"},
    **{"{}": r"\emptyset \varnothing ∅ EmptySet set()", "(": r"\langle ⟨", ")": r"\rangle ⟩"},
    **{" degree ": r"^\circ ^{\circ} ° degrees deg", " percent ": r"\% %", r"\binom": r"\dbinom \tbinom"},
    **{r"\text": r"\textbf \textit \textrm \textnormal \mbox \mathrm \mathbf \operatorname", "\\\\": "\\\\"},
    **{" ": r"\left \right \boxed \displaystyle \quad \qquad \, \; \: \! ~ \( \) \[ \]"},
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
    (r"\b(?:np|numpy|sympy|math|mpmath|fractions|decimal)\.(?=[a-zA-Z])", "", "np.array([1])", "array([1])"),
    (rf"\b(?:{SCALARS})\d*_?(?=\()|,\s*dtype=[^()]*(?=\))", "", "[int64(1), Decimal('0.5')]", "[(1), ('0.5')]"),
    (r"_\s*\{(\w+)\}", r"_\1", "52_{8}", "52_8"),
    (r"\\text\s*\{([^{}]*)\}(?=_)", r"\1", r"\text{A5}_11", "A5_11"),
    (SPELLING, lambda found: SPELLINGS[found[0]], r"2 \times \dfrac12", r"2 * \frac12"),
    (rf"\\text\s*\{{\s*({'|'.join([*CALLS, *MARKS])})\s*\}}", r" \1 ", r"5\text{ percent}", "5 percent "),
    (r"\\text\s*\{([^{}a-zA-Z]*(?:and|or)?[^{}a-zA-Z]*)\}", r" \1 ", r"\text{5 or 6}", " 5 or 6 "),
    (r"\|([^|]+)\|(?! *[(\[{])", r"abs(\1)", "2|x|", "2abs(x)"),
    (MATRIX, lambda found: rows(found[2]), r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "[[1,2],[3,4]]"),
    (r"\(([^()<>≤≥]+[<≤]) (\w)\) & \(\2 ([<≤][^()<>≤≥]+)\)", r"\1 \2 \3", "(2 ≤ x) & (x < 5)", "2 ≤ x < 5"),
    (r"(?<=[)\]}])\s*U\s*(?=[(\[{])", "|", "(1, 2) U (3, 4)", "(1, 2)|(3, 4)"),
    (r",\s*(?:and|or)\b", ",", "5, 6, and 7", "5, 6, 7"),
    (r"\s+", " ", "1\n +  2", "1 + 2"),
    (MIXED_NUMBER, r"(\1+\2\4/\3\5)", r"1\frac45, 2 1/2", "(1+4/5), (2+1/2)"),
    (r"^[^a-df-ik-zA-Z]*$", lambda found: re.sub(r"(?<=[\d.])j", "i", found[0]), "(6-5j)", "(6-5i)"),
]


def rows(text):
    """Returns the rows of a LaTeX matrix as a list of lists."""
    return "[" + ",".join(f"[{row.replace('&', ',')}]" for row in text.split("\\\\") if row.strip()) + "]"


@functools.lru_cache(1000)
def clean(text):
    """Returns the text without delimiters, closing points and thousands separators, and with one spelling per symbol.

    A matrix becomes [[a,b],[c,d]], as sympy prints it.
    """
    text = text.strip().rstrip(" .")
    for pattern, replacement, *_ in CLEANING:
        text = re.sub(pattern, replacement, text).strip()
    text = text.rstrip(" .")
    if not re.search(r"[(\[]|(?<!\\text)\{", text):  # between brackets, a comma separates two numbers
        text = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", lambda match: match[0].replace(",", ""), text)
    return text


# ------------- Python's syntax

NESTED = "[^()]*+"  # the text between two brackets
for _ in range(5):
    NESTED = rf"(?:[^()]++|\({NESTED}\))*+"
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
]
LABEL = re.compile(  # what may precede "=" besides a name, and be left out
    r"(?:^|(?<=[,{(\[])|(?<=, )|(?<=or )|(?<=and ))("
    r"\([a-z]\w*(?:, ?[a-z]\w*)+\)|[a-z](?:\^\(-1\))?\([a-z]\)|"  # (x, y), f(x)
    r"[A-Z]+\([^()=]*(?:=[^()]*)?\)|[A-Z][A-Za-z]+|\\text ?\{[^{}]*\}|"  # P(A), AB, Area
    r"(?:m ?)?\\(?:angle|overline) ?\{?[A-Z]+\}?)(?= ?[=∈])"
)
TOKEN = re.compile(  # a unit follows a space: \text{ cm}^2, inches, km/h
    r"""(?x) (?P<unit> (?: \s*\\text\s*\{[^{}]*\}
      | \s+(?!degree|percent|sin|cos|tan|log|sqrt)(?:[a-zA-Z]{4,}|cm|mm|km|kg|in|ft|mph|sq|USD|(?i:[ap]\.?m))
        \b(?![\w.]*\()\.?(?:/[a-z]+)? ) (?:\s*\^\s*\(?\d\)?)? )
    | \s*(?: (?P<string> "[^"]*" | '[^']*' )
      | (?P<name> (?:\d[\dA-Z]*|[A-Z]\d[\dA-Z]*)_\d+ | [a-zA-Z]_(?:\d+|[a-zA-Z]) )  # 4210_5, x_1
      | (?P<container> (?:"""
    + "|".join(map(re.escape, sorted(CONTAINERS, key=len, reverse=True)))
    + r""")(?=\() )
      | (?P<function> \\?(?:"""
    + "|".join(sorted(CALLS, key=len, reverse=True))
    + r""")(?![a-zA-Z]) )
      | (?P<open> [(\[{] ) | (?P<close> [)\]}] )
      | (?P<number> (?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d{1,3}(?!\d*[.^]))? )
      | (?P<sign> (?:and|or)(?![a-zA-Z]) | [^\sa-zA-Z\\] )
      | (?P<letters> \\?[a-zA-Z]+ | \\ ) )"""
)
SIGNS = {"^": "**", "±": "+plus_minus*", "=": "==", "∈": " in ", "≤": "<=", "≥": ">=", ";": ",", "$": "unit('dollar')*"}
HALF_OPEN = {"(]": "Interval.Lopen(", "[)": "Interval.Ropen("}


def to_python(text):
    r"""Returns a cleaned text in Python's syntax: \frac{1}{2}x^2 is ((1)/(2))*x**2. An ambiguous text is Unreadable."""
    before = None
    while text != before:
        before = text
        for pattern, replacement, *_ in REWRITES:
            text = re.sub(pattern, replacement, text)
    text = LABEL.sub(lambda match: repr(match[0]), text)
    source = ["answer("]
    opened = []  # for each open bracket, its place in source
    divided = [False]  # for each depth, whether a product without a sign would be ambiguous: 1/ab
    last = "start"
    for match in TOKEN.finditer(text):
        kind, piece = python_token(match.lastgroup, match[match.lastgroup].strip(), last)
        if last == "function" and kind != "open":
            raise Unreadable("a function without brackets")
        starts = ["name", "function", "open", "unit"] + ["number"] * (last == "close")
        product = (last in ("number", "name", "close") and kind in starts) or last == kind == "unit"
        if kind == "unit" and not product:
            raise Unreadable("words without a value")
        if divided[-1] and (product or (kind == "name" and "*" in piece)):
            raise Unreadable("what may be 1/(ab) or b/a")
        if product:
            source.append("*")
        if kind in ("sign", "number"):
            divided[-1] = piece == "/"
        elif kind == "open":
            opened.append(len(source))
            divided.append(False)
        elif kind == "close":
            if not opened:
                raise Unreadable("a bracket that was not opened")
            divided.pop()
            at = opened.pop()
            if half_open := HALF_OPEN.get(source[at] + piece):
                source[at], piece = half_open, ")"
        source.append(piece)
        last = kind
    return " ".join([*source, ")"])


def python_token(kind, token, last):
    """Returns the kind and the Python text of a token; xy is a product of two names, AB is a name."""
    name = token.lstrip("\\")
    if kind == "number":
        return kind, str(int(token)) if token.isdigit() else f"Decimal('{token}')"
    if kind == "name":
        return kind, f"base_{token}" if token[0].isdigit() else token
    if kind == "unit":
        return kind, f"unit({token!r})"
    if kind == "string":
        return kind, repr(token[1:-1])
    if kind == "sign":
        return kind, "<<" if token == ":" and last in ("number", "close") else SIGNS.get(token, token)
    if kind != "letters":
        return kind, name
    if name in CONSTANTS or name in MARKS or name in GREEK or (name == token and name.isupper()):
        return "name", name.replace("lambda", "lambda_")
    if name != token or name in ("nan", "zoo") or len(name) > 3:
        raise Unreadable(f"the word {token!r}")
    return "name", "*".join(name)


NOT_UNITS = re.compile(  # digits, and words that change the value before them: "5 factorial" is not 5 with a unit
    r"(?<!\^)\d|\b(squared|cubed|factorial|mod|modulo|plus|minus|times|over|base|not|more|less|least|most|to|from|if|"
    r"when|unless|except|above|below|negative|hal(f|ves)|(third|quarter|fifth|tenth|hundredth|thousandth|millionth)s?|"
    r"dozen|hundred|thousand|million|billion|trillion)\b"
)
UNITS = {"centimeter": "cm", "millimeter": "mm", "kilometer": "km", "meter": "m", "kilogram": "kg", "gram": "g"}
UNITS |= {"inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "usd": "dollar", "mph": "mile per hour", "h": "hour"}


def unit(words):
    r"""Returns one spelling of the words after a value: \text{ square inches} is in^2."""
    words = re.sub(r"\^\s*[({]?(\d)", r"^\1", words.lower())
    if NOT_UNITS.search(words):
        raise Unreadable(f"{words!r} after a value")
    words = re.sub(r"\\text|s\b|[^a-z^\d ]", "", words.replace("metre", "meter"))  # cm^{2} is cm^2, hours are an hour
    words = re.sub(r"[a-z]+", lambda match: UNITS.get(match[0], match[0]), words).replace(" ", "")
    return re.sub(r"^sq(?:uare)?(.*)", r"\1^2", words)


# ------------- From Python's syntax to nodes

INTERVALS = ("()", "[]", "(]", "[)")
BRACKETS = {ast.Tuple: "()", ast.List: "[]", ast.Set: "{}"}
MIRRORED = {ast.Gt: ast.Lt, ast.GtE: ast.LtE, ast.Lt: ast.Gt, ast.LtE: ast.GtE}
INFINITY = ast.Name("infty")
MINUS_INFINITY = ast.UnaryOp(ast.USub(), INFINITY)


def read(value):
    """Returns the node of a JSON value or a text. Raises Unreadable, or SyntaxError or MemoryError of ast.parse."""
    if isinstance(value, list):
        return group("json", map(read, value))
    if isinstance(value, dict):
        return group("{}", [Group("=", (str(name), read(item))) for name, item in value.items()])
    answer = ast.parse(to_python(clean(str(value))), mode="eval").body
    if not isinstance(answer, ast.Call) or not answer.args or answer.keywords:
        raise Unreadable(value)
    if sum(1 for _ in ast.walk(answer)) > MAX_NODES:
        raise Unreadable("too long an answer")
    return group("", map(node, answer.args))


def node(tree):
    """Returns the node of an answer in Python's syntax."""
    match tree:
        case ast.Constant(value=str(text)):
            return read(text)
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return group(BRACKETS[type(tree)], map(node, items))
        case ast.Dict(keys=names, values=items):
            return group("{}", [Group("=", (name_of(a), node(b))) for a, b in zip(names, items, strict=True)])
        case ast.BinOp(left=left, op=ast.BitOr() | ast.LShift() as op, right=right):
            kind = "∪" if isinstance(op, ast.BitOr) else ":"
            left = node(left)
            return Group(kind, (*(left.items if is_group(left, kind) else [left]), node(right)))
        case ast.BoolOp(op=op, values=items):
            items = list(map(node, items))
            if not any(is_group(item, "∈") for item in items):
                return group("", items)
            if isinstance(op, ast.And):
                raise Unreadable("x > 2 and x < 5")
            return Group("∪", tuple(items))
        case ast.Compare(left=left, ops=signs, comparators=sides):
            return relation([left, *sides], list(map(type, signs)))
        case ast.Call(func=ast.Name(id="Eq"), args=[left, right]):
            return relation([left, right], [ast.Eq])
        case ast.Call(func=function, args=items) if (name := ast.unparse(function)) in CONTAINERS:
            items = list(map(node, items))
            if CONTAINERS[name] == "json" and len(items) == 1 and isinstance(items[0], Group):
                items = items[0].items  # Matrix([[1], [2]])
            found = group(CONTAINERS[name], items)
            return Group("∈", ("", found)) if name.startswith("Interval") else found
    return value_of(tree)


def value_of(tree):
    """Returns the Value of an expression, with its units and the last place of a decimal."""
    units = [part for part in ast.walk(tree) if isinstance(part, ast.Call) and name_of(part.func) == "unit"]
    words = " ".join(part.args[0].value for part in sorted(units, key=lambda part: part.col_offset))
    marks = " ".join(sorted(variables(tree) & set(MARKS)))
    decimal = re.fullmatch(r"-?(?:unit\([^()]*\) \* )?Decimal\('([^']*)'\)(?: \* unit\([^()]*\))*", ast.unparse(tree))
    step = Fraction(0)
    if decimal and Fraction(decimal[1]).denominator > 1:
        step = Fraction(10) ** Decimal(decimal[1]).as_tuple().exponent
    return Value(tree, marks + unit(words), step)


def name_of(tree):
    """Returns the left side of an equation as text if it is a name, such as x or f(x), otherwise its tree."""
    match tree:
        case ast.Name(id=name) | ast.Constant(value=str(name)):
            return name
    return tree


def relation(sides, signs):
    """Returns the Group of an equation, or of an inequality of one name: the interval where it holds."""
    if signs == [ast.Eq] or signs == [ast.In]:
        right = node(sides[1])
        return Group("∈" if signs == [ast.In] and is_group(right, *INTERVALS) else "=", (name_of(sides[0]), right))
    if signs[0] in (ast.Gt, ast.GtE):
        sides, signs = sides[::-1], [MIRRORED.get(sign) for sign in signs[::-1]]
    if len(signs) == 1 and isinstance(sides[0], ast.Name):
        sides, signs = [MINUS_INFINITY, *sides], [ast.Lt, *signs]
    elif len(signs) == 1:
        sides, signs = [*sides, INFINITY], [*signs, ast.Lt]
    if len(signs) > 2 or not set(signs) <= {ast.Lt, ast.LtE} or not isinstance(sides[1], ast.Name):
        raise Unreadable("an inequality")
    kind = ("(" if signs[0] is ast.Lt else "[") + (")" if signs[1] is ast.Lt else "]")
    return Group("∈", (sides[1].id, group(kind, [node(sides[0]), node(sides[2])])))


def group(kind, items):
    """Returns a Group, or a single item alone unless it is a row or an interval. An item with ± becomes two."""
    items = list(items)
    if len(items) > 1 or not kind:
        items = [signed for item in items for signed in both_signs(item)]
    if len(items) == 1 and (kind == "" or not is_group(items[0], "json", "∪", ":", *INTERVALS[1:])):
        return items[0]
    if kind == "":
        items = [part for item in items for part in (item.items if is_group(item, "") else [item])]
    if kind == "[]" and any(isinstance(item, Group) for item in items):
        kind = "json"  # the list that a program printed
    ends = [ast.unparse(item.tree) for item in items if isinstance(item, Value)] or [""]
    if kind[:1] == "[" and ends[0] == "-infty":
        kind = "(" + kind[1:]
    if kind[1:] == "]" and ends[-1] == "infty":
        kind = kind[0] + ")"
    return Group(kind, tuple(items))


def is_group(node, *kinds):
    return isinstance(node, Group) and node.kind in kinds


def both_signs(item):
    """Returns the two nodes that a node with ± means; for another node, itself."""
    if is_group(item, "="):
        return [Group("=", (item.items[0], value)) for value in both_signs(item.items[1])]
    if not isinstance(item, Value) or "plus_minus" not in variables(item.tree):
        return [item]
    texts = [ast.unparse(item.tree).replace("plus_minus", sign) for sign in ("1", "(-1)")]
    return [dataclasses.replace(item, tree=ast.parse(text, mode="eval").body) for text in texts]


# ------------- Values


def evaluate(tree, names):
    """Returns the value of a tree, a Fraction or an mpmath number. names: the values of the names.

    Raises ValueError or ArithmeticError if it has none, or if it is out of range.
    """
    match tree:
        case ast.Constant(value=int(value)):
            return Fraction(value)
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Call(func=ast.Name(id="unit")):
            return Fraction(1)
        case ast.Call(func=ast.Name(id="Decimal"), args=[ast.Constant(value=str(text))]):
            return Fraction(text)
        case ast.Set(elts=[part]) | ast.List(elts=[part]):
            return evaluate(part, names)
        case ast.BinOp(left=left, op=op, right=right):
            operation, parts = type(op), [left, right]
        case ast.UnaryOp(op=op, operand=part):
            operation, parts = type(op), [part]
        case ast.Call(func=ast.Name(id=operation), args=parts, keywords=[]):
            pass
        case _:
            raise Unreadable("no value")
    if operation not in OPERATIONS:
        raise Unreadable("no value")
    values = [evaluate(part, names) for part in parts]
    if operation not in EXACT or not all(isinstance(value, Fraction) for value in values):
        values = map(mp.convert, values)
    try:
        value = OPERATIONS[operation](*values)
    except TypeError:  # sin(1, 2)
        raise Unreadable("another number of arguments") from None
    if isinstance(value, Fraction):
        in_range = max(value.numerator.bit_length(), value.denominator.bit_length()) <= MAX_BITS
    elif operation in (ast.USub, ast.UAdd):
        return value
    else:
        value = mp.chop(value, tol=ROUNDING)
        in_range = not value or 1 / LARGEST < abs(value) < LARGEST
    if not in_range:
        raise Unreadable("out of range")
    return value


def variables(tree):
    """Returns the names in a tree that are not constants; marks are included."""
    names = {part.id for part in ast.walk(tree) if isinstance(part, ast.Name)}
    return names - {*CONSTANTS, *CALLS, "unit", "Decimal"}


def values_at_points(prediction, gold, constants):
    """Yields the values of two trees at six random points, the first three positive; once if there is no variable."""
    names = sorted((variables(prediction) | variables(gold)) - set(constants))
    generator = random.Random(0)
    for i in range(6 if names else 1):
        point = {name: Fraction(generator.randrange(-2_000_000 * (i > 2), 2_000_000), 1_000_003) for name in names}
        yield evaluate(prediction, constants | point), evaluate(gold, constants | point)


def close(a, b, allowed=0):
    """Returns whether two numbers differ by no more than allowed, or by rounding. Fractions have no rounding."""
    if a == b or (not allowed and isinstance(a, Fraction) and isinstance(b, Fraction)):
        return a == b
    a, b = mp.convert(a), mp.convert(b)
    return bool(abs(a - b) <= max(ROUNDING * max(abs(a), abs(b), 1), allowed) < mp.inf)


def same_value(prediction, gold, question):
    """Returns whether two Values agree, with the marks ° and % or without them: 90 is 90°, and so is pi/2."""
    if prediction.unit and gold.unit and prediction.unit != gold.unit:
        return False
    if same_number(prediction, gold, CONSTANTS | MARKS):
        return True
    needless = "percent" not in prediction.unit or "percent" in gold.unit or re.search("percent|per cent|%", question)
    without = [dataclasses.replace(value, tree=without_mark(value.tree)) for value in (prediction, gold)]
    return bool(needless) and same_number(*without, CONSTANTS | MARKS)


def without_mark(tree):
    """Returns the tree of 90 for that of 90°; a mark inside a function is kept."""
    match tree:
        case ast.BinOp(left=number, op=ast.Mult(), right=ast.Name(id="percent" | "degree")):
            return number
    return tree


def same_number(prediction, gold, constants):
    """Returns whether two Values are equal at all points where one is real; without variables, within a tolerance."""
    pairs = list(values_at_points(prediction.tree, gold.tree, constants))
    if len(pairs) == 1:
        return close(*pairs[0], tolerance(*pairs[0], max(prediction.step, gold.step), gold.step))
    real = [(a, b) for a, b in pairs if not (mp.im(a) and mp.im(b))]
    return all(close(a, b) for a, b in real or pairs)


def tolerance(a, b, step, gold_step):
    """Returns how far apart two numbers may be if one is a decimal. step: one unit in its last place; 0: no decimal.

    A decimal equals the numbers that round to it if it has six decimal places (as in Math-Verify) or seven digits.
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
    """Returns whether one tree with variables is a constant times the other: 2x - 4 is 2 times x - 2."""
    pairs = list(values_at_points(prediction, gold, CONSTANTS | MARKS))
    (a0, b0), *others = pairs
    return bool(others and a0 and b0) and all(close(a * b0, b * a0) for a, b in others)
