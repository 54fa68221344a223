"""What jobs do: customize, import, batch inference, evaluation. Each function can be started again on its folder."""

KINDS = {
    "customize": "ascent.serve.work.customize:run",
    "import": "ascent.serve.work.import_model:run",
    "invocation": "ascent.serve.work.batch_inference:run",
    "evaluation": "ascent.serve.work.evaluate:run",
}
"""Job kind → the function that a worker's process calls."""
