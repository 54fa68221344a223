"""The ladder: the use case, the gates that decide each rung from evidence, the climb, and its report."""
