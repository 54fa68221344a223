"""Serving: requests of many callers and adapters in one running batch. `request.py` imports no torch."""
