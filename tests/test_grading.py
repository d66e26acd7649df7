"""Grading: facts, chain-of-thought answers, equality of mathematical answers, hostile predictions.

pytest tests/test_grading.py     # tests/test_grading_interop.py compares with math-verify, on pairs from GOLDS
"""

import itertools
import json
import random
import re
import subprocess
import sys

import pytest
import sympy

from common import InputError
from common.expressions import CLEANING, REWRITES, clean, read
from common.grading import WORDING, Verdict, compare, cot_answer, grade, same, same_node
from conftest import ROOT


def pairs(table, sign):
    """The (prediction, gold) pairs in a table; lines that start with # are titles."""
    lines = [line for line in table.strip().splitlines() if not line.startswith("# ")]
    return [tuple(pair.split(f"  {sign}  ")) for line in lines for pair in line.split("  |  ")]


# ------------- Tables of mathematical answers

# One of each shape that the gold answers of MATH, GSM-Hard, AIME and OlymMATH have; no two are equal.
GOLDS = r"""
116  |  -7  |  10,\!080  |  13138980.0  |  39.9999834113  |  3.509e-07  |  0.5  |  \frac{14}{3}  |  \frac43
\frac9{19}  |  1\frac{4}{5}  |  137 \frac{1}{2}  |  \sqrt[4]{3}  |  3\sqrt{13}  |  11\sqrt2
\sqrt{1+\frac{\sqrt{6}}{3}}  |  2^{4181}  |  \pi -\arccos \frac{1}{8}  |  \frac{3^{2023} + 3}{4}  |  12^{1/7}  |  6 - 5i
-i  |  1 \pm \sqrt{19}  |  1,-2  |  -1,3,3  |  90^\circ  |  \frac{990}{7}^\circ  |  \frac{270}7\text{ degrees}
45^\circ, 135^\circ  |  4210_{5}  |  \text{A5}_{11}  |  73\%  |  \$18.90  |  \$32,\!348  |  5.4 \text{ cents}
864 \mbox{ inches}^2  |  6\frac{1}{6}\text{ feet}  |  16\text{ daps}  |  8\!:\!34 \text{ p.m.}  |  3:5
\left( 3, \frac{\pi}{2} \right)  |  (2,4)  |  (4,2)  |  (3,4]  |  [3,4)  |  (2,\infty)  |  (-\infty, 2) \cup (3, \infty)
[3, 4) \cup \left(4, \frac{64}{11}\right]  |  x \in [-2,7]  |  \{1\pm\sqrt{5},-2\}  |  x=17  |  y = 2x + 3
5x - 7y + 11z + 4 = 0  |  \begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}  |  \begin{pmatrix} 0 & 1 \\ 1 & 0 \end{pmatrix}
x^3+3x-6  |  (a+5)(b+2)  |  \cot x  |  \tan \frac{x}{2}  |  30p \sqrt{p}  |  \frac{1}{(a - b)b}  |  \sqrt{a^2 + b^2}
xy  |  \text{Evelyn}  |  \text{(C)}  |  \text{A,B,E}
"""
GOLDS = [gold for line in GOLDS.strip().splitlines() for gold in line.split("  |  ")]

