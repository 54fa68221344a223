"""Objectives as rows: small pure functions per axis, and frozen rows that choose among them.

`rows` names the choices; `losses` reads them on the training side, with `surrogate`, `ratio`, `kl` and `preference` as
tensor maths on log-probs; `credit` turns graded groups into advantages, `weights` token counts into weights with 1/N.
"""
