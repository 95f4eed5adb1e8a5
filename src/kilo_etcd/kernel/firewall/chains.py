"""Which of a host's chains drop mesh packets. Pure: values in, answers and sentences out.

A packet that is forwarded passes every base chain of the hooks `FORWARDED`, whoever made it: an accept in one takes
back no drop in another. So each is followed with the packets that this host forwards: new ones of TCP, UDP and ICMP,
from the tunnel to the location's network and back, and those to and from the networks that nodes offer. A rule matches,
does not match, or cannot be told (sets, marks, ports, ...). A chain drops for certain if it does so whatever the untold
rules do; it may drop if only an untold rule could accept. Echo requests that pass prove nothing of TCP, which many
firewalls treat otherwise.

What the host itself sends and gets passes the chains of the other hooks. A firewall is there to refuse some of it, so
of these only what is certain counts: that all of TCP or of UDP is dropped.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from functools import cached_property
from ipaddress import ip_network
from typing import Literal

from attrs import evolve, field, frozen

from kilo_etcd.kernel.firewall.ranges import Networks
from kilo_etcd.kernel.netlink.formats import NF_PRIORITIES
from kilo_etcd.model import IPNetwork

Verdict = Literal["accept", "drop", "return", "jump", "goto", "unknown", ""]
"""`unknown`: it depends (a verdict map, a queue); empty: the packet goes on to the next rule."""

PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp", 58: "icmpv6"}
"""IP protocol number -> name."""
_NUMBERS = {"ipv6-icmp": "icmpv6", **{str(number): name for number, name in PROTOCOLS.items()}}
_ORDER = ("tcp", "udp", "icmp", "icmpv6")
UNTESTED = ("", "tcp", "udp")
"""What no echo request tests."""
SHOWN = {"tcp": "TCP", "udp": "UDP", "icmp": "ICMP", "icmpv6": "ICMPv6"}

_LIMITS = ("limit", "hashlimit")
"""Kinds of conditions, by their names in nftables and in iptables."""
_OF_ADDRESSES = ("set", "iprange")
"""Likewise: they may test the destination."""
_DEPTH = 16
_VERSIONS = {"inet": (4, 6), "netdev": (4, 6), "ip": (4,), "ip6": (6,)}

FORWARDED = ("ingress", "prerouting", "forward", "postrouting", "egress")
"""The hooks that a forwarded packet passes, in order."""
UNKNOWN_DEVICE = "?"
"""A device of a packet that is not known: whether a rule means it cannot be told."""
_BEFORE_ROUTING = ("ingress", "prerouting")
_INCOMING = (*_BEFORE_ROUTING, "input")


@frozen
class Packet:
    """A packet that the host is to forward; its addresses are within the mesh's subnets, unless `source` or
    `destination` says otherwise."""

    version: int
    iif: str
    oif: str
    subnets: tuple[IPNetwork, ...] = ()
    protocol: str = ""
    """A name of `PROTOCOLS`; empty: any."""
    source: IPNetwork | None = None
    """A network of which every address may be its source; None: see above."""
    destination: IPNetwork | None = None
    new: bool = True
    """It opens a connection; else it is an answer."""
    local: bool | None = None
    """Its destination is an address of the host itself; None: it is not known."""
    translated: bool = False
    """It may have been translated, which its connection's status tells then."""

    def within(self, side: str) -> tuple[IPNetwork, ...]:
        """Where its `saddr` or its `daddr` lies."""
        network = self.source if side == "saddr" else self.destination
        return self.subnets if network is None else (network,)