EQUAL = r"""
# numbers, separators, currency
0.5  ==  \frac{1}{2}  |  9/5  ==  1\frac{4}{5}  |  1.2 \times 10^5  ==  120000  |  10080  ==  10,\!080
81,256  ==  81, 256  |  81,256  ==  81256  |  \$1.85  ==  1.85 USD  |  \sqrt 3 \frac{1}{2}  ==  \sqrt3/2
\frac xy  ==  x/y  |  0.333333  ==  \frac13  |  \approx 6366.1977  ==  6366.1977
x = 2\sqrt{3} \approx 3.46  ==  2\sqrt3  |  2/3  ==  \$\dfrac23 \approx \$0.67
# degrees, percent, units, ratios, bases
90 deg  ==  90^\circ  |  pi/2  ==  90^\circ  |  \tan 15^\circ  ==  2-\sqrt3  |  5  ==  5 \text{ cm}
5 seconds  ==  5\text{ seconds}  |  5 miles per hour  ==  5\text{ mph}  |  4 minutes  ==  4\text{ min}
5\text{ s}  ==  5
$5$ cm  ==  5\text{ cm}  |  \text{5 cm}  ==  5\text{ centimeters}  |  864 square inches  ==  864 \mbox{ inches}^2
5 km/h  ==  5 \text{ km/h}  |  8:34 pm  ==  8\!:\!34 \text{ p.m.}  |  3 : 5  ==  3:5  |  4210_5  ==  4210_{5}
# upright letters, and characters beyond ASCII
3+4\mathrm{i}  ==  3+4i  |  \mathrm{e}^{2}  ==  e^2  |  2\pi\mathrm{i}  ==  2\pi i  |  10²²  ==  10^{22}  |  2½  ==  5/2
πr²  ==  \pi r^2  |  2πr  ==  2\pi r  |  10⁻⁵  ==  10^{-5}  |  sin²x  ==  \sin^2 x  |  θ  ==  \theta  |  2‑3i  ==  2-3i
# delimiters, text
$5$  ==  5  |  \text{5}  ==  5  |  5 \text{ and } 13  ==  5,13  |  \text{5 and 13}  ==  5, 13
$x=5$ or $x=6$  ==  5,6  |  C  ==  \text{(C)}  |  east  ==  \text{east}  |  ['A', 'B']  ==  \text{A,B}
\textbf{(B)}\ 16  ==  16  |  no solution  ==  \text{No solution}
# lists, sets, tuples
\sqrt{2} \approx 1.41, \sqrt{3} \approx 1.73  ==  \sqrt2, \sqrt3  |  set()  ==  \emptyset  |  Point(1, 2)  ==  (1,2)
-2, 1  ==  1,-2  |  {1, -2}  ==  1,-2  |  x = 1 or x = -2  ==  1,-2  |  x_1 = 1, x_2 = -2  ==  1,-2
(x,y) = (1,2)  ==  (1,2)  |  x = 1, y = 2  ==  (1,2)  |  y = 2, x = 1  ==  x = 1, y = 2
⟨7,-8⟩  ==  \langle 7,-8 \rangle  |  1-sqrt(19), 1+sqrt(19)  ==  1 \pm \sqrt{19}  |  x = \pm 3  ==  3,-3
\frac{1 \pm \sqrt5}{2}  ==  \frac{1+\sqrt5}{2},\frac{1-\sqrt5}{2}
# intervals, inequalities, unions
[-2,7]  ==  x \in [-2,7]  |  x < 2  ==  (-\infty, 2)  |  2 > x  ==  (-\infty, 2)  |  2 <= x <= 5  ==  [2,5]
5 \ge x > 2  ==  (2,5]  |  x < 2 or x >= 3  ==  (-\infty, 2) \cup [3, \infty)
(3, oo) U (-oo, 2)  ==  (-\infty, 2) \cup (3, \infty)
# matrices
\left(\begin{array}{cc} 1 & 2\\ 3 & 4\end{array}\right)  ==  \begin{pmatrix} 1 & 2 \\ 3&4 \end{pmatrix}
\begin{pmatrix} 10\\[4pt]200 \end{pmatrix}  ==  \begin{pmatrix} 10 \\ 200 \end{pmatrix}
# names, equations, functions
f(x) = 2*x + 3  ==  2x+3  |  f^{-1}(x) = 2x  ==  2x  |  P(A)=1/3  ==  \frac13  |  \text{Area} = 5  ==  5
x=17  ==  17 = x  |  2x+4y-3=0  ==  y=-x/2+3/4  |  34x+45y-20z+100=0  ==  -34x-45y+20z-100=0
a*b+2*a+5*b+10  ==  (a+5)(b+2)  |  a_1 + a_1  ==  2a_1  |  \sqrt{1/n}  ==  1/\sqrt{n}  |  6!  ==  720
\binom{5}{2}  ==  10  |  \log_2 8  ==  3  |  \tan^2(y)+1  ==  \sec^2 y  |  \sin^{-1}(1/2)  ==  \arcsin \frac12
\sin 2x  ==  2\sin x\cos x
# Python's and sympy's notation
(6-5j)  ==  6-5i  |  1j  ==  i  |  [(1+2j), (1-2j)]  ==  1+2i,1-2i  |  -inf  ==  -\infty
pi - acos(1/8)  ==  \pi -\arccos \frac{1}{8}  |  (5,)  ==  5  |  [np.int64(1), np.int64(-2)]  ==  1,-2
(np.float64(3.0), 2)  ==  (3,2)  |  array([1., 2.], dtype=float32)  ==  1,2  |  ('1/2', '3')  ==  (\frac12, 3)
Fraction(1, 2), Fraction(3, 4)  ==  \frac12,\frac34  |  Matrix([[1], [2]])  ==  [1, 2]
Matrix([[1, 2], [3, 4]])  ==  \begin{pmatrix}1&2\\3&4\end{pmatrix}  |  {(1, 2), (3, 4)}  ==  (3,4),(1,2)
FiniteSet(2, 1)  ==  1,2  |  EmptySet  ==  \varnothing  |  [{x: -2}, {x: 3}]  ==  -2,3  |  {'x': 1, 'y': 2}  ==  (1,2)
[{x: 1, y: 2}, {x: 3, y: 4}]  ==  (1,2),(3,4)  |  {'mean': 3.5}  ==  3.5  |  Interval(-2, 7)  ==  [-2,7]
Interval(-oo, 2)  ==  (-\infty,2]  |  Union({3}, Interval.Lopen(4, 5))  ==  \{3\} \cup (4,5]
(2 <= x) & (x <= 5)  ==  [2,5]  |  ((-oo < x) & (x < 2)) | ((3 < x) & (x < oo))  ==  (-\infty,2) \cup (3,\infty)
"""
EQUAL = pairs(EQUAL, "==")
EQUAL += [(410332.9, 410332.8999999999), (13138980, 13138980.0), (51196733.33, 51196733.33333333), (6.1e-17, "0")]
EQUAL += [(3.508771929824561e-07, 3.509e-07), (3.4641016151377544, "2\\sqrt{3}"), (str(2**4181), "2^{4181}")]
EQUAL += [(90, "90^\\circ"), (10, "10\\%"), (0.1, "10\\%"), ([1, -2], "1,-2"), ([5], "5"), ([-2, 7], "[-2,7]")]
EQUAL += [([3, 1.5707963267948966], r"(3, \frac{\pi}{2})"), ([[1, 2], [3, 4]], r"\begin{pmatrix}1&2\\3&4\end{pmatrix}")]
EQUAL += [([[3, 2]], "(3,2)"), ([[3, 2]], r"\begin{pmatrix}3&2\end{pmatrix}")]
EQUAL += [({"x": 1, "y": 2}, "(1,2)"), (" 7 . ", "7"), ("log10(1000)", "3"), (r"\log_{10}100", "2")]
EQUAL += [("(6.123233995736766e-17+1j)", "i"), ("(0.5000000000000001+0.8660254037844386j)", r"\frac{1+\sqrt3 i}{2}")]

