"""Tune, deploy and call a model with nothing but boto3, against a server that runs with `ascent serve`.

    ascent keys create --name me --owner me --scope '*'     prints the keys
    export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_REGION=us-east-1
    ascent serve &
    python customize_with_boto3.py                          --short takes about a minute on two cores

The job trains on the example's directions and measures start and result on validation rows; its verdict lets the
deployment be made. The data are read from file://, so script and server share a machine; s3:// works as well.
"""

# ruff: noqa: T201 - a script that talks to whoever runs it

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import boto3

sys.path.insert(0, str(Path(__file__).resolve().parent))

import generate

SYSTEM = "Label the direction."
ASKED = "take 1 to 2 tablets by mouth every 4 to 6 hours as needed for pain for 10 days"
SMALL = {"train": 128, "validation": 48, "test": 8, "prompts": 4}
SHORT = {"epochCount": "1", "batchSize": "16", "learningRate": "0.002", "tokenBudget": "1024"}
WHOLE = {"epochCount": "1.3", "batchSize": "16", "learningRate": "0.001"}


def write_data(folder: Path, *, short: bool) -> dict[str, str]:
    """Write training and validation rows in Bedrock's conversation format; return their addresses."""
    if short:
        generate.SIZES = SMALL
    made = generate.make(seed=7)
    addresses = {}
    for name in ("train", "validation"):
        file = folder / f"{name}.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for row in made[name]:
                conversation = {
                    "schemaVersion": "bedrock-conversation-2024",
                    "system": [{"text": SYSTEM}],
                    "messages": [
                        {"role": "user", "content": [{"text": row.text}]},
                        {"role": "assistant", "content": [{"text": row.target}]},
                    ],
                }
                out.write(json.dumps(conversation, ensure_ascii=False) + "\n")
        addresses[name] = file.absolute().as_uri()
    return addresses


def wait(ask: Callable[[], dict[str, Any]], done: str, failed: tuple[str, ...], every_s: float = 1.0) -> dict[str, Any]:
    """Ask until the status is `done`; leave with the server's message when it is one of `failed`."""
    shown = None
    while True:
        answer = ask()
        if answer["status"] != shown:
            shown = answer["status"]
            print(f"  {shown}")
        if answer["status"] == done:
            return answer
        if answer["status"] in failed:
            sys.exit(f"{answer['status']}: {answer.get('failureMessage', 'no message')}")
        time.sleep(every_s)


def main() -> None:
    """Run the whole way once."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    place = os.environ.get("ASCENT_ENDPOINT", "http://127.0.0.1:8484")
    parser.add_argument("--endpoint", default=place, help="The server's address; default $ASCENT_ENDPOINT.")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="The base model.")
    parser.add_argument("--folder", type=Path, help="Where data and results go; by default a temporary folder.")
    parser.add_argument("--short", action="store_true", help="Few rows: shows the way, not the quality.")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="pharmacy-"))
    folder.mkdir(parents=True, exist_ok=True)
    region = os.environ.get("AWS_REGION", "us-east-1")
    bedrock = boto3.client("bedrock", endpoint_url=given.endpoint, region_name=region)
    runtime = boto3.client("bedrock-runtime", endpoint_url=given.endpoint, region_name=region)

    data = write_data(folder, short=given.short)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    job = bedrock.create_model_customization_job(
        jobName=f"directions-{stamp}",
        customModelName="directions",
        roleArn="arn:aws:iam::000000000000:role/not-used",
        baseModelIdentifier=given.model,
        customizationType="FINE_TUNING",
        trainingDataConfig={"s3Uri": data["train"]},
        validationDataConfig={"validators": [{"s3Uri": data["validation"]}]},
        outputDataConfig={"s3Uri": (folder / "results").absolute().as_uri()},
        hyperParameters=SHORT if given.short else WHOLE,
    )["jobArn"]
    print(f"job {job}")
    failed = ("Failed", "Stopped")
    ended = wait(lambda: bedrock.get_model_customization_job(jobIdentifier=job), "Completed", failed)
    print(f"trained: training loss {ended['trainingMetrics']['trainingLoss']:.3f}", end=", ")
    print(f"validation loss {ended['validationMetrics'][0]['validationLoss']:.3f}")

    deployment = bedrock.create_custom_model_deployment(
        modelDeploymentName=f"directions-{stamp}", modelArn=ended["outputModelArn"]
    )["customModelDeploymentArn"]
    print(f"deployment {deployment}")
    named = {"customModelDeploymentIdentifier": deployment}
    wait(lambda: bedrock.get_custom_model_deployment(**named), "Active", ("Failed",))

    answer = runtime.converse(
        modelId=deployment,
        system=[{"text": SYSTEM}],
        messages=[{"role": "user", "content": [{"text": ASKED}]}],
        inferenceConfig={"maxTokens": 64, "temperature": 0.0},
    )
    print(f"asked:    {ASKED}")
    print(f"answered: {answer['output']['message']['content'][0]['text']}")
    print(f"usage:    {answer['usage']}")
    time.sleep(1.0)  # calls are charged a moment after they are answered
    for name, arn in (("job", job), ("deployment", deployment)):
        tags = {tag["key"]: tag["value"] for tag in bedrock.list_tags_for_resource(resourceARN=arn)["tags"]}
        print(f"{name} cost: {tags.get('ascent:cost', 'nothing yet')} for {tags.get('ascent:tokens', 0)} tokens")


if __name__ == "__main__":
    main()