@frozen
class Condition:
    """One test of a rule. `kind`: `iif`, `oif` (value: a name or several, a prefix with a `*` at its end), `version`,
    `protocol` (a name or several), `saddr`, `daddr` (a network or several), `new` (whether new packets pass), `status`
    (likewise, if they are not translated), `local` (the destination is an address of the host), `any` (value: tuples of
    conditions, of one of which all match), anything else: cannot be told (value `daddr`: it tests the destination)."""

    kind: str
    value: object = None
    equal: bool = True

    @cached_property
    def networks(self) -> Networks:
        """Those of a `saddr` or `daddr`."""
        return Networks.of(self.value if isinstance(self.value, tuple) else (self.value,))

    def matches(self, packet: Packet) -> bool | None:
        """None: it cannot be told."""
        fits: bool | None = None
        match self.kind:
            case "iif" | "oif":
                name = packet.iif if self.kind == "iif" else packet.oif
                patterns = self.value if isinstance(self.value, tuple) else (str(self.value),)
                fits = None if name == UNKNOWN_DEVICE else any(
                    name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern for pattern in patterns
                )  # fmt: skip
            case "version":
                fits = packet.version == self.value
            case "protocol":
                names = self.value if isinstance(self.value, tuple) else (self.value,)
                fits = packet.protocol in names if packet.protocol else None
            case "new":
                # Which packets of a connection pass that exists is not kept.
                fits = bool(self.value) if packet.new else None
            case "status":
                fits = bool(self.value) if packet.new and not packet.translated else None
            case "local":
                fits = packet.local
            case "saddr" | "daddr":
                fits = self.networks.hold(packet.within(self.kind), packet.version)
            case "any" if isinstance(self.value, tuple):
                fits = _or(_and(condition.matches(packet) for condition in tests) for tests in self.value)
        return fits if fits is None or self.equal else not fits

    def of_destination(self, packet: Packet) -> bool:
        """Whether it is a test for some destinations, given that the packet may match it."""
        if self.kind == "any" and isinstance(self.value, tuple):
            may_match = (tests for tests in self.value if _and(test.matches(packet) for test in tests) is not False)
            return self.equal and any(test.of_destination(packet) for tests in may_match for test in tests)
        return self.equal and (self.kind in ("daddr", "local", *_OF_ADDRESSES) or self.value == "daddr")


def new_packets(new: bool, untracked: bool) -> Condition:
    """The test of a state of connections that new packets pass if `new`, and packets pass that are not tracked if
    `untracked`. A rule that lets those through and no new ones is written where some are not tracked."""
    return Condition("?") if untracked and not new else Condition("new", new)


def of_status(test: Condition) -> Condition:
    """A test of the state of connections that also tests whether they are translated."""
    return evolve(test, kind="status") if test.kind == "new" else test


def _or(answers: Iterable[bool | None]) -> bool | None:
    distinct = set(answers)
    return True if True in distinct else None if None in distinct else False


def _and(answers: Iterable[bool | None]) -> bool | None:
    distinct = set(answers)
    return False if False in distinct else None if None in distinct else True


@frozen(kw_only=True)
class FilterRule:
    """One rule of another program's chain, as far as it decides about mesh packets. All `conditions` must match;
    without a `verdict` the next rule decides."""

    conditions: tuple[Condition, ...] = ()
    verdict: Verdict = ""
    target: str = ""
    """The chain of a jump or goto."""
    comment: str = ""
    translates: bool = False
    """It may give a packet another destination (DNAT, a redirect, a header that is written), or leads to rules that may
    and that are not known."""
    takes: bool = False
    """Likewise, and the destination is the host itself: a redirect."""
    handle: int = field(default=0, eq=False)

    def matches(self, packet: Packet) -> bool | None:
        """None: it cannot be told."""
        return _and(condition.matches(packet) for condition in self.conditions)


