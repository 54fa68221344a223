"""The server: tuned models behind the AWS API and the OpenAI protocol."""
