"""The OpenAI protocol in front of the chat door."""

from ascent.serve.openai.app import OpenAIApp

__all__ = ["OpenAIApp"]
