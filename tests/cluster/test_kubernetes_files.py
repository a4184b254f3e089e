"""The manifests are what Kubernetes and KubeRay read, and they fit each other, the image and the constraints."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from launch_files import CLUSTER
from launching import ROOT

kubernetes_validate = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed (the dev extra brings it)"
)
KUBERNETES = "1.33"

# KubeRay's RayJob, v1, in its own names: RayJobSpec of ray-operator/apis/ray/v1/rayjob_types.go and RayClusterSpec of
# raycluster_types.go in ray-project/kuberay, version 1.7; pod templates are Kubernetes' own and checked as such.
# Only fields that a manifest may want are listed, so any other is refused.
OBJECT: dict[str, Any] = {"type": "object"}
NUMBER = {"type": "integer", "minimum": 0}
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


WORKERS = closed(
    ["groupName", "minReplicas", "maxReplicas", "rayStartParams", "template"],
    groupName={"type": "string"},
    replicas=NUMBER,
    minReplicas=NUMBER,
    maxReplicas=NUMBER,
    idleTimeoutSeconds=NUMBER,
    rayStartParams=STRINGS,
    template=OBJECT,
)
RAY_CLUSTER = closed(
    ["headGroupSpec"],
    rayVersion={"type": "string"},
    authOptions=closed([], mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=closed([], idleTimeoutSeconds=NUMBER, resources=OBJECT, upscalingMode={"type": "string"}),
    headGroupSpec=closed(["rayStartParams", "template"], rayStartParams=STRINGS, template=OBJECT),
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
RAY_JOB = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=OBJECT,
    spec=closed(
        ["entrypoint", "rayClusterSpec"],
        entrypoint={"type": "string"},
        backoffLimit=NUMBER,
        activeDeadlineSeconds=NUMBER,
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=NUMBER,
        submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
        rayClusterSpec=RAY_CLUSTER,
    ),
)


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((CLUSTER / "kubernetes" / name).read_text())


def cluster_spec() -> dict[str, Any]:
    return read("sweep.yaml")["spec"]["rayClusterSpec"]


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod's specification in the manifests, by name."""
    spec = cluster_spec()
    yield "head", spec["headGroupSpec"]["template"]["spec"]
    yield from ((group["groupName"], group["template"]["spec"]) for group in spec["workerGroupSpecs"])
    yield "files", read("files.yaml")["spec"]


each_pod = pytest.mark.parametrize("pod", [pod for _, pod in pods()], ids=[name for name, _ in pods()])


@pytest.mark.parametrize("name", ["storage.yaml", "files.yaml"])
def test_kubernetes_takes_the_manifest(name: str) -> None:
    kubernetes_validate.validate(read(name), KUBERNETES, strict=True)


def template(pod: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": {"spec": pod}}


@each_pod
def test_kubernetes_takes_the_pod(pod: dict[str, Any]) -> None:
    kubernetes_validate.validate(template(pod), KUBERNETES, strict=True)


def test_kubernetes_refuses_a_misspelt_key() -> None:
    with pytest.raises(kubernetes_validate.ValidationError, match="contaners"):
        kubernetes_validate.validate(template({"contaners": []}), KUBERNETES, strict=True)


def test_kuberay_takes_the_job() -> None:
    import jsonschema

    job = read("sweep.yaml")
    jsonschema.validate(job, RAY_JOB)
    # Rules of KubeRay beyond the types (ValidateRayJobMetadata, ValidateRayJobSpec).
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,39})", job["metadata"]["generateName"])
    assert job["spec"]["shutdownAfterJobFinishes"], "ttlSecondsAfterFinished asks for it"
    spec = cluster_spec()
    assert spec["authOptions"]["mode"] == "token"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_cluster_runs_the_ray_that_the_image_has() -> None:
    assert f"ray=={cluster_spec()['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_ray_start_knows_the_parameters() -> None:
    pytest.importorskip("ray", reason="ray is not installed (the tune extra brings it)")
    from ray.scripts.scripts import start

    known = {option.removeprefix("--") for parameter in start.params for option in parameter.opts}
    spec = cluster_spec()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert set(group["rayStartParams"]) <= known
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "trials stay off the head"


@each_pod
def test_the_pod_runs_as_the_images_user_and_gains_no_rights(pod: dict[str, Any]) -> None:
    users = re.findall(r"^USER (\d+)$", (CLUSTER / "docker/Dockerfile").read_text(), re.MULTILINE)
    assert [str(pod["securityContext"][key]) for key in ("runAsUser", "fsGroup")] == [users[-1]] * 2
    for container in pod["containers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False


@each_pod
def test_every_mount_has_its_volume_and_results_go_to_the_claim(pod: dict[str, Any]) -> None:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes)
        assert {"name": "shared", "mountPath": "/shared"} in container["volumeMounts"]
    assert volumes["shared"]["persistentVolumeClaim"]["claimName"] == read("storage.yaml")["metadata"]["name"]
    assert re.search(r"--storage /shared/\w+", read("sweep.yaml")["spec"]["entrypoint"])


@each_pod
def test_resources_are_requested_and_limited(pod: dict[str, Any]) -> None:
    for container in pod["containers"]:
        for amount in ("cpu", "memory"):
            assert container["resources"]["requests"][amount] == container["resources"]["limits"][amount]


def test_workers_have_a_gpu_and_shared_memory() -> None:
    for group in cluster_spec()["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        assert int(pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) >= 1
        mounts = {mount["mountPath"]: mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        shm = next(volume for volume in pod["volumes"] if volume["name"] == mounts["/dev/shm"])
        assert shm["emptyDir"]["medium"] == "Memory"


def test_the_key_of_wandb_is_a_reference_on_every_node_and_never_a_value() -> None:
    spec = cluster_spec()
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        environment = {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        assert "value" not in environment["WANDB_API_KEY"]
        assert environment["WANDB_API_KEY"]["valueFrom"]["secretKeyRef"]["name"] == "wandb"


def test_every_manifest_is_looked_at() -> None:
    assert {file.name for file in Path(CLUSTER / "kubernetes").iterdir()} == {
        "storage.yaml",
        "files.yaml",
        "sweep.yaml",
    }
