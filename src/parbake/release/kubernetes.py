"""Kubernetes manifests of a deployment: what its pods promise, need and must not do."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from parbake.errors import MissingExtra, SettingsError
from parbake.release.image import USER

Manifest = Mapping[str, Any]
"""One object as Kubernetes reads it."""

PAUSE_S: Final = 5
"""How long a pod goes on after it was told to stop, so that the cluster stops sending to it first."""
_SPARE_S: Final = 10
_MI: Final = 1 << 20
_STEP_MI: Final = 64
_PROBE_S: Final = 2
_SLOWER: Final = 10
"""How much slower than here a node may be when a pod starts."""
_CPU_PERCENT: Final = 70
_PORT: Final = 8000
_NAME: Final = re.compile(r"^[a-z]([a-z0-9-]{0,50}[a-z0-9])?$")


@dataclass(frozen=True, slots=True)
class Measured:
    """What a server with this bundle, and nothing else, took where the manifests were written."""

    memory_bytes: int
    """Of all its processes, while it answered; what they share is counted once."""
    row_ms: float
    """CPU time of one request with one row, with everything around the model."""
    start_s: float
    """From the command to the first answer."""
    cpu: str
    """On which processor."""


@dataclass(frozen=True, slots=True)
class Pods:
    """What runs, and how many of it."""

    name: str
    image: str
    model_load: str = ""
    """What a server that starts empty fetches; empty: the bundle is in the image."""
    digest: str = ""
    owner: str = ""
    purpose: str = ""
    replicas: int = 2
    most_replicas: int = 10
    cpus: int = 1
    drain_s: float = 30.0
    namespace: str = ""


def manifests(pods: Pods, measured: Measured, *, kserve: bool = False) -> tuple[Manifest, ...]:
    """Everything that runs one deployment. With ``kserve``, KServe makes the Deployment, the Service and the scaling.

    Raises `SettingsError` for a name that Kubernetes does not take.
    """
    if pods.replicas > pods.most_replicas:
        raise SettingsError(f"{pods.replicas} replicas are more than the most, {pods.most_replicas}")
    name = object_name(pods.name)
    if kserve:
        chosen = {"serving.kserve.io/inferenceservice": name}
        return (
            _inference_service(name, pods, measured),
            _disruption(name, pods, chosen),
            _network(name, pods, chosen),
        )
    chosen = {"app.kubernetes.io/name": "parbake", "app.kubernetes.io/instance": name}
    return (
        _deployment(name, pods, measured, chosen),
        _service(name, pods, chosen),
        _scaling(name, pods),
        _disruption(name, pods, chosen),
        _network(name, pods, chosen),
    )


def yaml(found: Sequence[Manifest]) -> str:
    """The manifests as one YAML file. Raises `MissingExtra`."""
    try:
        from yaml import safe_dump  # type: ignore[import-untyped]  # its types are a package of their own
    except ImportError as error:
        raise MissingExtra("pyyaml", "kubernetes") from error
    # A value that stands twice would be written once, with a reference to it.
    return "---\n".join(
        safe_dump(msgspec.to_builtins(one), sort_keys=False, width=120, allow_unicode=True) for one in found
    )


def object_name(name: str) -> str:
    """A deployment's name as Kubernetes takes it. Raises `SettingsError`."""
    made = re.sub(r"[._]", "-", name.lower())
    if not _NAME.match(made):
        raise SettingsError(
            f"Kubernetes takes no {made!r} as a name",
            hint="letters, digits and dashes, a letter first, at most 52",
        )
    return made


def memory_mi(measured: Measured) -> tuple[int, int]:
    """What a pod asks for, and where it is ended: a quarter more than measured, and twice that for a second version."""
    asked = math.ceil(measured.memory_bytes * 1.25 / _MI / _STEP_MI) * _STEP_MI
    return asked, 2 * asked


def grace_s(pods: Pods) -> int:
    """Seconds from SIGTERM to SIGKILL: the pause, the drain, and the end of the processes."""
    return PAUSE_S + math.ceil(pods.drain_s) + _SPARE_S


def _inference_service(name: str, pods: Pods, measured: Measured) -> Manifest:
    spec = _pod(pods, measured, container="kserve-container")
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": _metadata(
            name,
            pods,
            {},
            {**_annotations(pods, measured), "serving.kserve.io/deploymentMode": "RawDeployment"},
        ),
        "spec": {
            "predictor": {
                "minReplicas": pods.replicas,
                "maxReplicas": pods.most_replicas,
                "scaleMetric": "cpu",
                "scaleTarget": _CPU_PERCENT,
                **spec,
            }
        },
    }


