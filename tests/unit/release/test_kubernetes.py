"""Manifests: valid for Kubernetes to the last field, and in agreement with the server."""

from __future__ import annotations

from typing import Any

import pytest
import yaml as pyyaml  # type: ignore[import-untyped]  # its types are a package of their own
from hypothesis import given
from hypothesis import strategies as st

from parbake.errors import SettingsError
from parbake.release.kubernetes import (
    PAUSE_S,
    Measured,
    Pods,
    grace_s,
    manifests,
    memory_mi,
    object_name,
    yaml,
)
from parbake.settings import ServerSettings

MEASURED = Measured(90 << 20, 0.164, 1.6, "a processor: of ours")
PODS = Pods("eta.v2", "registry.example.com/eta:1", digest="sha256:00", owner="a@b.example", purpose="é: {x}")
LOADED = Pods("eta", "registry.example.com/parbake:1", model_load="models:/eta@champion", namespace="taxi")


def validate(found: Any) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for one in found:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("pods", [PODS, LOADED], ids=["image", "load"])
def test_every_object_is_valid_to_the_last_field(pods: Pods) -> None:
    written = yaml(manifests(pods, MEASURED))
    found = list(pyyaml.safe_load_all(written))
    assert [one["kind"] for one in found] == [
        "Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget", "NetworkPolicy",
    ]  # fmt: skip
    assert "&id" not in written
    validate(found)


def test_a_field_that_does_not_exist_is_found() -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    deployment = pyyaml.safe_load(yaml(manifests(PODS, MEASURED)[:1]))
    deployment["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        validate([deployment])


def test_the_pods_of_kserve_are_pods() -> None:
    service, disruption, network = (dict(one) for one in manifests(PODS, MEASURED, kserve=True))
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    predictor = dict(service["spec"]["predictor"])
    assert (predictor.pop("minReplicas"), predictor.pop("maxReplicas")) == (2, 10)
    assert (predictor.pop("scaleMetric"), predictor.pop("scaleTarget")) == ("cpu", 70)
    # Kubernetes itself knows no InferenceService; what is left must be the spec of a pod.
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "eta"}, "spec": predictor}
    validate([pod, disruption, network])
    assert predictor["containers"][0]["name"] == "kserve-container"


def test_a_pod_may_do_nothing_that_it_need_not() -> None:
    pod = manifests(PODS, MEASURED)[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/tmp"}


def test_what_the_pod_is_told_are_settings_of_the_server() -> None:
    (container,) = manifests(LOADED, MEASURED)[0]["spec"]["template"]["spec"]["containers"]
    fields = {f"PARBAKE_{name.upper()}" for name in ServerSettings.__struct_fields__} | {"PARBAKE_STATE_DIR"}
    assert {one["name"] for one in container["env"]} <= fields
    token = next(one for one in container["env"] if one["name"] == "PARBAKE_ADMIN_TOKEN")
    assert "value" not in token


@given(st.floats(0, 3600))
def test_a_pod_is_never_killed_while_it_drains(drain_s: float) -> None:
    pods = Pods("eta", "eta:1", drain_s=drain_s)
    assert grace_s(pods) > PAUSE_S + drain_s


def test_unless_told_otherwise_pods_agree_with_the_servers_own_settings() -> None:
    pod = manifests(PODS, MEASURED)[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    server = ServerSettings()
    assert pod["terminationGracePeriodSeconds"] > PAUSE_S + server.drain_timeout_s + 5
    assert container["ports"][0]["containerPort"] == server.port


@given(st.integers(1, 1 << 40))
def test_a_pod_gets_more_memory_than_was_measured_and_room_for_a_second_version(measured: int) -> None:
    asked, most = memory_mi(Measured(measured, 1.0, 1.0, ""))
    assert asked << 20 > measured
    assert most << 20 >= 2 * measured


def test_a_model_that_is_loaded_may_reach_its_stores_and_one_in_an_image_nothing() -> None:
    assert manifests(PODS, MEASURED)[-1]["spec"]["egress"] == []
    assert manifests(LOADED, MEASURED)[-1]["spec"]["egress"]


@pytest.mark.parametrize(("name", "made"), [("eta", "eta"), ("Eta.v2_b", "eta-v2-b")])
def test_a_name_is_made_one_of_kubernetes(name: str, made: str) -> None:
    assert object_name(name) == made


@pytest.mark.parametrize("name", ["2eta", "é", "eta-", "e" * 60, ""])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="Kubernetes takes no"):
        object_name(name)


def test_fewest_are_not_more_than_most() -> None:
    with pytest.raises(SettingsError, match="12 replicas are more than the most, 10"):
        manifests(Pods("eta", "eta:1", replicas=12), MEASURED)
