"""Jobs: a durable queue, the local executor, and what everything costs."""