@frozen(kw_only=True)
class BaseChain:
    """A base chain. `chains` are those of its table, for jumps."""

    family: str
    """As nft says it; `ip` and `ip6` too for the older iptables."""
    table: str
    name: str
    drops: bool
    """Its policy."""
    hook: str = "forward"
    priority: int = 0
    """Its place among the chains of its hook."""
    devices: tuple[str, ...] = ()
    """Those whose packets it meets, at hook ingress or egress: none, if they are gone. At other hooks it meets all."""
    rules: tuple[FilterRule, ...] = ()
    chains: Mapping[str, tuple[FilterRule, ...]] = field(factory=dict, eq=False, repr=False)
    legacy: bool = False
    """Of the older xtables, which nft does not show."""

    @property
    def iptables(self) -> bool:
        """Whether the program iptables (or ip6tables) keeps it."""
        return self.legacy or (self.family in ("ip", "ip6") and (self.table, self.name) == ("filter", "FORWARD"))

    @property
    def place(self) -> tuple[int, int]:
        """Chains that forwarded packets pass are passed in the order of their places."""
        return FORWARDED.index(self.hook), self.priority

    def meets(self, packet: Packet) -> bool:
        """Whether packets of this family and of these devices pass the chain."""
        if packet.version not in _VERSIONS.get(self.family, ()):
            return False
        if self.hook not in ("ingress", "egress"):
            return True
        return (packet.iif if self.hook == "ingress" else packet.oif) in self.devices

    def __str__(self) -> str:
        if self.iptables:
            return f"{'ip6tables' if self.family == 'ip6' else 'iptables'}' chain {self.name}"
        return f"the chain {self.name} of nftables table {self.family} {self.table}"


def drops(chain: BaseChain, packet: Packet, *, without: str = "") -> bool | None:
    """Whether a chain drops a packet; None: it may. Rules whose comment begins with `without` do not count."""
    if not chain.meets(packet):
        return False
    if chain.hook in _BEFORE_ROUTING and packet.oif:
        packet = evolve(packet, oif="")
    end, spared = _follow(chain.rules, chain, packet, without, 0)
    if end == "accept" or (not end and not chain.drops):
        return False
    return None if spared else True


def _follow(
    rules: Iterable[FilterRule], chain: BaseChain, packet: Packet, without: str, depth: int
) -> tuple[Verdict, bool]:
    """What becomes of the packet if no rule matches that cannot be told (empty: the end is reached), and whether such
    a rule could spare it."""
    spared = False
    for rule in rules:
        matched = rule.matches(packet)
        if matched is False or (without and rule.comment.startswith(without)):
            continue
        if rule.verdict == "unknown":
            spared = True
        elif rule.verdict in ("jump", "goto"):
            if depth >= _DEPTH:
                return "", True
            end, maybe = _follow(chain.chains.get(rule.target, ()), chain, packet, without, depth + 1)
            # A goto that ends without a verdict takes the packet past the rest of this chain too.
            past = end == "accept" or (rule.verdict == "goto" and not end and (depth > 0 or not chain.drops))
            spared = spared or maybe or (matched is None and past)
            if matched and (end or rule.verdict == "goto"):
                return end, spared
        elif rule.verdict and matched:
            return ("" if rule.verdict == "return" else rule.verdict), spared
        elif rule.verdict in ("accept", "return"):
            spared = True
    return "", spared


def translates(chain: BaseChain, packet: Packet) -> bool | None:
    """Whether a chain gives packets like this one another destination, all of them; None: some, by rules that test
    their destination. A rule that tests ports alone is about no network of services."""
    packet = evolve(packet, oif="") if chain.hook in _BEFORE_ROUTING else packet
    return chain.meets(packet) and _follow_translation(chain.rules, chain, packet, 0, named=False, surely=True)[0]