def _deployment(name: str, pods: Pods, measured: Measured, chosen: Mapping[str, str]) -> Manifest:
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": dict(chosen)},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(name, pods, chosen, _annotations(pods, measured)),
        # No number of replicas: applying this again must not undo what the autoscaler has found.
        "spec": {
            "selector": {"matchLabels": dict(chosen)},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": dict(chosen), "annotations": _annotations(pods, measured)},
                "spec": {**_pod(pods, measured, container="parbake"), "topologySpreadConstraints": [spread]},
            },
        },
    }


def _pod(pods: Pods, measured: Measured, *, container: str) -> dict[str, Any]:
    asked, most = memory_mi(measured)
    starts = max(30, math.ceil(_SLOWER * measured.start_s / _PROBE_S))
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108  where the server writes its sockets
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": "64Mi"}}]
    environment: list[dict[str, Any]] = [
        {"name": "PARBAKE_HOST", "value": "0.0.0.0"},  # noqa: S104  a pod has a network of its own
        {"name": "PARBAKE_PORT", "value": str(_PORT)},
        {"name": "PARBAKE_DRAIN_TIMEOUT_S", "value": f"{pods.drain_s:g}"},
        {
            "name": "PARBAKE_ADMIN_TOKEN",
            "valueFrom": {"secretKeyRef": {"name": "parbake", "key": "admin-token"}},
        },
    ]
    one: dict[str, Any] = {"name": container, "image": pods.image}
    if pods.model_load:
        one["command"] = ["parbake", "serve", pods.model_load]
        one["envFrom"] = [{"configMapRef": {"name": "parbake", "optional": True}}]
        environment.append({"name": "PARBAKE_STATE_DIR", "value": "/var/lib/parbake"})
        mounts.append({"name": "bundles", "mountPath": "/var/lib/parbake"})
        volumes.append({"name": "bundles", "emptyDir": {"sizeLimit": "10Gi"}})
    one |= {
        "ports": [{"name": "http", "containerPort": _PORT, "protocol": "TCP"}],
        "env": environment,
        # Alive is not ready: a model that is loading must not have its container killed.
        "startupProbe": _probe("live", _PROBE_S, starts),
        "livenessProbe": _probe("live", 10, 3),
        "readinessProbe": _probe("ready", _PROBE_S, 1),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(PAUSE_S)]}}},
        "resources": {
            "requests": {"cpu": str(pods.cpus), "memory": f"{asked}Mi"},
            "limits": {"memory": f"{most}Mi"},
        },
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": grace_s(pods),
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [one],
        "volumes": volumes,
    }


def _probe(what: str, every_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": f"/v2/health/{what}", "port": "http"},
        "periodSeconds": every_s,
        "timeoutSeconds": 2,
        "failureThreshold": failures,
    }


def _service(name: str, pods: Pods, chosen: Mapping[str, str]) -> Manifest:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(name, pods, chosen),
        "spec": {
            "selector": dict(chosen),
            "ports": [{"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def _scaling(name: str, pods: Pods) -> Manifest:
    cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": _CPU_PERCENT}}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": _metadata(name, pods, {}),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": pods.replicas,
            "maxReplicas": pods.most_replicas,
            "metrics": [{"type": "Resource", "resource": cpu}],
        },
    }


def _disruption(name: str, pods: Pods, chosen: Mapping[str, str]) -> Manifest:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(name, pods, {}),
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": dict(chosen)}},
    }


def _network(name: str, pods: Pods, chosen: Mapping[str, str]) -> Manifest:
    """Only pods of the same namespace ask; only a server that fetches its bundles asks others."""
    names = {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]}
    stores = {"ports": [{"protocol": "TCP", "port": port} for port in (443, 5000, 9000)]}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(name, pods, {}),
        "spec": {
            "podSelector": {"matchLabels": dict(chosen)},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": "http"}]},
            ],
            "egress": [names, stores] if pods.model_load else [],
        },
    }


def _metadata(
    name: str, pods: Pods, marks: Mapping[str, str], said: Mapping[str, str] | None = None
) -> dict[str, Any]:
    found: dict[str, Any] = {"name": name}
    if pods.namespace:
        found["namespace"] = object_name(pods.namespace)
    found["labels"] = {**marks, "app.kubernetes.io/managed-by": "parbake"}
    if said:
        found["annotations"] = dict(said)
    return found


def _annotations(pods: Pods, measured: Measured) -> dict[str, str]:
    """What is served, and where the numbers come from."""
    said = {
        "parbake.dev/digest": pods.digest,
        "parbake.dev/owner": pods.owner,
        "parbake.dev/purpose": pods.purpose,
        "parbake.dev/measured-memory": f"{measured.memory_bytes / _MI:.0f}Mi",
        "parbake.dev/measured-cpu-per-row": f"{measured.row_ms:.3g} ms",
        "parbake.dev/measured-start": f"{measured.start_s:.2g} s",
        "parbake.dev/measured-on": measured.cpu,
    }
    return {key: value for key, value in said.items() if value}