# Equal answers that are not recognised; common/grading.py lists the kinds.
NOT_RECOGNISED = r"""
2\frac{3}{2}  ==  3  |  20 million  ==  20,\!000,\!000  |  0.67  ==  \$\dfrac23 \approx \$0.67  |  5 m  ==  5\text{ m}
\mathbb{R} \setminus \{2\}  ==  (-\infty,2) \cup (2,\infty)  |  (0,1) \cup [1,2)  ==  (0,2)  |  6:10  ==  3:5
The answer is 42.  ==  42  |  x >= 2 and x <= 5  ==  [2,5]  |  \sqrt[3]{-8}  ==  -2  |  1/ab  ==  \frac{1}{ab}
x = 10/4 = 5/2  ==  5/2  |  0.\overline{3}  ==  \frac13  |  52 (base 8)  ==  52_8  |  [1 2]  ==  1,2
(B) 16  ==  \text{(B)}  |  \sin x/2  ==  \frac{\sin x}{2}  |  (n+1)!  ==  (n+1) \cdot n!  |  5!!  ==  15
5 cm, 6 cm  ==  5,6
"""

DIFFERENT = r"""
# numbers: precision, mixed numbers, separators, bases
3.46  !=  2\sqrt3  |  3.14159  !=  \pi  |  0.333334  !=  1/3  |  0.041667  !=  1/24  |  1.0000000000001  !=  1
0.0000001  !=  0  |  7e-34  !=  6.63e-34  |  1e-10  !=  1.4e-10  |  2^400  !=  2^401  |  x + 1  !=  x + 1 + 10^{-30}
100000000000000000001  !=  100000000000000000000  |  1 1/2  !=  11/2  |  23  !=  2 3  |  5 0.5  !=  2.5  |  1,2  !=  12
0,125  !=  125  |  5 ≈ 4 or 7  !=  5  |  1+i, -1-i  !=  \pm 1 \pm i  |  complex(3, 4)  !=  (3,4)
\log_{2}3x  !=  \log_{23}x  |  x_{1}2  !=  x_{12}  |  a_{nb}  !=  a_{n}b
1 000  !=  1  |  (100,101)  !=  100101  |  81, 256  !=  81256  |  52  !=  52_8  |  \text{5}_2  !=  5
# percent, degrees, units, words that change a number
10%  !=  10  |  45  !=  \frac{\pi}{4}  |  \sin 30  !=  \sin 30^\circ  |  180^\circ  !=  180\pi  |  5 cm  !=  5 \text{ m}
36 cents  !=  \$36  |  90 degrees  !=  90\text{ radians}  |  8:34 am  !=  8\!:\!34 \text{ p.m.}
5 km/h  !=  5\text{ km}  |  5 factorial  !=  5  |  5 more than 3  !=  5  |  not 5  !=  5
5 apples and 3 oranges  !=  5  |  2\mathrm{i}  !=  2  |  5\mathbf{v}  !=  5  |  5\text{k}  !=  5  |  2\text{ pi}  !=  2
3 fourths  !=  3  |  0.3 repeating  !=  0.3  |  5 lakh  !=  5  |  3 doubled  !=  3  |  0.333...  !=  0.333
3 millions  !=  3  |  7 sixteenths  !=  7  |  10 pairs  !=  10  |  3 point five  !=  3  |  1 in five  !=  1
7 choose three  !=  7  |  2 incorrect  !=  2  |  5\text{M}  !=  5  |  5\text{ m/s}  !=  5\text{ m}
5\text{ rad/s}  !=  5\text{ rad}  |  5\text{ ms}  !=  5\text{ m}  |  5\text{ kg/m}^3  !=  5\text{ kg m}^3
10²²  !=  10000  |  5 \pmod 3  !=  5  |  2 cosx  !=  2
# brackets, order, numbers of items, names
[1,2]  !=  (1,2)  |  (5,2)  !=  2,5  |  (2,5)  !=  \{2,5\}  |  [2,5]  !=  \{2,5\}  |  (1,2),(3,4)  !=  (1,3),(2,4)
1)(2  !=  2  |  Matrix([[1, 2]])  !=  \begin{pmatrix}1\\2\end{pmatrix}  |  x = \pm 3  !=  3
Matrix([[1, 2], [3, 4]])  !=  \begin{pmatrix}1&3\\2&4\end{pmatrix}  |  y = 1, x = 2  !=  x = 1, y = 2
\{1, 2\}  !=  x = 1, y = 2  |  [{x: -2}, {y: 3}]  !=  x=-2, x=3  |  [{x: 1, y: 2}, {x: 3, y: 4}]  !=  (1,4),(3,2)
5, 6, y  !=  5, 6, x  |  P(A) = 1, P(B) = 2  !=  P(A) = 2, P(B) = 1
# intervals and inequalities
x>2  !=  y>2  |  x \le 2  !=  (-\infty,2)  |  x \ne 2  !=  2  |  x \in [2,5]  !=  2,5  |  x = [2,5]  !=  \{2,5\}
x < 2 and x > 3  !=  (-\infty,2)\cup(3,\infty)  |  x > 2 and x < 5  !=  (-\infty,5)\cup(2,\infty)
(0,1) \cup (1,2)  !=  (0,2)  |  (-\infty,2)\cup(3,\infty)  !=  (-\infty,3)\cup(2,\infty)  |  x + y < 5  !=  x + y \le 5
# what is equal in a part of the numbers only
|x-3|  !=  3-x  |  \sqrt{(t-5)^2}  !=  5-t  |  |x^2-9|  !=  9-x^2  |  y=|x-5|  !=  y=5-x  |  |\cos(x/2)|  !=  \cos(x/2)
\sqrt{x-5}\sqrt{x-6}  !=  -\sqrt{(x-5)(x-6)}  |  |x-300|  !=  300-x
# names, equations, words, ratios
x=5  !=  y=5  |  x'  !=  x  |  a_1 + a_2  !=  2a_1  |  x = x  !=  x = 1  |  2x = 10  !=  10  |  (x-1)^2 = 0  !=  x = 1
x(x-1)=0  !=  x = 0  |  0 = 0  !=  x = 0  |  a = b = c  !=  a = b = d  |  f(2) = 5  !=  2  |  f'(x) = 2x  !=  f(x) = 2x
DC  !=  CD  |  B, A  !=  \text{A,B}  |  B 16  !=  16  |  1  !=  \text{(1)}x  |  \text{(A) and (B)}  !=  \text{(A)}
no solution  !=  0  |  3:5  !=  5:3
# operations and functions
\sqrt23  !=  3\sqrt2  |  \sqrt{n^2}  !=  n  |  \log(x^2)  !=  2\log x  |  2^3^2  !=  64  |  1/ab  !=  b/a
1/2x  !=  \frac{1}{2x}  |  1/\sqrt{2}x  !=  \frac{x}{\sqrt2}  |  1/2004!  !=  1/2006!  |  5!!  !=  120  |  2.5!  !=  240
\log_2 8  !=  \log_8 2  |  \sin^2 x  !=  \sin x^2  |  \sin^{-1} x  !=  1/\sin x  |  \sin x/2  !=  \sin(x/2)
sin 2(x)  !=  sin(2)*x  |  ||x||  !=  x
# no value
\frac{1}{0}  !=  \infty  |  \infty + 1  !=  \infty  |  \infty  !=  10^{40}  |  zoo  !=  \infty  |  \sqrt{-4}  !=  2
((((  !=  1  |  5, ^x  !=  5
"""
DIFFERENT = pairs(DIFFERENT, "!=")
DIFFERENT += [(13138981, 13138980.0), (40.0, 39.9999834113), (39.99998, "40"), (4561195, 4561195.2), (3e-07, 3.509e-07)]
DIFFERENT += [([1, 2], "(1,2]"), (["5 m"], "5 cm"), ("", "1"), (None, "x"), ({}, "1"), ({"x": 5}, "1"), ([[]], "1")]
DIFFERENT += [(float("nan"), "1"), (float("inf"), "1"), (True, "1")]

