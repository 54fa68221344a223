"""The generated pages on the server: which operations it serves, and how it is configured."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import BaseModel

from ascent.serve.app import SERVICES
from ascent.serve.config import PORT, Deployed, EngineLimits, JobLimits, ServerConfig
from ascent.serve.wire.model import SERVICES as KNOWN
from ascent.serve.wire.model import load_service
from ascent.serve.wire.services import served_operations

OPENAI = (
    (
        "POST /v1/chat/completions",
        "Answers a conversation: streams, tools, log-probs, seeds, stop strings, schemas.",
    ),
    ("POST /v1/completions", "Goes on with a text."),
    ("POST /v1/embeddings", "Embeds texts with an embedder of the store."),
    ("GET /v1/models", "Lists what the caller may call."),
    ("GET /v1/models/{id}", "Shows one of them."),
)
Table = Callable[[tuple[str, ...], list[tuple[str, ...]]], str]


GUIDE = f"""# Serving

```sh
pip install 'ascent-posttrain[serve]'
ascent keys create --name first --owner me --scope '*'
ascent serve --model assistant=smollm2-135m-instruct
```

The server listens on loopback, port {PORT}. Without a key nobody enters; the second line prints one, once.
[api.md](api.md) says what is served.

```python
import boto3

runtime = boto3.client("bedrock-runtime", endpoint_url="http://127.0.0.1:{PORT}", region_name="us-east-1")
question = [{{"role": "user", "content": [{{"text": "What is the capital of France?"}}]}}]
print(runtime.converse(modelId="assistant", messages=question)["output"]["message"])
```

boto3 takes the key from `AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`, an OpenAI client the bearer key.

## Operation

- `GET /healthz` answers while the process lives; `GET /readyz` answers 503 until models are there, when an engine has
  failed, and while the server drains. Neither needs a key.
- `GET /metrics` is Prometheus' page; beyond loopback it needs a bearer key with the scope `metrics:Read`.
- The log goes to standard error; every line of a request has its `request_id`, which the client got as
  `x-amzn-requestid`.
- On SIGTERM running answers may end (`drain_s`) and training writes a checkpoint; the next start goes on with it. A
  killed server loses no job: what ran begins again at its last checkpoint.
- State is in `home`: the database, `master.key` (the keys' secrets are encrypted under it) and the jobs' folders. A
  copy of database and master key is a backup; without the master key no key works any more.
- Jobs compute at the lowest priority, so that answers do not wait for a training; under a load without pauses a job
  hardly moves.
- Jobs read and write at `file://`, at `s3://` (`pip install 'ascent-posttrain[s3]'`; credentials and `AWS_ENDPOINT_URL`
  from the environment, `AWS_ALLOW_HTTP=true` for a store without TLS) and wherever fsspec has a driver installed.
  `data` says where; `jobs.environment` names the variables that lead to the store.
- `deploy/ascent.service` is a systemd unit, `deploy/Dockerfile` an image.

## Configuration

In rising order: defaults, `ascent serve --config FILE`, variables such as `ASCENT_SERVER_PORT` or
`ASCENT_SERVER_JOBS__SLOTS`, options.
"""


def api_page(table: Table) -> str:
    """Every operation that is served, by service."""
    served = served_operations(SERVICES)
    parts = [
        "# Served operations\n",
        "Unmodified AWS clients drive these with `endpoint_url=`, OpenAI clients with `base_url=` and `/v1`. An",
        "operation of a service below that is not listed is answered with `UnknownOperationException`; a field that is",
        "not understood with `ValidationException`, never by ignoring it.\n",
    ]
    for service in KNOWN:
        rows = [(f"`{operation}`", summary) for name, operation, summary in served if name == service]
        total = len(load_service(service).operations)
        parts.append(f"## {service}\n\n{len(rows)} of {total} operations.\n")
        if rows:
            parts.append(table(("operation", "what it does"), rows))
    parts += ["## OpenAI\n", table(("route", "what it does"), [(f"`{route}`", words) for route, words in OPENAI])]
    return "\n".join(parts)


def serving_page(fields: Callable[[type[BaseModel]], str]) -> str:
    """How to start, configure and operate the server."""
    parts = [GUIDE]
    for kind in (ServerConfig, Deployed, EngineLimits, JobLimits):
        parts += [f"### {kind.__name__}\n", f"{kind.__doc__}\n", fields(kind)]
    return "\n".join(parts)
