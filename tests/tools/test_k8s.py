"""The Kubernetes example: manifests as the API server's schemas want them, and the links that no schema sees."""

import copy
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from kubernetes_validate import ValidationError, validate
from kubernetes_validate.utils import all_versions
from packaging.requirements import Requirement

from fly_build.cli import main as fly_build
from fly_trt.cli.triton import main as fly_triton
from fly_trt.runtime.metrics import GAUGES, PREFIX

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tools" / "k8s"
# preStop's sleep, the newest field in use, is on by default from 1.30 on.
VERSIONS = [version for version in dict.fromkeys(all_versions()) if int(version.split(".")[1]) >= 30]
MANIFESTS: dict[tuple[str, str], dict[str, Any]] = {
    (manifest["kind"], manifest["metadata"]["name"]): manifest
    for file in ("model-repository.yaml", "fly-trt.yaml")
    for manifest in yaml.safe_load_all((FOLDER / file).read_text(encoding="utf-8"))
}
COMMANDS: dict[str, click.Command] = {"fly-build": fly_build, "fly-triton": fly_triton}
DEPLOYMENT, JOB = MANIFESTS["Deployment", "fly-trt"]["spec"], MANIFESTS["Job", "fly-trt-build"]["spec"]
AUTOSCALER = MANIFESTS["HorizontalPodAutoscaler", "fly-trt"]["spec"]
POD, JOB_POD = DEPLOYMENT["template"]["spec"], JOB["template"]["spec"]
(SERVER,), (BUILDER,) = POD["containers"], JOB_POD["containers"]
LABELS = DEPLOYMENT["template"]["metadata"]["labels"]
PORTS = {port["name"]: port["containerPort"] for port in SERVER["ports"]}
(RULE,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def server_option(name: str) -> str:
    (value,) = [argument.partition("=")[2] for argument in SERVER["args"] if argument.startswith(f"--{name}=")]
    return value


def command_lines() -> list[list[str]]:
    (script,) = BUILDER["args"]
    return [shlex.split(line) for line in script.replace("\\\n", "").splitlines()]


def option(name: str, command: list[str]) -> str:
    return command[command.index(name) + 1]


def adapter_metrics() -> dict[str, str]:
    """The names that the rule gives to the gauges it finds, as prometheus-adapter makes them: by `matches` and `as`."""
    (series,) = re.findall(r'__name__=~"(.*?)"', RULE["seriesQuery"])
    found = [PREFIX + name for name in GAUGES if re.fullmatch(series, PREFIX + name)]
    template = re.sub(r"\$\{(\d+)\}", r"\\g<\1>", RULE["name"]["as"])
    return {re.fullmatch(RULE["name"]["matches"], name).expand(template): name for name in found}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=map(" ".join, MANIFESTS))
def test_a_manifest_has_the_fields_of_its_kind_and_no_others(manifest: dict[str, Any], version: str) -> None:
    assert version.startswith(validate(manifest, version, strict=True))


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "template", "spec", "terminationGracePeriod"), 30),
        ("Deployment", ("spec", "template", "spec", "containers", 0, "readinessProbe", "httpGet"), {"path": "/"}),
        ("Service", ("spec", "ports", 0, "port"), "http"),
        ("HorizontalPodAutoscaler", ("spec", "metrics", 0, "pods", "metricName"), "waiting"),
    ],
    ids=["unknown field", "missing field", "wrong type", "field of an older API"],
)
def test_a_broken_manifest_is_refused(kind: str, path: tuple[str | int, ...], value: object) -> None:
    broken = copy.deepcopy(MANIFESTS[kind, "fly-trt"])
    place: Any = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ValidationError):
        validate(broken, VERSIONS[-1], strict=True)


def test_selectors_choose_the_servers_pods_and_not_the_jobs() -> None:
    services = [manifest["spec"]["selector"] for (kind, _), manifest in MANIFESTS.items() if kind == "Service"]
    others = [DEPLOYMENT, MANIFESTS["PodDisruptionBudget", "fly-trt"]["spec"]]
    spread = [constraint["labelSelector"] for constraint in POD["topologySpreadConstraints"]]
    selectors = services + [other["selector"]["matchLabels"] for other in others] + [s["matchLabels"] for s in spread]
    assert len(selectors) == 5
    for selector in selectors:
        assert selector.items() <= LABELS.items()
        assert not selector.items() <= JOB["template"]["metadata"]["labels"].items()


def test_ports_are_tritons_own_and_services_lead_to_them() -> None:
    assert PORTS == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for (kind, _), manifest in MANIFESTS.items():
        for port in manifest["spec"]["ports"] if kind == "Service" else ():
            assert PORTS[port["targetPort"]] == port["port"]


def test_prometheus_scrapes_the_metrics_port() -> None:
    annotations = DEPLOYMENT["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/port"] == str(PORTS["metrics"])
    assert annotations["prometheus.io/path"] == "/metrics"


def test_probes_ask_the_server_until_it_is_up_and_then_the_model_that_the_job_writes() -> None:
    name = next(option.default for option in fly_triton.params if option.name == "name")
    assert SERVER["startupProbe"]["httpGet"] == {"path": "/v2/health/ready", "port": "http"}
    for probe in ("readiness", "liveness"):
        assert SERVER[f"{probe}Probe"]["httpGet"] == {"path": f"/v2/models/{name}/ready", "port": "http"}


def test_a_rollout_waits_longer_than_a_pod_may_take_to_load() -> None:
    probe = SERVER["startupProbe"]
    assert DEPLOYMENT["progressDeadlineSeconds"] > probe["periodSeconds"] * probe["failureThreshold"] >= 600