HOSTILE = [
    # powers and factorials
    *("9**9**9**9", "factorial(10**9)", "10**10**10", "2^(2^(2^100))", "1e99999999", "1500!" + "*1500!" * 300),
    *("5" + "!" * 900, "binomial(1500,750)*" * 90 + "1", "exp(exp(exp(exp(9))))", "(x+1)**1400", "9" * 100_000),
    # depth
    *("(" * 900 + "1" + ")" * 900, "-" * 1900 + "1", "x^" * 600 + "2", r"\sqrt" * 380 + "2", r"\frac" * 390),
    *("{" * 1900, "sin(" * 39 + "1" + ")" * 39, r"\begin{pmatrix}" * 100, "|" * 1900, "sin^2(" * 300, "(a" * 900 + "!"),
    # length
    *("+".join(["sqrt(x)"] * 240), "+".join(["pi^pi"] * 300), "*".join(["99999999"] * 200), "x" * 1900, r"\pm1" * 400),
    *("1," * 900 + "1", r"0.\overline{" + "9" * 1900 + "}", " " * 100_000 + "x", "1 cm " * 380, r"\text{" * 300),
]


# ------------- Facts

SAME_FACT = r"""
Jay‑Z  ==  Jay-Z  |  OʼNeil  ==  O'Neil
The Beatles!  ==  beatles  |  an  Apple a day  ==  Apple day  |  rock ’n’ roll  ==  Rock 'n' Roll  |  U.S.  ==  US
1914–18  ==  1914-18  |  1,234,567  ==  1234567  |  (-5)  ==  -5  |  −5  ==  -5  |  3.5.  ==  3.5  |  A  ==  a
!!!  ==  !!!
# LaTeX: the CoT prompt asks for a box
\text{Paris}  ==  Paris  |  \textbf{Paris}.  ==  Paris  |  $\mathrm{yes}$  ==  yes  |  3\text{ a.m.}  ==  3 A.M.
\text{A\$AP Rocky}  ==  A$AP Rocky  |  \text{Steely \& Clevie}  ==  Steely & Clevie  |  60^\circ\text{ S}  ==  60° S
150\,000\ \text{cars}  ==  150,000 cars  |  \text{New}~\text{York}\\ \text{City}  ==  New York City
\text{M\'elanie Sm\"{o}r}  ==  Mélanie Smör  |  \frac{3}{4}  ==  3/4  |  \large\text{Paris}  ==  Paris
5\frac{1}{2}  ==  5 1/2  |  **Paris**  ==  Paris  |  10^{6}  ==  10^6
{\rm Paris}  ==  Paris  |  Barack~Obama  ==  Barack Obama
"""
SAME_FACT = [*pairs(SAME_FACT, "=="), (True, "yes"), (False, "no"), (1969, "1969"), (1969.0, "1969"), (3.5, "3.5")]
SAME_FACT += [(["Rome", "Paris"], "Rome, Paris"), ("Rome", ["Paris", "Rome"]), ("-5", -5)]
OTHER_FACT = r"""
John Lennon  !=  John Winston Lennon  |  yes it is  !=  yes  |  théâtre  !=  theatre  |  !?  !=  Paris  |  ...  !=  A
The  !=  A  |  ???  !=  !!!  |  3.5  !=  35  |  -5  !=  5  |  .5  !=  5  |  1/2  !=  12  |  9/11  !=  911
10^{6}  !=  106  |  10^{-5}  !=  105  |  5\frac{1}{2}  !=  51/2  |  **-5**  !=  5  |  [-5]  !=  5  |  -€5  !=  5
1,2  !=  12  |  10:30  !=  1030  |  1914-18  !=  191418  |  $3.50  !=  $350  |  \text{Paris}  !=  London
\sqrt{2}  !=  2
"""


