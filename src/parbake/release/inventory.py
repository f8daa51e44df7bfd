"""What there is: every version of every deployment, where it runs, on what, whose it is, and what is known of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date
from typing import Literal, Protocol

import msgspec
from msgspec import Struct

from parbake.contract.bundle import StoredBundle
from parbake.contract.model import Environment, Library, TensorSpec
from parbake.release import lifetimes
from parbake.release.advisories import Advisories, Looked
from parbake.release.gate import Waiver

State = Literal["running", "unloaded", "released", "stored", "damaged"]


class Machine(Struct, frozen=True):
    """What a version runs on; of one that does not run, what it was packed on. "" is not known."""

    os: str = ""
    kernel: str = ""
    arch: str = ""
    cpu: str = ""
    gpus: tuple[str, ...] = ()
    python: str = ""
    runtime: str = ""
    """onnxruntime and its version."""
    libraries: tuple[Library, ...] = ()


class Risk(Struct, frozen=True):
    """What is known to be wrong with a library."""

    library: str
    version: str
    advisories: tuple[str, ...]


class Lifetime(Struct, frozen=True):
    """Until when something gets fixes: a day, or ``unknown``."""

    what: str
    ends: str
    ended: bool | None


class Item(Struct, frozen=True):
    """One version of one deployment, or a bundle that is not deployed. What is not known is "" or None."""

    name: str
    version: str
    state: State
    where: str
    """Server, store or folder that it was found in."""
    bundle: str
    digest: str = ""
    format: str = ""
    """``onnx``, ``python``, ``pickle``, or several steps after one another."""
    made_by: str = ""
    """Framework that trained it, and its version."""
    bytes: int = 0
    purpose: str = ""
    owner: str = ""
    training_data: str = ""
    run: str = ""
    packed: str = ""
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    key: tuple[str, ...] = ()
    machine: Machine = Machine()
    packed_on: Machine = Machine()
    vulnerable: tuple[Risk, ...] | None = None
    """Libraries with known vulnerabilities; None where nothing is known of vulnerabilities."""
    not_judged: tuple[str, ...] = ()
    """Libraries of which that is not known."""
    lifetimes: tuple[Lifetime, ...] = ()
    mode: str = ""
    table: str = ""
    table_rows: int = 0
    requests: int | None = None
    last_request: float | None = None
    """Unix time; 0 for never since the server started."""
    release: str = ""
    """How its newest release stands: live, rolled_back and so on; "" where it was never released."""
    aliases: tuple[str, ...] = ()
    released_by: str = ""
    released_at: str = ""
    image: str = ""
    waivers: tuple[Waiver, ...] = ()
    problem: str = ""
    """Why there is no more to say of it."""


class Inventory(Struct, frozen=True):
    """Everything that was found, and how much is known of its vulnerabilities and lifetimes."""

    at: str
    items: tuple[Item, ...]
    advisories: Looked
    releases: str = ""
    """Why nothing is known of releases and waivers; "" where it is."""
    lifetimes_as_of: str = lifetimes.AS_OF
    lifetimes_sources: tuple[str, ...] = lifetimes.SOURCES


class ReleaseFact(Struct, frozen=True):
    """What the store of releases knows of one version."""

    name: str
    version: str
    digest: str
    """"" where only waivers are known."""
    state: str = ""
    """How its newest release stands: live, rolled_back and so on; "" where it was never released."""
    bundle: str = ""
    table: str = ""
    aliases: tuple[str, ...] = ()
    released_by: str = ""
    released_at: str = ""
    image: str = ""
    waivers: tuple[Waiver, ...] = ()


class ReleaseFacts(Protocol):
    """Where releases are written down."""

    def of(self, names: Collection[str]) -> Sequence[ReleaseFact]:
        """Every version that was ever released, and those of ``names`` for which something was waived."""


def machine_of(environment: Environment) -> Machine:
    """An environment lock as an inventory shows it."""
    versions = {library.name: library.version for library in environment.libraries}
    runtime = next((n for n in ("onnxruntime", "onnxruntime-gpu") if n in versions), "")
    return Machine(
        environment.os,
        environment.system,
        environment.machine,
        environment.cpu,
        environment.gpus,
        f"{environment.implementation} {environment.python}",
        f"{runtime} {versions[runtime]}" if runtime else "",
        environment.libraries,
    )


def environment_of(machine: Machine) -> Environment:
    """A machine as an environment lock has it."""
    implementation, _, python = machine.python.rpartition(" ")
    return Environment(
        python=python,
        implementation=implementation,
        system=machine.kernel,
        machine=machine.arch,
        libraries=machine.libraries,
        os=machine.os,
        cpu=machine.cpu,
        gpus=machine.gpus,
    )


def item_of(
    stored: StoredBundle,
    *,
    version: str = "",
    state: State = "stored",
    where: str = "",
    machine: Machine | None = None,
) -> Item:
    """A bundle as an inventory shows it. ``machine`` is what it runs on, where it runs."""
    contract = stored.contract
    parity = contract.parity
    packed_on = machine_of(stored.environment)
    return Item(
        name=contract.name,
        version=version,
        state=state,
        where=where,
        bundle=str(stored.path),
        digest=stored.digest,
        format=", then ".join(step.kind for step in contract.steps),
        made_by=f"{parity.framework} {parity.framework_version}" if parity is not None else "",
        bytes=sum(entry.bytes for entry in stored.manifest.files),
        purpose=contract.purpose,
        owner=contract.owner,
        training_data=contract.training_data,
        run=contract.run,
        packed=stored.manifest.created,
        inputs=contract.inputs,
        outputs=contract.outputs,
        key=contract.key.columns,
        machine=machine or packed_on,
        packed_on=packed_on,
    )


def with_facts(items: Sequence[Item], facts: Sequence[ReleaseFact]) -> tuple[Item, ...]:
    """Items with what the store knows of them; releases whose bundles were found nowhere stand at the end."""
    met: set[ReleaseFact] = set()
    found: list[Item] = []
    for item in items:
        fact = next((fact for fact in reversed(facts) if _is_of(fact, item)), None)
        if fact is None:
            found.append(item)
            continue
        met.add(fact)
        found.append(
            msgspec.structs.replace(
                item,
                version=item.version or fact.version,
                state="released" if item.state == "stored" and fact.state else item.state,
                release=fact.state,
                table=item.table or fact.table,
                aliases=fact.aliases,
                released_by=fact.released_by,
                released_at=fact.released_at,
                image=fact.image,
                waivers=fact.waivers,
            )
        )
    for fact in facts:
        if fact not in met:
            item = Item(fact.name, fact.version, "released", "history", fact.bundle, fact.digest)
            found.append(
                msgspec.structs.replace(
                    item,
                    release=fact.state,
                    table=fact.table,
                    aliases=fact.aliases,
                    released_by=fact.released_by,
                    released_at=fact.released_at,
                    image=fact.image,
                    waivers=fact.waivers,
                    problem="its bundle was not found here",
                )
            )
    return tuple(found)


def _is_of(fact: ReleaseFact, item: Item) -> bool:
    """Whether that is known of this item: one that is served has its version, a bundle on disk only its digest."""
    if fact.name != item.name or (item.version and item.version != fact.version):
        return False
    return fact.digest == item.digest or (not fact.digest and item.version == fact.version)


def judged(item: Item, advisories: Advisories, today: date) -> Item:
    """An item with what is known of the vulnerabilities and lifetimes of what it runs on."""
    if item.problem and not item.machine.python:
        return item
    risks: list[Risk] = []
    unknown: list[str] = []
    for library in item.machine.libraries:
        ids = advisories.of(library)
        if ids is None:
            unknown.append(library.name)
        elif ids:
            risks.append(Risk(library.name, library.version, ids))
    known = advisories.looked.known
    python = item.machine.python.rpartition(" ")[2]
    ends = [
        (f"python {python}".strip(), lifetimes.end_of_python(python)),
        (item.machine.os or "os", lifetimes.end_of_os(item.machine.os)),
    ]
    # What the makers of libraries do not say is told as unknown, not left out.
    ends += [(what, lifetimes.UNKNOWN) for what in (item.machine.runtime, item.made_by) if what]
    return msgspec.structs.replace(
        item,
        vulnerable=tuple(risks) if known else None,
        not_judged=tuple(unknown) if known else (),
        lifetimes=tuple(Lifetime(what, day, lifetimes.ended(day, today)) for what, day in ends),
    )
