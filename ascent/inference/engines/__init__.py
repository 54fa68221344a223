"""Engines, one file each: `torch` (embedded), `remote` (OpenAI-compatible server), `scripted` (tests and demos)."""