def _follow_translation(
    rules: Iterable[FilterRule], chain: BaseChain, packet: Packet, depth: int, *, named: bool, surely: bool
) -> tuple[bool | None, bool]:
    """Whether rules translate the packet (see above), and whether its way through the chain ends here for certain.
    `named`: a rule that led here tests the destination; `surely`: all such packets get here."""
    if depth > _DEPTH:
        return None, False
    result: bool | None = False
    for rule in rules:
        matched = rule.matches(packet)
        if matched is False:
            continue
        # What is not known may test it.
        names = named or rule.verdict == "unknown" or any(test.of_destination(packet) for test in rule.conditions)
        if rule.verdict in ("jump", "goto"):
            may, ended = _follow_translation(
                chain.chains.get(rule.target, ()), chain, packet, depth + 1,
                named=names, surely=surely and matched is True,
            )  # fmt: skip
            if may:
                return True, True
            result = None if may is None else result
            if matched and (ended or rule.verdict == "goto"):
                # A goto that ends without a verdict takes the packet past the rest of this chain, not of those before.
                return result, ended
            continue
        if rule.translates and surely and matched and rule.verdict != "unknown":
            return True, True
        result = None if rule.translates and names else result
        if rule.verdict in ("accept", "drop", "return") and matched:
            return result, rule.verdict != "return"
    return result, False


def packets(
    interface: str, devices: Iterable[str], versions: Iterable[int], subnets: tuple[IPNetwork, ...]
) -> tuple[Packet, ...]:
    """Those that a host forwards between its tunnel and `devices`, both ways."""
    return tuple(
        Packet(version, *pair, subnets, protocol, local=False)
        for version in sorted(versions)
        for device in sorted(devices)
        for pair in ((interface, device), (device, interface))
        for protocol in ("tcp", "udp", "icmp" if version == 4 else "icmpv6")
    )


@frozen
class Obstacle:
    """Something of the host's own that drops what it forwards for the mesh, as a sentence with its remedy."""

    text: str
    certain: bool = True
    """TCP or UDP is dropped. Else they only may be, or ICMP is."""
    untested: bool = True
    """TCP or UDP is dropped or may be, which no echo request tests."""
    blocked: frozenset[int] = frozenset({4, 6})
    """The families in which nothing passes for certain, neither in nor out: not that of a host that only lets its
    location call others, or that drops one family of two."""
    networks: tuple[IPNetwork, ...] = ()
    """Those whose packets alone it drops; empty: it drops the packets of all nodes."""
    leading: bool = True
    """Only as a leader does the host forward these packets."""
    chain: str = ""
    """Where, as its sentence says it; empty: it is no chain."""

    def __str__(self) -> str:
        return self.text


def obstacles(
    chains: Iterable[BaseChain], sent: Iterable[Packet], interface: str, *, opening: bool
) -> tuple[Obstacle, ...]:
    """What drops `sent`, a sentence for each chain. `opening`: the agent has --forward-rules."""
    sent = tuple(sent)
    result = []
    for chain in chains:
        answers = [(packet, drops(chain, packet)) for packet in sent]
        dropped = [packet for packet, answer in answers if answer]
        named = {packet.protocol for packet in dropped}
        certain = not named.isdisjoint(UNTESTED)
        # Of a protocol what is certain is said; of ICMP, which echo requests try, nothing else that may be.
        beside = [protocol for protocol in _ORDER if protocol not in named and (protocol in UNTESTED or not certain)]
        doubtful = [packet for packet, answer in answers if answer is None and (packet.protocol or "tcp") in beside]
        if not (hit := dropped + doubtful):
            continue
        passing = {packet.version for packet, answer in answers if not answer}
        incoming, outgoing = ({getattr(packet, way) for packet in hit} for way in ("iif", "oif"))
        devices = sorted((incoming | outgoing) - {interface})
        families = " and ".join(f"IPv{version}" for version in sorted({packet.version for packet in hit}))
        how = "its policy is to drop" if chain.drops else "a rule there drops what no other accepts"
        result.append(
            Obstacle(
                f"the firewall {_what(dropped, doubtful, sent)} between {interface} and {', '.join(devices)} "
                f"({families}), in {chain} ({how}): " + remedy(chain, interface, incoming, outgoing, opening=opening),
                certain=certain,
                untested=any(packet.protocol in UNTESTED for packet in hit),
                blocked=frozenset(packet.version for packet in sent) - passing,
                chain=str(chain),
            )
        )
    return tuple(result)


