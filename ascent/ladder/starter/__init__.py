"""The use case that `ascent init` writes: these files, but for this one, are copied into the user's folder."""
