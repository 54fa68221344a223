"""Objectives as rows: small pure functions per axis, and frozen rows that choose among them.

`credit` turns graded groups into advantages, `weights` turns token counts into weights that contain 1/N, `surrogate`,
`kl` and `preference` are tensor maths on log-probs, and `rows` names the choices.
"""