@pytest.mark.parametrize("prediction, gold", SAME_FACT, ids=repr)
def test_facts_are_normalised_as_in_squad(prediction, gold):
    assert grade("fact", prediction, gold) == Verdict(True, "exact")


@pytest.mark.parametrize("prediction, gold", pairs(OTHER_FACT, "!="), ids=repr)
def test_other_facts_are_different(prediction, gold):
    assert grade("fact", prediction, gold) == Verdict(False, "different")


@pytest.mark.parametrize(
    "aliases, correct", [(["x", "the fab four"], True), ("Fab Four", True), ("Fab", False), (None, False)]
)
def test_aliases_count_for_facts(aliases, correct):
    verdict = grade("fact", "Fab Four", "The Beatles", aliases=aliases)
    assert verdict == (Verdict(True, "alias") if correct else Verdict(False, "different"))
    assert not grade("math", "6", "5", aliases=["6"]).correct


@pytest.mark.parametrize(
    "kind, answers",  # equal answers are one vote; no other two are
    [
        (
            "math",
            [[4, "4", 4.0, "x = 4", r"\frac82"], [5], ["1/2", 0.5, r"\frac12"], [[1, -2], "[1, -2]"], [{}], [None]],
        ),
        ("math", [["hm ~", "hm ~"], ["No solution", r"\text{no solution}"], ["(3, 4)"], ["2, 1", "1, 2"], [True]]),
        ("fact", [["The Beatles", "beatles!"], ["3.5", 3.5], [["Rome", "Paris"], "Rome, Paris"], ["Rome"], [None]]),
    ],
)
def test_same_is_what_votes_count(kind, answers):
    for (i, a), (j, b) in itertools.product(*[[(i, a) for i, group in enumerate(answers) for a in group]] * 2):
        assert same(kind, a, b) is (i == j and a is not None), (a, b)


