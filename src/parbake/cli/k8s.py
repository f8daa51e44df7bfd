"""`parbake k8s`: the Kubernetes manifests of a deployment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from parbake.cli.options import (
    Command,
    json_option,
    pickle_option,
    progress_option,
    registry_options,
    settings_options,
    state_settings,
)
from parbake.cli.output import emit, emit_json, say, stages
from parbake.settings import ReleaseSettings


@click.command(cls=Command, short_help="Write the Kubernetes manifests of a deployment.")
@click.argument("ref", metavar="BUNDLE|NAME@VERSION|models:/NAME@VERSION")
@click.option(
    "--image", default="", metavar="IMAGE", help="Image of the pods.  [default: as image build names it]"
)
@click.option(
    "--model-load",
    default="",
    metavar="REF",
    help="The image has no bundle: its server fetches this one, as in models:/eta@champion.",
)
@click.option("--kserve", is_flag=True, help="An InferenceService of KServe instead of a Deployment.")
@click.option("--replicas", type=click.IntRange(1), default=2, metavar="N", help="Fewest pods.  [default: 2]")
@click.option(
    "--most-replicas", type=click.IntRange(1), default=10, metavar="N", help="Most pods.  [default: 10]"
)
@click.option(
    "--cpus", type=click.IntRange(1), default=1, metavar="N", help="CPUs that a pod asks for.  [default: 1]"
)
@click.option(
    "--drain-timeout-s",
    type=click.FloatRange(0),
    default=30.0,
    metavar="SECONDS",
    help="Time given to accepted requests when a pod stops.  [default: 30]",
)
@click.option(
    "--namespace", default="", metavar="NAME", help="Namespace of everything.  [default: kubectl's]"
)
@pickle_option
@settings_options(ReleaseSettings, only=("store",))
@registry_options
@progress_option
@json_option
def command(
    ref: str,
    image: str,
    model_load: str,
    kserve: bool,
    replicas: int,
    most_replicas: int,
    cpus: int,
    drain_timeout_s: float,
    namespace: str,
    allow_pickle: bool,
    show_progress: bool,
    as_json: bool,
    config: Path | None,
    **values: Any,
) -> None:
    """Write the Kubernetes manifests of a deployment as YAML, or, with --json, as a List that kubectl takes too.

    A server is started here with the bundle and asked, so that memory is what was measured; the annotations say so.
    """
    if model_load and not image:
        raise click.UsageError("--model-load needs --image, which has the server and its libraries")
    from parbake.app import kubernetes
    from parbake.app.image import resolver
    from parbake.release.kubernetes import yaml

    with stages("measuring", wanted=show_progress) as stage:
        found = kubernetes.write(
            ref,
            image=image,
            model_load=model_load,
            kserve=kserve,
            replicas=replicas,
            most_replicas=most_replicas,
            cpus=cpus,
            drain_s=drain_timeout_s,
            namespace=namespace,
            allow_pickle=allow_pickle,
            resolve=resolver(state_settings(config, values)),
            stage=stage,
        )
    if as_json:
        emit_json({"apiVersion": "v1", "kind": "List", "items": found})
        return
    emit(yaml(found).rstrip("\n"))
    say("a secret named parbake must have the key admin-token; kubectl apply -f FILE")
