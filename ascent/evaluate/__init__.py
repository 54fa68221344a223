"""Evaluate: graders in killable processes, suites, intervals and paired tests, immutable reports.

The modules are imported by name (`ascent.evaluate.suite`, `ascent.evaluate.statistics`, ...). This file
imports none of them, because a grader worker starts by importing this package and must not pay for NumPy and
SciPy.
"""
