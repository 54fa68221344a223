"""What jobs do: customize, import, batch inference, evaluation. Each function can be started again on its folder."""

KINDS = {
    "customize": "ascent.serve.kinds.customize:run",
    "import": "ascent.serve.kinds.import_model:run",
    "invocation": "ascent.serve.kinds.batch_inference:run",
    "evaluation": "ascent.serve.kinds.evaluate:run",
}
"""Job kind → the function that a worker's process calls."""
