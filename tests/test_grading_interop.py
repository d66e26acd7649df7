"""Math equality compared with math-verify, on pairs made from gold answers of every shape.

pytest tests/test_grading_interop.py     # needs math-verify[antlr4_13_2]; bench/grading.py does the same at full size
"""

import importlib.util
from pathlib import Path

import pytest

from common.grading import compare
from test_grading import GOLDS

pytest.importorskip("math_verify")

SPEC = importlib.util.spec_from_file_location("bench_grading", Path(__file__).parent.parent / "bench" / "grading.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.fixture(scope="module")
def verdicts():
    """[(truth, ours, math-verify's, prediction, gold)]"""
    pairs = bench.make_pairs(GOLDS)
    return [(truth, compare(p, g).correct, bench.math_verify_equal(p, g), p, g) for truth, p, g in pairs]


def test_nothing_unequal_is_called_equal(verdicts):
    assert sum(not truth for truth, *_ in verdicts) > 600
    assert [row for row in verdicts if row[1] and not row[0]] == []


def test_what_is_equal_by_construction_is_called_equal(verdicts):
    """Up to 2 %: what common.grading lists as not read. Over whole test sets it is below 0.2 %."""
    equal = sum(truth for truth, *_ in verdicts)
    missed = [row for row in verdicts if row[0] and not row[1]]
    assert equal > 450 and len(missed) <= 0.02 * equal, missed


def test_math_verify_agrees(verdicts):
    agreed = sum(ours == theirs for _, ours, theirs, *_ in verdicts)
    assert agreed / len(verdicts) > 0.95