@pytest.mark.parametrize("kind", ["fact", "math"])
@pytest.mark.parametrize("nothing", [None, "", "  ", []])
def test_no_answer_is_wrong_and_so_is_no_gold_answer(kind, nothing):
    assert grade(kind, nothing, "5") == Verdict(False, "no answer")
    assert grade(kind, "5", nothing) == grade(kind, nothing, nothing) == Verdict(False, "no gold answer")


def test_an_unknown_kind_is_refused():
    with pytest.raises(InputError, match="'fact' or 'math'"):
        grade("maths", "1", "1")


def test_the_judge_is_asked_only_where_exact_match_fails():
    asked = []

    def judge(question, answers, prediction):
        asked.append((question, answers, prediction))
        return {"the Fab Four": True, "Oasis": False}.get(prediction)

    arguments = {"answer": "The Beatles", "aliases": ["Beatles"], "question": "Who sang Help!?", "judge": judge}
    assert grade("fact", "beatles", **arguments).why == "exact"
    assert grade("fact", "the Fab Four", **arguments) == Verdict(True, "judge: correct")
    assert grade("fact", "Oasis", **arguments) == Verdict(False, "judge: incorrect")
    assert grade("fact", "hm", **arguments) == Verdict(False, "judge: no verdict")
    assert grade("fact", None, **arguments).why == "no answer"
    assert grade("math", "6", "5", judge=judge).why == "different"
    assert asked[0] == ("Who sang Help!?", ["The Beatles", "Beatles"], "the Fab Four") and len(asked) == 3


# ------------- Answers of chain-of-thought replies

