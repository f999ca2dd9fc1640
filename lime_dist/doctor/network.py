"""Findings about networks: interfaces, the master's address and port, clocks, links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_high

from lime_dist.doctor.facts import Facts
from lime_dist.doctor.findings import Finding, Findings, everywhere, listed
from lime_dist.doctor.ring import Link

MOST_SKEW = 2.0
"""Seconds that clocks may differ; what is measured over ssh is right to about half a second."""


def judge(facts: Sequence[Facts]) -> list[Finding]:
    """All findings about the network of several hosts that need no measurement."""
    return [*clocks(facts), *interfaces(facts), *master(facts)]


def ring_devices(facts: Sequence[Facts], ends: int) -> list[str]:
    """By process of the ring, the memory that it sends from: GPUs if the job will use them and each process has its own."""
    if not all(fact.on_gpu for fact in facts):
        return ["cpu"] * ends
    if len(facts) == ends:
        return ["cuda:0"] * ends
    return [f"cuda:{number}" for number in range(ends)] if len(facts[0].gpus) >= ends else ["cpu"] * ends


def interfaces(facts: Sequence[Facts]) -> Findings:
    """The interface with the route to the other hosts against the one that the backend is told to use, or will guess."""
    good = []
    for fact in facts:
        unreached = [peer for peer, address in fact.routes.items() if not address]
        if unreached:
            yield Finding(
                "error", f"{fact.host} knows no way to {listed(unreached)}; add them to its /etc/hosts or to DNS"
            )
            continue
        towards = {name for name, found in fact.interfaces.items() if set(fact.routes.values()) & set(found)}
        variable = "NCCL_SOCKET_IFNAME" if fact.on_gpu else "GLOO_SOCKET_IFNAME"
        told = fact.variables.get(variable)
        right = ",".join(sorted(towards))
        if told is None and variable == "GLOO_SOCKET_IFNAME" and fact.own_address not in fact.routes.values():
            yield Finding(
                "error",
                f"{fact.host}: its own name stands for {fact.own_address or 'no address'}, where gloo would listen, but "
                f"{right} leads to the other hosts; set {variable}={right}",
            )
        elif told is None:
            good.append(f"{right} on {fact.host}")
        else:
            chosen = chosen_interfaces(told, list(fact.interfaces), prefixes=variable.startswith("NCCL"))
            if not chosen:
                yield Finding(
                    "error",
                    f"{fact.host}: {variable}={told} names none of its interfaces that are up "
                    f"({listed(sorted(fact.interfaces))}); set {variable}={right}",
                )
            elif not chosen & towards:
                yield Finding(
                    "error" if "lo" in chosen else "warning",
                    f"{fact.host}: {variable}={told} is {listed(sorted(chosen))}, but the way to the other hosts is "
                    f"{right}; set {variable}={right}",
                )
            else:
                good.append(f"{right} on {fact.host}")
    if len(good) == len(facts):
        yield Finding("ok", f"network interface: {listed(good)}")


def chosen_interfaces(told: str, names: Sequence[str], prefixes: bool) -> set[str]:
    """Which interfaces a value of NCCL_SOCKET_IFNAME (``prefixes``: ``eth``, ``=eth0``, ``^docker,lo``) or
    GLOO_SOCKET_IFNAME (names) means."""
    if not prefixes:
        return set(told.split(",")) & set(names)
    excluding, exact = told.startswith("^"), told.lstrip("^").startswith("=")
    items = told.lstrip("^=").split(",")
    matched = {name for name in names if any(name == item if exact else name.startswith(item) for item in items)}
    return set(names) - matched if excluding else matched


def master_address(facts: Sequence[Facts], told: str | None) -> str:
    """Of the first host, as the launcher will have it: what it is told, or the first of ``hostname -I``."""
    return told or facts[0].first_address


def master(facts: Sequence[Facts]) -> Findings:
    """The first host's address as the launcher finds it, and its port."""
    first, *others = facts
    known = {fact.addresses.get(first.host, "") for fact in others}
    if first.first_address not in set(first.routes.values()):
        yield Finding(
            "warning",
            f"`hostname -I` on {first.host} begins with {first.first_address or 'nothing'}, which the launcher takes for "
            f"the master's address, but the other hosts know it as {', '.join(sorted(known)) or 'nothing'}; set MASTER_ADDR "
            "for launch/multinode.sh, or give `deepspeed --master_addr`",
        )
    if not first.port_is_free:
        yield Finding(
            "error", f"the master port is in use on {first.host}; end what listens there, or set another MASTER_PORT"
        )


def clocks(facts: Sequence[Facts]) -> Findings:
    """Against the first host's, which writes the records."""
    first, *others = facts
    ahead = {fact.host: fact.skew - first.skew for fact in others if abs(fact.skew - first.skew) > MOST_SKEW}
    for host, seconds in ahead.items():
        way = "ahead of" if seconds > 0 else "behind"
        yield Finding(
            "warning",
            f"{host}: its clock is {abs(seconds):.0f} s {way} {first.host}'s; times in logs and of files will be out of order: "
            "synchronise the clocks (chrony, ntp)",
        )
    if not ahead:
        yield Finding("ok", f"clocks agree to {MOST_SKEW:g} s {everywhere(facts)}")


def links(found: Mapping[tuple[str, str], Link]) -> Findings:
    """What the ring measured. Of three or more, one that is much slower than the others is worth a look before a month of
    training; of two, which are the two ways over one, the one measured first may have been."""
    typical = median_high(link.bandwidth for link in found.values())
    for (sender, receiver), link in found.items():
        text = f"{sender} to {receiver}: {link.bandwidth / 1e6:,.1f} MB/s, latency {link.latency * 1e3:.2f} ms"
        if len(found) > 2 and link.bandwidth < typical / 2:
            yield Finding(
                "warning", f"{text}; others reach {typical / 1e6:,.1f} MB/s: look at its cable, its port, its route"
            )
        else:
            yield Finding("ok", text)