def _what(dropped: Iterable[Packet], doubtful: Iterable[Packet], sent: Iterable[Packet]) -> str:
    parts = [(verb, packets) for verb, packets in (("drops", tuple(dropped)), ("may drop", tuple(doubtful))) if packets]
    verb, packets = parts[0]
    protocols, versions = ({getattr(packet, name) for packet in packets} for name in ("protocol", "version"))
    if protocols >= {packet.protocol for packet in sent if packet.version in versions}:
        return f"{verb} what this host forwards"
    clauses = [f"{verb} {_names(packets)} packets" for verb, packets in parts]
    return f"{', and '.join(clauses)}{',' if len(clauses) > 1 else ''} that this host forwards"


def _names(packets: Iterable[Packet]) -> str:
    protocols = {packet.protocol for packet in packets}
    return " and ".join(SHOWN[protocol] for protocol in _ORDER if protocol in protocols)


def remedy(
    chain: BaseChain, interface: str, incoming: Collection[str], outgoing: Collection[str], *, opening: bool
) -> str:  # fmt: skip
    """What lets mesh packets through, in the syntax of the program that keeps the chain. `incoming`, `outgoing`: the
    devices by which those come in and go out that it drops."""
    names = " ".join((chain.table, chain.name, *chain.chains))
    forwarding = chain.hook == "forward"  # --forward-rules opens no other chains.
    if chain.table == "firewalld":
        devices = sorted({*incoming, *outgoing} - {interface})
        words = " ".join(f"--add-interface={name}" for name in (interface, *devices))
        allow = f"firewall-cmd --permanent --zone=trusted {words} && firewall-cmd --reload"
        # That zone accepts everything: no place for a device that the internet reaches.
        private = f"if none of these devices has a public address: {allow}"
        if opening or not forwarding:
            return private
        return f"set KILO_FORWARD_RULES=true, which lets the mesh's packets through and no others; or, {private}"
    if "ufw" in names and forwarding:
        return f"ufw route allow in on {interface} && ufw route allow out on {interface}"
    if chain.hook in _BEFORE_ROUTING:  # By which device they will go out is not known there.
        return f"let through the mesh's packets that come in by {' and by '.join(sorted(incoming))} there"
    if chain.hook == "egress":
        return f"let through the mesh's packets that go out by {' and by '.join(sorted(outgoing))} there"
    accept = f"let through what comes in by {interface} and what goes out by {interface}"
    if not forwarding:
        return f"{accept} there"
    if opening:
        return f"{accept} there; --forward-rules could not"
    return f"set KILO_FORWARD_RULES=true, or {accept} there"


@frozen
class Refusal:
    """Something that drops all of TCP or of UDP that the host itself sends to the mesh or gets from it, as a sentence
    with its remedy."""

    text: str
    meant: bool
    """A firewall may well do so on purpose: what comes in for the host itself."""
    limits_echoes: bool = False
    """It is about echo requests, of which so many are dropped as exceed a limit."""
    chain: str = ""


def refusals(
    chains: Iterable[BaseChain], devices: Iterable[str], versions: Iterable[int], subnets: tuple[IPNetwork, ...]
) -> tuple[Refusal, ...]:
    """What drops such packets for certain. `devices`: those by which mesh packets come to the host and leave it."""
    versions, devices = sorted(versions), sorted(devices)
    result = []
    for chain in chains:
        incoming = chain.hook in _INCOMING
        if incoming and _limits_echoes(chain, versions, devices, subnets):
            result.append(
                Refusal(
                    f"the firewall takes a limited number of echo requests, in {chain}: where one is lost it is not "
                    "known whether other packets arrive",
                    meant=True,
                    limits_echoes=True,
                )
            )
        dropped = [
            packet
            for version in versions
            for device in devices
            for protocol in ("tcp", "udp")
            for packet in (Packet(version, *((device, "") if incoming else ("", device)), subnets, protocol),)
            if drops(chain, packet)
        ]
        if not dropped:
            continue
        names = ", ".join(sorted({packet.iif or packet.oif for packet in dropped}))
        families = " and ".join(f"IPv{version}" for version in sorted({packet.version for packet in dropped}))
        way, passed = ("come in from", "comes in") if incoming else ("go out to", "goes out")
        result.append(
            Refusal(
                f"the firewall drops all {_names(dropped)} packets that {way} the mesh by {names} ({families}), in "
                f"{chain}: if that is not meant, let through what {passed} by {names} there",
                meant=chain.hook == "input",
                chain=str(chain),
            )
        )
    return tuple(result)


