"""The bedrock control plane: answers fit botocore's model, jobs survive being killed, bad input is explained."""

from __future__ import annotations

import csv
import json
import threading
import time
from decimal import Decimal
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from laws.helpers import PROGRAM
from unit.inference_files import serve
from wire.bedrock_house import QUICK, WORDS, House, caller, trees
from wire.echo import running

from ascent.inference.gguf_export import export_gguf
from ascent.inference.store import Store
from ascent.jobs.ledger import Ledger
from ascent.jobs.prices import Price, PriceList
from ascent.jobs.specs import STOP_FILE
from ascent.jobs.worker import Worker
from ascent.records.errors import AscentError, BadInput, UnknownName
from ascent.serve.kinds import KINDS
from ascent.serve.kinds.customize import PHASES
from ascent.serve.models import EVERYONE, Target
from ascent.serve.services.bedrock import Bedrock
from ascent.serve.wire.errors import ServiceError
from ascent.serve.wire.services import handlers_of


def test_no_part_of_the_service_hides_a_helper_of_another() -> None:
    names: list[str] = []
    for part in Bedrock.__mro__[1:-1]:
        names += [name for name, value in vars(part).items() if callable(value) and not name.startswith("__")]
    assert sorted(names) == sorted(set(names))
    assert len(handlers_of(Bedrock)) == sum(not name.startswith("_") for name in names)


