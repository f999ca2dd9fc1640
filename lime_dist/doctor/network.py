"""Findings about the network: interfaces, the master address and port, clocks, links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_high

from lime_dist.doctor.facts import Facts
from lime_dist.doctor.findings import Finding, Findings, everywhere, listed
from lime_dist.doctor.ring import Link

MOST_SKEW = 2.0
"""Seconds by which clocks may differ; a measurement over ssh is accurate to about half a second."""


def check_network(facts: Sequence[Facts]) -> list[Finding]:
    """All findings about the network of several hosts, except measured links."""
    return [*clocks(facts), *interfaces(facts), *master(facts)]


def ring_devices(facts: Sequence[Facts], ends: int) -> list[str]:
    """Device of each process of the ring: GPUs if the job will use them and each process has its own, otherwise CPUs."""
    if not all(fact.on_gpu for fact in facts):
        return ["cpu"] * ends
    if len(facts) == ends:
        return ["cuda:0"] * ends
    return [f"cuda:{index}" for index in range(ends)] if len(facts[0].gpus) >= ends else ["cpu"] * ends


def interfaces(facts: Sequence[Facts]) -> Findings:
    """Compare the interface on the route to the other hosts with the one that the backend is told to use, or will choose."""
    good = []
    for fact in facts:
        unreached = [peer for peer, address in fact.routes.items() if not address]
        if unreached:
            yield Finding(
                "error", f"{fact.host} has no route to {listed(unreached)}; add them to its /etc/hosts or to DNS"
            )
            continue
        on_route = {name for name, addresses in fact.interfaces.items() if set(fact.routes.values()) & set(addresses)}
        variable = "NCCL_SOCKET_IFNAME" if fact.on_gpu else "GLOO_SOCKET_IFNAME"
        value = fact.variables.get(variable)
        right = ",".join(sorted(on_route))
        if value is None and variable == "GLOO_SOCKET_IFNAME" and fact.own_address not in fact.routes.values():
            yield Finding(
                "error",
                f"{fact.host}: its own name resolves to {fact.own_address or 'no address'}, where gloo would listen, but "
                f"{right} leads to the other hosts; set {variable}={right}",
            )
        elif value is None:
            good.append(f"{right} on {fact.host}")
        else:
            chosen = chosen_interfaces(value, list(fact.interfaces), prefixes=variable.startswith("NCCL"))
            if not chosen:
                yield Finding(
                    "error",
                    f"{fact.host}: {variable}={value} names none of its interfaces that are up "
                    f"({listed(sorted(fact.interfaces))}); set {variable}={right}",
                )
            elif not chosen & on_route:
                yield Finding(
                    "error" if "lo" in chosen else "warning",
                    f"{fact.host}: {variable}={value} selects {listed(sorted(chosen))}, but the route to the other hosts uses "
                    f"{right}; set {variable}={right}",
                )
            else:
                good.append(f"{right} on {fact.host}")
    if len(good) == len(facts):
        yield Finding("ok", f"network interface: {listed(good)}")


def chosen_interfaces(value: str, names: Sequence[str], prefixes: bool) -> set[str]:
    """Interfaces that a variable selects: NCCL_SOCKET_IFNAME (``prefixes``: ``eth``, ``=eth0``, ``^docker,lo``) or
    GLOO_SOCKET_IFNAME (names)."""
    if not prefixes:
        return set(value.split(",")) & set(names)
    excluding, whole = value.startswith("^"), value.lstrip("^").startswith("=")
    items = value.lstrip("^=").split(",")
    matched = {name for name in names if any(name == item if whole else name.startswith(item) for item in items)}
    return set(names) - matched if excluding else matched


def master_address(facts: Sequence[Facts], configured: str | None) -> str:
    """The master address that the launcher will use: the configured one, or the first host's first of ``hostname -I``."""
    return configured or facts[0].first_address


def master(facts: Sequence[Facts]) -> Findings:
    """Check the master address that the launcher will use, and the master port."""
    first, *others = facts
    known = {fact.addresses.get(first.host, "") for fact in others}
    if first.first_address not in set(first.routes.values()):
        yield Finding(
            "warning",
            f"`hostname -I` on {first.host} begins with {first.first_address or 'nothing'}, which the launcher takes as "
            f"the master address, but the other hosts resolve it to {', '.join(sorted(known)) or 'nothing'}; set MASTER_ADDR "
            "for launch/multinode.sh, or pass --master_addr to `deepspeed`",
        )
    if not first.port_is_free:
        yield Finding(
            "error",
            f"the master port is in use on {first.host}; stop the process that listens there, or set another MASTER_PORT",
        )


def clocks(facts: Sequence[Facts]) -> Findings:
    """Compare the clocks with that of the first host, which writes the records."""
    first, *others = facts
    ahead = {fact.host: fact.skew - first.skew for fact in others if abs(fact.skew - first.skew) > MOST_SKEW}
    for host, seconds in ahead.items():
        way = "ahead of" if seconds > 0 else "behind"
        yield Finding(
            "warning",
            f"{host}: its clock is {abs(seconds):.0f} s {way} {first.host}'s; timestamps of logs and files will be out of order: "
            "synchronise the clocks (chrony, ntp)",
        )
    if not ahead:
        yield Finding("ok", f"clocks agree to {MOST_SKEW:g} s {everywhere(facts)}")


def check_links(links: Mapping[tuple[str, str], Link]) -> Findings:
    """Report the measured links, and warn of one that is much slower than the others. Two links are the two directions between
    two hosts, of which the first one measured may be slower: no warning."""
    typical = median_high(link.bandwidth for link in links.values())
    for (sender, receiver), link in links.items():
        rate = f"{link.bandwidth / 1e6:,.1f} MB/s" if link.bandwidth else "faster than can be measured"
        text = f"{sender} to {receiver}: {rate}, latency {link.latency * 1e3:.2f} ms"
        if len(links) > 2 and 0 < link.bandwidth < typical / 2:
            yield Finding("warning", f"{text}; others reach {typical / 1e6:,.1f} MB/s: check its cable, port and route")
        else:
            yield Finding("ok", text)