def _limits_echoes(
    chain: BaseChain, versions: Iterable[int], devices: Iterable[str], subnets: tuple[IPNetwork, ...]
) -> bool:
    """Whether a rule of the chain, or of those of its table, may count echo requests against a limit."""
    echoes = [
        Packet(version, device, "", subnets, "icmp" if version == 4 else "icmpv6")
        for version in versions
        for device in devices
        if version in _VERSIONS.get(chain.family, ())
    ]
    return any(
        any(condition.kind in _LIMITS for condition in rule.conditions)
        and any(rule.matches(packet) is not False for packet in echoes)
        for rule in (*chain.rules, *(rule for rules in chain.chains.values() for rule in rules))
    )


# -- the older xtables ------------------------------------------------------------------------------------------------

_ENDS: dict[str, Verdict] = {"ACCEPT": "accept", "DROP": "drop", "REJECT": "drop", "RETURN": "return",
                             "NFQUEUE": "unknown", "DNAT": "accept", "REDIRECT": "accept", "NETMAP": "accept",
                             "TPROXY": "accept"}  # fmt: skip
TRANSLATING_TARGETS = frozenset({"DNAT", "REDIRECT", "NETMAP", "TPROXY", "DNPT"})
"""Targets of iptables' own that give a packet another destination, or take it for the host itself. After DNPT the next
rule decides."""
TAKING_TARGETS = frozenset({"REDIRECT", "TPROXY"})
"""Those that take it."""


_MOST_LINES = 5000
"""Of a table that translates addresses; Kubernetes has thousands."""
_TRANSLATED = re.compile(
    r"-A (?!OUTPUT |POSTROUTING )(?:.*[^!] )?-d (\S+) (?:.* )?-[jg] (?!(?:ACCEPT|MARK|MASQUERADE|RETURN|SNAT)\b)"
)
"""A rule that may translate what is for a network, or leads to others that may."""


def from_iptables(printed: str | None, version: int) -> BaseChain | None:
    """The chain FORWARD of what `iptables -S` or `ip6tables -S` prints (None: nothing was); None: there is none."""
    return _base_chain((printed or "").splitlines(), version, "filter", "FORWARD", "forward", 0)


def translation_from_iptables(printed: str | None, version: int) -> BaseChain:
    """The chain PREROUTING of what `iptables -t nat -S` prints. If that is too long to be followed, what is for the
    networks that its rules name may be translated; if it is not there (None: nothing was printed), all may be."""
    lines = (printed or "").splitlines()
    place = version, "nat", "PREROUTING", "prerouting", NF_PRIORITIES["dstnat"]
    long = len(lines) > _MOST_LINES
    chain = None if long else _base_chain(lines, *place)
    named = (Condition("daddr", _networks(lines)),) if long else ()
    return chain or _iptables_chain(*place, rules=(FilterRule(conditions=named, verdict="unknown", translates=True),))


def _networks(lines: Iterable[str]) -> tuple[IPNetwork, ...]:
    """Those of which the packets may be translated."""
    named = {match[1] for line in lines if (match := _TRANSLATED.match(line))}
    networks = []
    for text in named:
        with suppress(ValueError):  # Within a comment.
            networks.append(ip_network(text, strict=False))
    return tuple(networks)


