"""`ascent serve`: the server."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("serve")
@click.option("--config", type=click.Path(path_type=Path), help="A YAML file; see docs/serving.md.")
@click.option("--host", help="Where to listen; loopback unless keys exist and TLS or --plain-http is given.")
@click.option("--port", type=click.IntRange(0, 65535), help="The port; 0 takes a free one and says which.")
@click.option(
    "--model", "models", multiple=True, metavar="NAME=MODEL", help="Deploy a model from the start; repeatable."
)
@click.option("--jobs", type=click.IntRange(min=0), help="Customization jobs at a time; 0 runs none here.")
@click.option("--plain-http", is_flag=True, default=None, help="Allow an address beyond loopback without TLS.")
@click.option("--log-format", type=click.Choice(("json", "text")), help="How the log is written.")
def command(
    config: Path | None,
    host: str | None,
    port: int | None,
    models: tuple[str, ...],
    jobs: int | None,
    plain_http: bool | None,
    log_format: str | None,
) -> None:
    """Serve models and customization jobs through the AWS API and the OpenAI protocol.

    Calls need a key: make one with `ascent keys create`. SIGTERM lets running answers end, and training write its
    checkpoint; the next start goes on with it.
    """
    from ascent.records.errors import BadInput
    from ascent.serve.config import load_config
    from ascent.serve.run import serve

    given: dict[str, object] = {"host": host, "port": port, "plain_http": plain_http, "log_format": log_format}
    deployed = []
    for text in models:
        name, mark, model = text.partition("=")
        if not (name and mark and model):
            raise BadInput(f"--model {text!r}: write NAME=MODEL, such as assistant=smollm2-135m-instruct")
        deployed.append({"name": name, "model": model})
    if deployed:
        given["models"] = deployed
    if jobs is not None:
        given["jobs"] = {"slots": jobs}
    serve(load_config(config, {name: value for name, value in given.items() if value is not None}))
