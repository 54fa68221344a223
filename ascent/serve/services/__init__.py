"""The AWS services that are served here, one class each; their methods are the operations."""