REPLIES = r"""
so \boxed{5}.  ->  5  |  \boxed{1} and then \boxed{\frac{1}{\sqrt{2}}}  ->  \frac{1}{\sqrt{2}}
\boxed{\left\{ x \mid x > 2 \right\}}  ->  \left\{ x \mid x > 2 \right\}  |  The answer is 3. \boxed{4}  ->  4
\boxed{\left\{ 1 \right.}  ->  \left\{ 1 \right.  |  \fbox{7}  ->  7  |  \boxed 5, done  ->  5  |  \boxed5  ->  5
\boxed{\text{yes}}  ->  \text{yes}  |  \boxed{3} ... \boxed{4  ->  3  |  \boxed{}  ->  None
\boxed{5}. As asked, the answer stands in \boxed{} (not \boxed{...} or \boxed{\text{your answer}}).  ->  5
\boxed{\infty}  ->  \infty  |    ->  None  |  The answer is 5. It goes into \boxed{}.  ->  5
# without a box; None: there is no answer
It may be 5.  ->  None  |  \boxedness{3}  ->  None  |  ### 1. A heading  ->  None
Think.¶¶Final answer: 12  ->  12  |  The answer is 3.¶No: the answer is **Paris**.  ->  Paris
the answer is .5  ->  .5  |  So the answer is: -.25.  ->  -.25  |  The answer is **3.5**. Done.  ->  3.5
**Final Answer**: `12`  ->  12  |  **Final Answer:** 12  ->  12  |  ## Final Answer¶¶$\frac12$  ->  $\frac12$
Reasoning.¶**Answer:** (2, 3)  ->  (2, 3)  |  7 * 6 = 42¶#### 42  ->  42  |  Answer: 9¶Wait.¶Answer: 10  ->  10
The answer is Paris. It is the capital of France.  ->  Paris  |  The answer is yes, because both are bands.  ->  yes
The answer is Washington, D.C. It is the capital.  ->  Washington, D.C
The answer is St. Louis. It is old.  ->  St. Louis  |  The answer is J. K. Rowling, who wrote it.  ->  J. K. Rowling
The answer is Mamma Mia! Here We Go Again.  ->  Mamma Mia! Here We Go Again  |  The correct answer is (B).  ->  (B)
So the answer would be 12.  ->  12  |  The answer to the question is 12.  ->  12  |  The answer: 42  ->  42
Step 3. The final answer: 42  ->  42  |  ### Answer¶12  ->  12  |  #### Final answer¶12  ->  12
The answer is:¶¶$$¶\frac12¶$$  ->  \frac12  |  The answer is 5. The answer is not 6.  ->  5  |  Final answer:  ->  None
The answer is:¶¶- 5  ->  5  |  **Final Answer:**¶- **5**  ->  5  |  The answer is:¶¶1. Paris  ->  Paris
the answer is -5  ->  -5  |  Ans: 5  ->  5  |  The answer is 2**3.  ->  2**3
The answer is 7.¶¶#### 2. Check¶7=7  ->  7  |  Answer: 7¶¶#### Explanation¶foo  ->  7
#### 4. Solve¶So x is 12.  ->  None
Answer: Paris. The answer is based on the first passage.  ->  Paris  |  Answer: 7¶The answer is rounded.  ->  7
The answer is **Paris** (the capital of France).  ->  Paris  |  The answer is yes, they are both American.  ->  yes
The answer will be 5  ->  5  |  The answers are 3 and 5  ->  3 and 5  |  The answer for part (a) is 5  ->  5
<final_answer>5</final_answer>  ->  5  |  Final Answer: The final answer is red.  ->  red
Answer: 5¶¶This answer is consistent with the text.  ->  5  |  **12**. The answer is correct.  ->  None
I know the answer to this question.  ->  None  |  so <answer> 5 </answer>  ->  5
Final Answer: The final answer is $5$. I hope it is correct.  ->  $5$  |  ### Final Answer¶¶The answer is 5.  ->  5
"""


@pytest.mark.parametrize("text, answer", pairs(REPLIES, "->"))
def test_answers_of_chain_of_thought_replies(text, answer):
    assert str(cot_answer(text.replace("¶", "\n"))) == answer


# ------------- Math


@pytest.mark.parametrize("pattern, replacement, example, cleaned", [*CLEANING, *REWRITES], ids=repr)
def test_every_cleaning_rule_has_an_example(pattern, replacement, example, cleaned):
    assert re.sub(pattern, replacement, example) == cleaned != example


@pytest.mark.parametrize("prediction, gold", EQUAL, ids=repr)
def test_equal(prediction, gold):
    verdict = compare(prediction, gold)
    assert verdict.correct and verdict.why in ("exact", "text", "equal")


@pytest.mark.parametrize("prediction, gold", [*DIFFERENT, *pairs(NOT_RECOGNISED, "==")], ids=repr)
def test_different_or_not_recognised(prediction, gold):
    verdict = compare(prediction, gold)
    assert not verdict.correct and verdict.why in ("different", "unreadable")