def _base_chain(
    lines: Iterable[str], version: int, table: str, base: str, hook: str, priority: int
) -> BaseChain | None:  # fmt: skip
    chains: dict[str, list[FilterRule]] = {}
    policy = None
    for line in lines:
        try:
            words = shlex.split(line)
        except ValueError:
            continue
        if words[:2] == ["-P", base]:
            policy = words[-1]
        elif words[:1] == ["-N"]:
            chains.setdefault(words[-1], [])
        elif words[:1] == ["-A"]:
            chains.setdefault(words[1], []).append(_rule(words[2:]))
    if policy is None:
        return None
    complete = {name: tuple(rules) for name, rules in chains.items()}
    chain = _iptables_chain(version, table, base, hook, priority, rules=complete.get(base, ()))
    return evolve(chain, drops=policy == "DROP", chains=complete)


def _iptables_chain(
    version: int, table: str, base: str, hook: str, priority: int, *, rules: tuple[FilterRule, ...]
) -> BaseChain:  # fmt: skip
    return BaseChain(
        family="ip" if version == 4 else "ip6", table=table, name=base, hook=hook, priority=priority,
        drops=False, rules=rules, legacy=True,
    )  # fmt: skip


def protocol_condition(name: str, *, equal: bool) -> tuple[Condition, ...]:
    """The test for a protocol, by name or number, that iptables writes after `-p`."""
    return () if name in ("all", "0") else (Condition("protocol", _NUMBERS.get(name, name), equal),)


def _address(side: str, text: str, *, equal: bool) -> Condition:
    try:
        return Condition(side, ip_network(text, strict=False), equal)
    except ValueError:
        return Condition("?", side)  # Its mask is no prefix.


def _rule(words: list[str]) -> FilterRule:
    conditions: list[Condition] = []
    verdict: Verdict = ""
    target = comment = ""
    equal = True
    rest = iter(words)
    for word in rest:
        if word == "!":
            equal = False
            continue
        if word in ("-j", "-g"):
            target = next(rest, "")
            verdict = _ENDS.get(target, "goto" if word == "-g" else "jump")
            break  # What follows are the target's own words.
        if word in ("-i", "-o"):
            name = next(rest, "")
            conditions.append(Condition("iif" if word == "-i" else "oif", name.replace("+", "*"), equal))
        elif word in ("-s", "-d"):
            conditions.append(_address("saddr" if word == "-s" else "daddr", next(rest, ""), equal=equal))
        elif word == "-p":
            conditions += protocol_condition(next(rest, ""), equal=equal)
        elif word == "--comment":
            comment = next(rest, "")
        elif word in ("--ctstate", "--state"):
            states = next(rest, "").split(",")
            test = new_packets(("NEW" in states) is equal, ("UNTRACKED" in states) is equal)
            conditions.append(of_status(test) if "DNAT" in states else test)
        elif word == "-m":
            module = next(rest, "")
            # Those of protocols match by their own options alone, which follow.
            if module not in ("comment", "conntrack", "state", "tcp", "udp", "icmp", "icmp6", "addrtype"):
                conditions.append(Condition("?"))
        elif word in ("--match-set", "--dst-range"):
            *_, fields = [next(rest, "") for _ in range(2 if word == "--match-set" else 1)]
            tests = word == "--dst-range" or "dst" in fields.split(",")
            conditions.append(Condition("?", "daddr" if tests else None, equal))
        elif word == "--dst-type":
            conditions.append(Condition("local", True, equal) if next(rest, "") == "LOCAL" else Condition("?"))
        else:
            # Not by its own name: a set may be called as a kind is.
            conditions.append(Condition("?"))
        equal = True
    # A target that is no chain (LOG, MARK) leaves the packet to the next rule: an unknown chain is an empty one.
    return FilterRule(
        conditions=tuple(conditions), verdict=verdict, target=target, comment=comment,
        translates=target in TRANSLATING_TARGETS, takes=target in TAKING_TARGETS,
    )  # fmt: skip