@pytest.fixture
def house(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.setenv("ASCENT_HOME", str(tmp_path / "home"))
    return House(tmp_path, tiny_model)


def refused(call: Any, *parts: str, error: type[AscentError] = AscentError, **request: Any) -> None:
    """Expect a refusal whose message has all the parts."""
    with pytest.raises(error) as caught:
        call(**request)
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_fine_tuning_ends_in_a_measured_version_with_its_lineage(house: House) -> None:
    arn = house.customize(customModelTags=[{"key": "team", "value": "forest"}])
    assert house.job(arn)["status"] == "InProgress"
    assert house.job(arn)["statusDetails"]["trainingDetails"]["status"] == "NotStarted"
    house.work()
    job = house.job(arn)
    assert job["status"] == "Completed", job.get("failureMessage")
    assert {part["status"] for part in job["statusDetails"].values()} == {"Completed"}
    assert job["creationTime"] <= job["lastModifiedTime"] <= job["endTime"]
    assert 0 < job["trainingMetrics"]["trainingLoss"] < 3
    model = house.call("get_custom_model", modelIdentifier=job["outputModelArn"])
    assert model["modelName"] == "trees" and model["baseModelArn"].endswith("::foundation-model/tiny")
    assert model["hyperParameters"] == {**QUICK, "epochCount": "3"} and model["customizationType"] == "FINE_TUNING"
    version = house.registry.find("trees", "ann")
    evidence = house.registry.evidence(version.id)
    before, after = (report.metrics["log_likelihood"].value for report in evidence.reports)
    assert after > before and evidence.verdicts[0].decision.value == "GO"
    assert model["validationMetrics"][0]["validationLoss"] == pytest.approx(-after, rel=0.2)
    train, held_out = version.lineage.data
    assert (train.rows, held_out.rows) == (16, 24) and train.path.startswith("file://")
    assert version.lineage.recipe["optim"]["lr"] == 0.01 and version.base == house.store.card("tiny").id
    assert house.store.card(version.model).kind == "adapter"
    results = house.folder / "out" / f"model-customization-job-{arn.rpartition('/')[2]}"
    steps = list(csv.DictReader((results / "training_artifacts/step_wise_training_metrics.csv").open()))
    assert [row["step_number"] for row in steps] == [str(step) for step in range(1, 13)]
    tags = house.call("list_tags_for_resource", resourceARN=job["outputModelArn"])["tags"]
    assert tags == [{"key": "team", "value": "forest"}]


def test_a_killed_job_goes_on_and_registers_once(house: House) -> None:
    arn = house.customize()
    for phase in PHASES:
        house.work(break_in=phase)
        assert house.job(arn)["status"] == "InProgress"
    house.work()
    assert house.job(arn)["status"] == "Completed"
    assert len(house.registry.versions("trees", "ann")) == 1
    assert [event.event for event in house.registry.history("trees", "ann")] == ["added"]
    folder = house.queue.get(arn.rpartition("/")[2]).folder
    logged = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(logged) == 12, "a step was done twice"


def test_a_job_reads_what_it_read_first(house: House) -> None:
    arn = house.customize()
    house.work(break_in="training")
    house.put("trees.jsonl", "not json at all\n")
    house.work()
    assert house.job(arn)["status"] == "Completed"


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', ("train.jsonl:2", "malformed JSON")),
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": 7, "completion": "b"}\n', ("train.jsonl:3", "[prompt]")),
        ('{"prompt": "a"}\n', ("train.jsonl:1", "[target]", "is missing")),
        ('{"schemaVersion": "v9", "messages": []}\n', ("train.jsonl:1", "bedrock-conversation-2024")),
        (
            '{"messages": [{"role": "user", "content": [{"image": {}}]}, {"role": "assistant", "content": "x"}]}\n',
            ("train.jsonl:1", "messages[0].content[0]"),
        ),
        ('{"prompt": "say <|im_end|> now", "completion": "b"}\n', ("train.jsonl:1", "<|im_end|>")),
        (json.dumps({"prompt": "long " * 400, "completion": "b"}) + "\n", ("train.jsonl:1", "limit is 256")),
        ("", ("train.jsonl", "empty")),
    ],
)
def test_malformed_data_fail_the_job_with_their_line_before_any_training(
    house: House, rows: str, parts: tuple[str, ...]
) -> None:
    arn = house.customize(trainingDataConfig={"s3Uri": house.put("train.jsonl", rows)})
    house.work()
    job = house.job(arn)
    assert job["status"] == "Failed"
    assert all(part in job["failureMessage"] for part in parts), job["failureMessage"]
    details = {name: part["status"] for name, part in job["statusDetails"].items()}
    assert details["validationDetails"] == "Failed" and details["trainingDetails"] == "NotStarted"
    assert str(house.folder / "home") not in job["failureMessage"], "the server's own paths are nobody's business"
    assert not (house.queue.get(arn.rpartition("/")[2]).folder / "run").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"baseModelIdentifier": "tinny"}, ("tinny", "tiny")),
        ({"hyperParameters": {"learningrate": "1"}}, ("unknown hyperparameter", "learningRate", "loraRank")),
        ({"hyperParameters": {"epochCount": "many"}}, ("epochCount", "'many'")),
        ({"hyperParameters": {"loraRank": "0"}}, ("loraRank", "greater than or equal to 1")),
        ({"hyperParameters": {"method": "grpo"}}, ("grpo", "FINE_TUNING", "sft")),
        ({"hyperParameters": {"useCase": "pharmacy"}}, ("use case", "pharmacy", "usecases/")),
        ({"hyperParameters": {"adapter": "none", "loraRank": "4"}}, ("adapter=none",)),
        ({"customizationType": "DISTILLATION"}, ("teacherModelIdentifier",)),
        ({"customizationType": "REINFORCEMENT_FINE_TUNING"}, ("lambdaArn",)),
        ({"customizationType": "IMPORTED"}, ("IMPORTED", "FINE_TUNING")),
        ({"trainingDataConfig": {"s3Uri": "train.jsonl"}}, ("no address",)),
        ({"trainingDataConfig": {"s3Uri": "zip://a::file:///etc/passwd"}}, ("no address",)),
        ({"trainingDataConfig": {"s3Uri": "reference://a/b"}}, ("reference://", "not supported")),
        ({"outputDataConfig": {"s3Uri": "SERVER/out"}}, ("server's own folder",)),
        ({"customModelKmsKeyId": "arn:aws:kms:us-east-1:000000000000:key/a"}, ("customModelKmsKeyId",)),
        ({"customModelTags": [{"key": "ascent:cost", "value": "0"}]}, ("ascent:cost",)),
    ],
)
def test_requests_that_cannot_work_are_refused_at_once(
    house: House, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    if "SERVER" in str(changes.get("outputDataConfig")):
        changes = {"outputDataConfig": {"s3Uri": (house.folder / "home" / "server" / "out").as_uri()}}
    refused(house.customize, *parts, **changes)
    assert changes.keys() == {"customModelTags"} or not house.queue.list()


def test_a_deployment_needs_a_verdict_or_somebody_who_answers_for_it(house: House) -> None:
    arn = house.customize(validationDataConfig=None)
    house.work()
    model = house.job(arn)["outputModelArn"]
    named = {"modelDeploymentName": "trees-live", "modelArn": model}
    refused(
        house.call,
        *("has no verdict", "ascent:override=REASON", "validation file"),
        error=BadInput,
        operation="create_custom_model_deployment",
        **named,
    )
    assert house.call("list_custom_model_deployments")["modelDeploymentSummaries"] == []
    tags = [{"key": "ascent:override", "value": "pilot with ten users"}]
    deployed = house.call("create_custom_model_deployment", **named, tags=tags)["customModelDeploymentArn"]
    version = house.registry.find("trees", "ann")
    assert house.registry.evidence(version.id).overrides == (("pilot with ten users", "ann-key"),)
    house.bedrock.deployer.settle(60)
    assert house.call("get_custom_model_deployment", customModelDeploymentIdentifier=deployed)["status"] == "Active"


def test_a_deployment_lives_updates_and_goes(house: House) -> None:
    models = []
    for number in range(2):
        arn = house.customize(jobName=f"job-{number}", hyperParameters={**QUICK, "seed": str(number)})
        house.work()
        models.append(house.job(arn)["outputModelArn"])
    first, second = (house.registry.get(model.rpartition("/")[2]) for model in models)
    tags = [{"key": "ascent:override", "value": "pilot"}]
    named = {"modelDeploymentName": "live", "tags": tags, "clientRequestToken": "t1"}
    arn = house.call("create_custom_model_deployment", modelArn=models[0], **named)["customModelDeploymentArn"]
    assert house.call("create_custom_model_deployment", modelArn=models[0], **named)["customModelDeploymentArn"] == arn
    house.bedrock.deployer.settle(60)
    id = arn.rpartition("/")[2]
    assert house.models.open(arn, caller(), "Converse").id == id == house.models.open("live", caller(), "Converse").id
    refused(
        lambda: house.call("create_custom_model_deployment", modelArn=models[0], modelDeploymentName="live", tags=tags),
        "already",
    )
    refused(lambda: house.call("delete_custom_model", modelIdentifier=models[0]), id, error=ServiceError)
    gate, update = threading.Event(), {"customModelDeploymentIdentifier": "live", "modelArn": models[1]}
    house.bedrock.deployer._loader.submit(gate.wait, 60)  # something else is loading
    house.call("update_custom_model_deployment", **update)
    refused(lambda: house.call("update_custom_model_deployment", **update | {"modelArn": models[0]}), "being updated")
    gate.set()
    house.bedrock.deployer.settle(60)
    found = house.call("get_custom_model_deployment", customModelDeploymentIdentifier=arn)
    assert found["modelArn"] == models[1] and found["updateDetails"]["updateStatus"] == "UpdateCompleted"
    house.call("delete_custom_model", modelIdentifier=models[0])
    assert not (house.store.models / first.model).exists()
    house.registry.promote("trees", "champion", second.id, owner="ann", by="ann", override="pilot")
    assert house.bedrock.deployer.route("trees:champion", caller()) == (id, None)
    house.call("delete_custom_model_deployment", customModelDeploymentIdentifier=arn)
    refused(lambda: house.bedrock.deployer.route("trees:champion", caller()), "not deployed")
    refused(lambda: house.models.open(arn, caller(), "Converse"), id, error=UnknownName)


def test_what_one_owner_has_does_not_exist_for_another(house: House) -> None:
    arn = house.customize()
    house.work()
    model = house.job(arn)["outputModelArn"]
    stored = house.registry.find("trees", "ann").model
    bob = caller("bob")
    for operation, request in (
        ("get_model_customization_job", {"jobIdentifier": arn}),
        ("get_model_customization_job", {"jobIdentifier": "trees-job"}),
        ("stop_model_customization_job", {"jobIdentifier": arn}),
        ("get_custom_model", {"modelIdentifier": model}),
        ("get_custom_model", {"modelIdentifier": "trees"}),
        ("delete_custom_model", {"modelIdentifier": model}),
        ("list_tags_for_resource", {"resourceARN": arn}),
        ("tag_resource", {"resourceARN": model, "tags": []}),
        ("create_custom_model_deployment", {"modelDeploymentName": "mine", "modelArn": model}),
        ("get_foundation_model", {"modelIdentifier": stored}),
    ):
        with pytest.raises((UnknownName, ServiceError)) as caught:
            house.call(operation, bob, **request)
        assert getattr(caught.value, "code", "ResourceNotFoundException") == "ResourceNotFoundException", operation
    for start in (stored, "trees", model):
        refused(lambda start=start: house.customize(bob, baseModelIdentifier=start), error=UnknownName)
    assert house.call("list_custom_models", bob)["modelSummaries"] == []
    assert house.call("list_model_customization_jobs", bob)["modelCustomizationJobSummaries"] == []
    assert len(house.call("list_custom_models", caller("root", "*", "admin:*"))["modelSummaries"]) == 1
    names = {model["modelId"] for model in house.call("list_foundation_models")["modelSummaries"]}
    assert "tiny" in names and not any("trees" in name for name in names)


def test_preferences_train_on_what_was_tuned_before(house: House) -> None:
    first = house.customize()
    house.work()
    pairs = [
        {"prompt": f"Name tree {n}.", "chosen": f"{WORDS[n % 8]} tree", "rejected": "No idea, 42!"} for n in range(24)
    ]
    arn = house.customize(
        jobName="dpo-job",
        baseModelIdentifier=house.job(first)["outputModelArn"],
        trainingDataConfig={"s3Uri": house.put("pairs.jsonl", pairs)},
        validationDataConfig={"validators": [{"s3Uri": house.put("held.jsonl", pairs)}]},
        hyperParameters={**QUICK, "method": "dpo", "axes.beta": "0.2", "learningRateWarmupSteps": "2"},
    )
    house.work()
    job = house.job(arn)
    assert job["status"] == "Completed", job.get("failureMessage")
    sft, dpo = house.registry.versions("trees", "ann")
    assert [version.lineage.method for version in house.registry.ancestry(dpo.id)] == ["dpo", "sft"]
    assert dpo.parent == sft.id and dpo.base == sft.base
    assert house.store.card(dpo.model).kind == "merged", "an adapter of a merged model fits no base of the store"
    assert dpo.lineage.recipe["axes"] == {"beta": 0.2}
    assert dpo.lineage.recipe["optim"]["warmup_fraction"] == pytest.approx(2 / 6)
    verdict = house.registry.evidence(dpo.id).verdicts[0]
    assert verdict.changes[0].metric == "preference_margin" and verdict.decision.value == "GO"


def test_text_distillation_and_rewards_run_too(house: House, use_case: Path) -> None:
    case = house.folder / "home" / "server" / "usecases" / "letters"
    case.mkdir(parents=True)
    (case / "program.py").write_text(PROGRAM)
    (case / "test.jsonl").write_text('{"input": {"prompt": "x"}, "expected": {"answer": "x"}}\n')
    (case / "usecase.yaml").write_text(
        "name: letters\ntask: Write letters.\nmodel: tiny\nprogram: program.py\ndata: {test: test.jsonl}\n"
        "sampling: {max_tokens: 8}\nmetrics: {primary: {name: letters, target: 0.9}}\nstages: [prompt]\n"
    )
    text = house.put("corpus.txt", "The oak is a tree. It grows slowly. " * 20)
    prompts = house.put("prompts.jsonl", [{"prompt": f"Name tree {n}."} for n in range(8)])
    common = {"validationDataConfig": None, "hyperParameters": QUICK}
    arns = [
        house.customize(
            jobName="cpt",
            customizationType="CONTINUED_PRE_TRAINING",
            trainingDataConfig={"s3Uri": text},
            **common,
        ),
        house.customize(
            jobName="distil",
            customizationType="DISTILLATION",
            customizationConfig={
                "distillationConfig": {
                    "teacherModelConfig": {"teacherModelIdentifier": "tiny", "maxResponseLengthForInference": 40}
                }
            },
            trainingDataConfig={"s3Uri": prompts},
            validationDataConfig=None,
            hyperParameters={**QUICK, "teacherSamples": "64", "teacherTemperature": "1.0"},
        ),
        house.customize(
            jobName="rft",
            customizationType="REINFORCEMENT_FINE_TUNING",
            customizationConfig={
                "rftConfig": {
                    "graderConfig": {
                        "lambdaGrader": {"lambdaArn": "arn:aws:lambda:us-east-1:000000000000:function:letters:letters"}
                    },
                    "hyperParameters": {"trainingSamplePerPrompt": 4, "inferenceMaxTokens": 8, "epochCount": 1},
                }
            },
            trainingDataConfig={"s3Uri": prompts},
            validationDataConfig={"validators": [{"s3Uri": prompts}]},
            hyperParameters={name: value for name, value in QUICK.items()},
        ),
    ]
    house.work()
    for arn in arns:
        assert house.job(arn)["status"] == "Completed", house.job(arn).get("failureMessage")
    cpt, distil, rft = house.registry.versions("trees", "ann")
    assert (cpt.lineage.method, distil.lineage.method, rft.lineage.method) == ("cpt", "distill_sequence", "grpo")
    assert rft.lineage.recipe["steps"] == 2 and rft.lineage.recipe["prompts_per_step"] == 4
    assert rft.lineage.recipe["reward"]["grader"] == "letters"
    assert house.registry.evidence(rft.id).verdicts[0].changes[0].metric == "letters"


def test_models_come_in_as_folder_gguf_and_adapter(house: House, tiny_model: Path) -> None:
    export_gguf(str(tiny_model), house.folder / "tiny.gguf", house.store)
    house.customize()
    house.work()
    adapter = house.store.models / house.registry.find("trees", "ann").model
    places = {"folder": tiny_model, "gguf": house.folder / "tiny.gguf", "adapter": adapter}
    jobs = {}
    for name, place in places.items():
        source = {"s3DataSource": {"s3Uri": f"file://{place}"}}
        asked = {"jobName": f"import-{name}", "importedModelName": name, "roleArn": "none", "modelDataSource": source}
        jobs[name] = house.call("create_model_import_job", **asked)["jobArn"]
    house.work()
    for name, job in jobs.items():
        found = house.call("get_model_import_job", jobIdentifier=job)
        assert found["status"] == "Completed", found.get("failureMessage")
        model = house.call("get_imported_model", modelIdentifier=found["importedModelArn"])
        assert model["modelName"] == name
        kind = house.store.card(house.registry.find(name, "ann").model).kind
        assert kind == ("adapter" if name == "adapter" else "base")
    assert len(house.call("list_imported_models")["modelSummaries"]) == 3
    imported = house.call("get_model_import_job", jobIdentifier=jobs["folder"])["importedModelArn"]
    version = house.registry.find("folder", "ann", "imported")
    assert house.models.open(imported, caller(), "Converse").id == version.id
    refused(lambda: house.models.open(imported, caller("bob"), "Converse"), error=UnknownName)
    house.call("delete_imported_model", modelIdentifier="folder")
    refused(lambda: house.models.open(imported, caller(), "Converse"), error=UnknownName)
    custom = house.call("create_custom_model", modelName="brought", modelSourceConfig=source)["modelArn"]
    assert house.call("get_custom_model", modelIdentifier=custom)["modelStatus"] == "Creating"
    house.work()
    assert house.call("get_custom_model", modelIdentifier=custom)["modelStatus"] == "Active"
    refused(
        lambda: house.call("create_custom_model_deployment", modelDeploymentName="b", modelArn=custom), "no verdict"
    )


def test_a_batch_goes_on_behind_what_is_answered(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascent.serve.kinds.batch_inference.BATCH", 4)
    turn = {"messages": [{"role": "user", "content": [{"text": "Name a tree."}]}], "inferenceConfig": {"maxTokens": 4}}
    rows: list[Any] = [{"recordId": f"R{n:02d}", "modelInput": turn} for n in range(10)]
    rows[3] = {"recordId": "R03", "modelInput": {**turn, "inferenceConfig": {"maxTokens": 4000}}}
    text = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n"
    arn = house.call(
        "create_model_invocation_job",
        jobName="batch",
        roleArn="none",
        modelId="tiny",
        modelInvocationType="Converse",
        inputDataConfig={"s3InputDataConfig": {"s3Uri": house.put("batch.jsonl", text)}},
        outputDataConfig={"s3OutputDataConfig": {"s3Uri": house.out}},
    )["jobArn"]
    assert house.call("get_model_invocation_job", jobIdentifier=arn)["status"] == "Submitted"
    house.work(stop=lambda context: (context.folder / STOP_FILE.format(context.attempt)).touch())
    assert house.call("get_model_invocation_job", jobIdentifier=arn)["totalRecordCount"] == 11
    answered = house.queue.get(arn.rpartition("/")[2]).folder / "output" / ".batch.jsonl.out.progress"
    first = answered.read_text()
    assert first.count("\n") == 4
    house.work()
    found = house.call("get_model_invocation_job", jobIdentifier=arn)
    assert (found["status"], found["successRecordCount"], found["errorRecordCount"]) == ("Completed", 9, 2)
    assert answered.read_text().startswith(first) and answered.read_text().count("\n") == 11
    out = house.folder / "out" / arn.rpartition("/")[2]
    written = [json.loads(line) for line in (out / "batch.jsonl.out").read_text().splitlines()]
    assert [row["recordId"] for row in written] == [f"R{n:02d}" for n in range(10)] + ["LINE0000011"]
    assert "the context holds 256" in written[3]["error"]["errorMessage"]
    assert "line 11 is no record" in written[10]["error"]["errorMessage"]
    answer = written[0]["modelOutput"]
    assert answer["usage"]["outputTokens"] <= 4 and answer["output"]["message"]["role"] == "assistant"
    manifest = json.loads((out / "manifest.json.out").read_text())
    tokens = [row["modelOutput"]["usage"]["outputTokens"] for row in written if "modelOutput" in row]
    assert manifest["outputTokenCount"] == sum(tokens) > 0


def test_an_evaluation_of_two_models_gives_the_second_its_verdict(house: House) -> None:
    arn = house.customize(validationDataConfig=None, hyperParameters={**QUICK, "epochCount": "30", "batchSize": "8"})
    house.work()
    version = house.registry.find("trees", "ann")
    dataset = {"name": "trees", "datasetLocation": {"s3Uri": house.put("test.jsonl", trees(24))}}
    measured = {"taskType": "QuestionAndAnswer", "dataset": dataset, "metricNames": ["Builtin.contains", "exact"]}
    asked = {
        "jobName": "measure",
        "roleArn": "none",
        "evaluationConfig": {"automated": {"datasetMetricConfigs": [measured]}},
        "inferenceConfig": {
            "models": [
                {"bedrockModel": {"modelIdentifier": name, "inferenceParams": '{"maxTokens": 12}'}}
                for name in ("tiny", house.job(arn)["outputModelArn"])
            ]
        },
        "outputDataConfig": {"s3Uri": house.out},
    }
    job = house.call("create_evaluation_job", **asked)["jobArn"]
    house.work()
    found = house.call("get_evaluation_job", jobIdentifier=job)
    assert found["status"] == "Completed", found.get("failureMessages")
    evidence = house.registry.evidence(version.id)
    verdict, report = evidence.verdicts[0], evidence.reports[0]
    assert verdict.changes[0].metric == "contains" and report.metrics["contains"].n == 24
    out = house.folder / "out" / "measure" / job.rpartition("/")[2]
    assert json.loads((out / "verdict.json").read_text())["decision"] == verdict.decision.value
    assert len(house.call("list_evaluation_jobs")["jobSummaries"]) == 1
    waiting = house.call("create_evaluation_job", **{**asked, "jobName": "waits"})["jobArn"]
    folder = house.queue.get(job.rpartition("/")[2]).folder
    gone = house.call("batch_delete_evaluation_job", jobIdentifiers=[job, waiting, job])
    assert [each["jobIdentifier"] for each in gone["evaluationJobs"]] == [job] and not folder.exists()
    assert [each["code"] for each in gone["errors"]] == ["ConflictException", "ResourceNotFoundException"]
    assert [each["jobArn"] for each in house.call("list_evaluation_jobs")["jobSummaries"]] == [waiting]
    assert (out / "verdict.json").is_file() and house.registry.evidence(version.id).verdicts == (verdict,)
    measured["metricNames"] = ["accuracy"]
    refused(lambda: house.call("create_evaluation_job", **asked), "accuracy", "exact")


def test_an_evaluation_by_a_judge(house: House) -> None:
    """The judge is a deployed remote model, asked over HTTP; it likes short answers, in the form that was asked for."""
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        body = json.loads(request.rfile.read(int(request.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        asked.append(text)
        name = next(name for name in ("Correctness", "Refusal") if f'"{name}"' in text)
        said = json.dumps({name: {"reason": "as it is", "score": 5 if name == "Correctness" else 1}})
        message = {"role": "assistant", "content": said}
        reply = json.dumps({"model": "judge", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        request.send_response(200)
        request.send_header("Content-Length", str(len(reply)))
        request.end_headers()
        request.wfile.write(reply.encode())

    dataset = {"name": "trees", "datasetLocation": {"s3Uri": house.put("test.jsonl", trees(6))}}
    metrics = {"taskType": "General", "dataset": dataset, "metricNames": ["Builtin.Correctness", "Builtin.Refusal"]}
    request = {
        "jobName": "judged",
        "roleArn": "none",
        "evaluationConfig": {
            "automated": {
                "datasetMetricConfigs": [metrics],
                "evaluatorModelConfig": {"bedrockEvaluatorModels": [{"modelIdentifier": "judge"}]},
            }
        },
        "inferenceConfig": {"models": [{"bedrockModel": {"modelIdentifier": "tiny"}}]},
        "outputDataConfig": {"s3Uri": house.out},
    }
    with serve(answer) as address:
        house.models.deploy("judge", Target(f"remote:{address}/v1#judge"), EVERYONE)
        job = house.call("create_evaluation_job", **request)["jobArn"]
        house.work()
    found = house.call("get_evaluation_job", jobIdentifier=job)
    assert found["status"] == "Completed", found.get("failureMessages")
    out = house.folder / "out" / "judged" / job.rpartition("/")[2]
    summary = json.loads((out / "model-1-1-trees.json").read_text())["summary"]
    assert (summary["Correctness"]["value"], summary["Refusal"]["value"], summary["Refusal"]["n"]) == (1.0, 0.0, 6)
    assert len(asked) == 12 and all("reference answer" in text for text in asked if "Correctness" in text)
    [shown] = house.call("list_evaluation_jobs")["jobSummaries"]
    assert shown["evaluatorModelIdentifiers"] == ["judge"] and address not in json.dumps(found, default=str)
    metrics["metricNames"] = ["Builtin.Correctnes"]
    refused(lambda: house.call("create_evaluation_job", **request), "did you mean 'Correctness'")


def test_jobs_stop_and_lists_have_pages(house: House) -> None:
    arns = [house.customize(jobName=f"job-{number}") for number in range(3)]
    house.call("stop_model_customization_job", jobIdentifier=arns[0])
    assert house.job(arns[0])["status"] == "Stopped"
    refused(lambda: house.call("stop_model_customization_job", jobIdentifier=arns[0]), "is stopped", error=ServiceError)
    seen, token = [], {}
    while True:
        part = house.call("list_model_customization_jobs", maxResults=2, **token)
        seen += [job["jobName"] for job in part["modelCustomizationJobSummaries"]]
        if "nextToken" not in part:
            break
        token = {"nextToken": part["nextToken"]}
    assert seen == ["job-2", "job-1", "job-0"]
    stopped = house.call("list_model_customization_jobs", statusEquals="Stopped")["modelCustomizationJobSummaries"]
    assert [job["jobName"] for job in stopped] == ["job-0"]
    named = house.call("get_model_customization_job", jobIdentifier="job-1")
    assert named["jobArn"] == arns[1]
    tags = [{"key": "a", "value": "1"}]
    house.call("tag_resource", resourceARN=arns[1], tags=tags)
    assert house.call("list_tags_for_resource", resourceARN=arns[1])["tags"] == tags
    house.call("untag_resource", resourceARN=arns[1], tagKeys=["a", "b"])
    assert house.call("list_tags_for_resource", resourceARN=arns[1])["tags"] == []
    assert Store().models == house.store.models


@pytest.mark.slow
def test_unmodified_boto3_goes_the_whole_way(house: House, tmp_path: Path) -> None:
    """Job in a worker's own process, verdict, deployment, Converse by ARN, by name and by alias, cost, and errors."""
    from ascent.serve.services.bedrock_runtime import BedrockRuntime

    prices = PriceList(default=Price(training=Decimal("0.5")))
    worker = Worker(house.queue, KINDS, 1, memory_mb=16_000, ledger=Ledger(house.engine, prices), poll_s=0.05)
    runtime = BedrockRuntime(house.models, tmp_path / "guardrails")
    with running(tmp_path / "wire", [house.bedrock, runtime]) as server:
        ann = server.key("ann")
        client, talk = (server.client(name, ann) for name in ("bedrock", "bedrock-runtime"))
        asked = {
            "jobName": "trees-job",
            "customModelName": "trees",
            "roleArn": "arn:aws:iam::000000000000:role/none",
            "baseModelIdentifier": "tiny",
            "trainingDataConfig": {"s3Uri": house.put("trees.jsonl", trees(16))},
            "validationDataConfig": {"validators": [{"s3Uri": house.put("validation.jsonl", trees(24, begin=3))}]},
            "outputDataConfig": {"s3Uri": house.out},
            "hyperParameters": {**QUICK, "epochCount": "20"},
            "clientRequestToken": "once",
        }
        job = client.create_model_customization_job(**asked)["jobArn"]
        assert client.create_model_customization_job(**asked)["jobArn"] == job
        with pytest.raises(client.exceptions.ResourceNotFoundException):
            server.client("bedrock", server.key("bob")).get_model_customization_job(jobIdentifier=job)
        until = time.monotonic() + 90
        while (found := client.get_model_customization_job(jobIdentifier=job))["status"] == "InProgress":
            assert time.monotonic() < until, found
            worker.wait()
            worker.step()
        assert found["status"] == "Completed", found.get("failureMessage")
        deployed = client.create_custom_model_deployment(
            modelDeploymentName="live", modelArn=found["outputModelArn"], clientRequestToken="once-too"
        )["customModelDeploymentArn"]
        house.bedrock.deployer.settle(60)
        state = client.get_custom_model_deployment(customModelDeploymentIdentifier=deployed)
        assert state["status"] == "Active", state.get("failureMessage")
        with pytest.raises(client.exceptions.ConflictException):
            client.delete_custom_model(modelIdentifier=found["outputModelArn"])
        version = house.registry.find("trees", "ann")
        house.registry.promote("trees", "champion", version.id, owner="ann", by="ann")
        question = [{"role": "user", "content": [{"text": "Name tree 5."}]}]
        greedy = {"temperature": 0.0, "maxTokens": 12}

        def answer(name: str) -> str:
            said = talk.converse(modelId=name, messages=question, inferenceConfig=greedy)
            return str(said["output"]["message"]["content"][0]["text"])

        said = {answer(name) for name in (deployed, "live", "trees:champion", "trees:champion#user-17")}
        assert len(said) == 1 and said.pop().endswith(" tree"), said
        assert not answer("tiny").endswith(" tree")
        tags = {tag["key"]: tag["value"] for tag in client.list_tags_for_resource(resourceARN=job)["tags"]}
        tokens = int(tags["ascent:tokens"])
        assert tokens > 0 and tags["ascent:cost"] == f"{tokens * 0.0005:.6f} USD"
        pages = client.get_paginator("list_custom_models").paginate(PaginationConfig={"PageSize": 1})
        assert [model["modelName"] for part in pages for model in part["modelSummaries"]] == ["trees"]
        with pytest.raises(client.exceptions.ValidationException, match="learningRate"):
            client.create_model_customization_job(**asked | {"hyperParameters": {"lr": "1"}, "clientRequestToken": "x"})