@pytest.mark.parametrize("gold", GOLDS)
def test_every_shape_of_gold_answer_equals_its_variants(gold):
    assert compare(gold, gold) == Verdict(True, "exact")
    assert compare(f"${gold} $", gold).correct
    if not WORDING.fullmatch(clean(gold)) and not re.search(r"\d\}?_|:", gold):  # number bases, ratios: the text only
        assert same_node(read(gold)[1], read(gold)[1])  # parsed and evaluated too, although equal texts do not need it


def test_no_two_gold_answers_are_equal():
    assert [pair for pair in itertools.permutations(GOLDS, 2) if compare(*pair).correct] == []


BASE, PERCENT = ("52", "52_8", "Write 42 in base 8."), ("10%", "10", "What percent of 50 is 5?")


@pytest.mark.parametrize("prediction, gold, question", [BASE, (1010, "1010_2", "What is ten in binary?"), PERCENT])
def test_what_only_the_question_allows(prediction, gold, question):
    assert grade("math", prediction, gold, question=question).correct
    assert not grade("math", prediction, gold, question="How much is it?").correct


def random_expression(generator, depth=3):
    """A sympy expression of integers, roots, pi and two variables."""
    if depth == 0:
        leaves = [generator.randint(1, 9), *sympy.symbols("x y"), sympy.pi, sympy.sqrt(generator.randint(2, 12))]
        return sympy.sympify(generator.choice(leaves))
    a, b = random_expression(generator, depth - 1), random_expression(generator, depth - 1)
    return generator.choice([a + b, a * b, a - b, a / (b or 1), a**2, -a])


def test_equality_agrees_with_sympy_on_random_expressions():
    generator = random.Random(0)
    for _ in range(60):
        expression = random_expression(generator)
        gold = sympy.latex(expression)
        for other in (expression, sympy.expand(expression), sympy.together(expression), sympy.factor(expression)):
            assert compare(str(other), gold).correct and compare(sympy.latex(other), gold).correct, (other, gold)
        other = expression + generator.choice([1, sympy.Rational(1, 10**9), sympy.sqrt(2) - sympy.Rational(7, 5)])
        assert not compare(str(other), gold).correct, (other, gold)


# ------------- Predictions that attack the grader


def test_hostile_predictions_cost_neither_time_nor_memory(tmp_path):
    """Each takes less than half a second, all stay within 1 GiB of address space; none is right, and none is run."""
    hostile = [*HOSTILE, f"__import__('os').system('touch {tmp_path}/run')", f"open('{tmp_path}/run', 'w')"]
    script = (
        "import json, resource, sys, time\n"
        "from common.grading import compare\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
        "for text in json.load(sys.stdin):\n"
        "    start = time.process_time()\n"
        "    right = [compare(text, gold).correct for gold in ('5', 'x', text[:300] + '+0', '(x+1)^9')][0]\n"
        "    print(json.dumps([right, time.process_time() - start]), flush=True)\n"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.run(command, input=json.dumps(hostile), text=True, capture_output=True, cwd=ROOT, timeout=120)
    assert process.returncode == 0, process.stderr
    for text, line in zip(hostile, process.stdout.splitlines(), strict=True):
        right, seconds = json.loads(line)
        assert not right and seconds < 4 * 0.5, (text[:60], right, seconds)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind, gold", [("fact", "yes"), ("math", "5"), ("math", r"\text{(C)}")])
def test_values_that_cannot_be_printed_are_wrong(kind, gold):
    nested = []
    for _ in range(5000):
        nested = [nested]
    for prediction in (nested, 10**5000, [10**5000], float("nan"), {"a": {"b": [None]}}, list(range(10_000))):
        assert not grade(kind, prediction, gold).correct


def test_random_damage_to_an_answer_never_raises():
    generator = random.Random(0)
    pieces = (
        r"\frac { } ( ) [ ] \sqrt ^ _ ! 9 x - / , | \pm \cup = < % $ \text{a} \begin{pmatrix} & \\ sin \ . 1e9 \circ :"
    )
    pieces = [*pieces.split(" "), " "]
    for _ in range(3000):
        text = list(generator.choice(GOLDS))
        for _ in range(generator.randint(1, 6)):
            text.insert(generator.randint(0, len(text)), generator.choice(pieces))
        verdict = compare("".join(text), generator.choice(GOLDS))
        assert isinstance(verdict.correct, bool) and isinstance(verdict.why, str)
