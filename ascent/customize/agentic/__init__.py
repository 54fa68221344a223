"""Multi-turn episodes: tools, environments, the processes they live in, and the harness that runs many at once.

`environment` and `tools` are what a user's file imports; they load neither torch nor NumPy.
"""