def test_a_pod_that_ends_has_time_for_its_running_requests() -> None:
    pause = SERVER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pause > 0
    assert POD["terminationGracePeriodSeconds"] > pause + int(server_option("exit-timeout-secs"))


def test_a_rollout_takes_no_pod_away_before_the_next_one_is_ready() -> None:
    assert DEPLOYMENT["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    assert "replicas" not in DEPLOYMENT, "applying the file again would reset the autoscaler's number"


@pytest.mark.parametrize(("pod", "container"), [(POD, SERVER), (JOB_POD, BUILDER)], ids=["server", "job"])
def test_mounts_name_volumes_and_volumes_are_mounted(pod: dict[str, Any], container: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
    assert ("PersistentVolumeClaim", volumes["models"]["persistentVolumeClaim"]["claimName"]) in MANIFESTS


def test_the_server_cannot_write_to_the_models_and_has_shared_memory() -> None:
    mounts = {mount["mountPath"]: mount for mount in SERVER["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert mounts["/models"]["readOnly"]
    assert volumes[mounts["/models"]["name"]]["persistentVolumeClaim"]["readOnly"]
    assert volumes[mounts["/dev/shm"]["name"]]["emptyDir"]["medium"] == "Memory"


def test_engines_are_built_for_the_gpu_that_serves_them() -> None:
    assert JOB_POD["nodeSelector"] == POD["nodeSelector"]
    for container in (SERVER, BUILDER):
        assert container["resources"]["limits"]["nvidia.com/gpu"] >= 1


def test_the_job_writes_the_repository_that_the_server_reads() -> None:
    build, repository = command_lines()
    assert option("--backend", build) == "tensorrt"
    assert repository[1] == option("-o", build)
    assert "--copy-engines" in repository, "the engines must be on the volume too"
    assert option("-o", repository) == server_option("model-repository")
    mounts = {mount["mountPath"]: mount["name"] for mount in BUILDER["volumeMounts"]}
    assert option("-o", repository).startswith("/models/")
    assert {mount["mountPath"]: mount["name"] for mount in SERVER["volumeMounts"]}["/models"] == mounts["/models"]


@pytest.mark.parametrize("command", command_lines(), ids=lambda command: command[0])
def test_the_jobs_command_lines_are_ones_that_fly_trt_has(command: list[str]) -> None:
    assert command[0] in PROJECT["scripts"]
    COMMANDS[command[0]].make_context(command[0], command[1:])  # raises UsageError for what it does not know


def test_images_have_one_base_and_one_tensorrt() -> None:
    (tag,) = re.findall(r"^FROM nvcr\.io/nvidia/tritonserver:([\d.]+)-py3 AS serve$", DOCKERFILE, re.MULTILINE)
    assert re.findall(r"^FROM (\w+) AS build$", DOCKERFILE, re.MULTILINE) == ["serve"]
    names = [(SERVER["image"], "serve"), (BUILDER["image"], "build")]
    for image, stage in names:
        assert image.endswith(f":{tag}")
        assert f"--target {stage} -t {image} ." in DOCKERFILE
    (pin,) = re.findall(r'^ENV TENSORRT_PIN="tensorrt==([\d.]+)"$', DOCKERFILE, re.MULTILINE)
    assert DOCKERFILE.count('"$TENSORRT_PIN"') == DOCKERFILE.count("RUN pip install")
    requirements = map(Requirement, PROJECT["optional-dependencies"]["tensorrt"])
    assert any(requirement.name == "tensorrt" and pin in requirement.specifier for requirement in requirements)


def test_the_image_copies_what_the_repository_has() -> None:
    sources = [source for line in re.findall(r"^COPY (.*)$", DOCKERFILE, re.MULTILINE) for source in line.split()[:-1]]
    assert {"pyproject.toml", "fly_trt", "build/fly_build"} <= set(sources)
    assert all((ROOT / source).exists() for source in sources)


def test_the_autoscaler_scales_the_deployment() -> None:
    assert AUTOSCALER["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "fly-trt"}


def test_the_autoscaler_asks_for_metrics_that_the_adapter_makes_of_fly_trts_gauges() -> None:
    asked = [metric["pods"]["metric"]["name"] for metric in AUTOSCALER["metrics"]]
    assert asked[0] == "fly_trt_num_requests_waiting"
    assert adapter_metrics() == {name: name.replace("fly_trt_", PREFIX) for name in asked}


def test_the_adapters_rule_sums_the_instances_of_a_pod() -> None:
    # The adapter refuses fields that it does not know.
    assert RULE.keys() == {"seriesQuery", "resources", "name", "metricsQuery"}
    assert RULE["resources"]["overrides"] == {"namespace": {"resource": "namespace"}, "pod": {"resource": "pod"}}
    assert RULE["metricsQuery"] == "sum(<<.Series>>{<<.LabelMatchers>>}) by (<<.GroupBy>>)"


def test_the_autoscaler_grows_before_the_slots_are_full_and_shrinks_slowly() -> None:
    slots = int(option("--max-batch-size", command_lines()[0]))
    running = AUTOSCALER["metrics"][1]["pods"]
    assert running["metric"]["name"].endswith("running")
    assert int(running["target"]["averageValue"]) < slots
    up, down = AUTOSCALER["behavior"]["scaleUp"], AUTOSCALER["behavior"]["scaleDown"]
    assert up["stabilizationWindowSeconds"] < down["stabilizationWindowSeconds"]
    assert up["policies"][0]["periodSeconds"] < down["policies"][0]["periodSeconds"]


def test_the_readme_names_every_file() -> None:
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [file.name for file in FOLDER.iterdir() if file.name != "README.md" and f"`{file.name}`" not in readme] == []
