"""An nftables table as requests of nfnetlink, to be sent between `begin` and `end`. Pure."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache

from kilo_etcd.kernel.firewall.nftables import ACCEPT, ACCEPT_VERDICT, KNOWN, TEXTS, VALUES, VERDICT_REGISTER, matching
from kilo_etcd.kernel.firewall.openings import Opening
from kilo_etcd.kernel.firewall.table import AddElements, AddressSet, DeleteElements, Expression, FirewallTable
from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import Container, Writer, encode, read
from kilo_etcd.kernel.netlink.formats import core, nfgen_msg, nfnetlink, nft, nft_obj_msg
from kilo_etcd.kernel.netlink.sockets import NetlinkMessage

_FAMILIES = {"inet": nft.NFPROTO_INET, "ip": nft.NFPROTO_IPV4, "ip6": nft.NFPROTO_IPV6}
_SUBSYSTEM = nfnetlink.NFNL_SUBSYS_NFTABLES
_FIXED = (nft.NFPROTO_INET, 0, 0)
_CREATE = core.NLM_F_CREATE
_APPEND = core.NLM_F_APPEND
_ELEMENTS = 1000
"""Elements per message: a list is one attribute, which has at most 65,535 bytes."""
_KEY_TYPE = {4: nft.DATA_TYPE_IPADDR, 6: nft.DATA_TYPE_IP6ADDR}
_KEY_LENGTH = {4: 4, 6: 16}


def begin() -> NetlinkMessage:
    """The message that begins a transaction."""
    return _delimiter(formats.NFNL_MSG_BATCH_BEGIN)


def end() -> NetlinkMessage:
    """The message that ends it."""
    return _delimiter(formats.NFNL_MSG_BATCH_END)


@cache
def _delimiter(kind: int) -> NetlinkMessage:
    return NetlinkMessage(kind, 0, encode(nfgen_msg, (0, 0, _SUBSYSTEM), ()))


@cache
def get_generation() -> NetlinkMessage:
    """Asks for the number that changes with every change of nftables."""
    return NetlinkMessage(_type(nft.NFT_MSG_GETGEN), 0, encode(nft.nft_gen_msg, _FIXED, ()))


def get_table(name: str) -> NetlinkMessage:
    """Asks whether there is a table of that name, of family inet."""
    return _message(nft.NFT_MSG_GETTABLE, nft.nft_table_msg, ("NFTA_TABLE_NAME", name))


def get_chains(table: str) -> NetlinkMessage:
    """Asks for the chains of a table. The kernel may answer with those of other tables too."""
    return _message(nft.NFT_MSG_GETCHAIN, nft.nft_chain_msg, ("NFTA_CHAIN_TABLE", table))


def get_rules(table: str) -> NetlinkMessage:
    """Asks for the rules of all chains of a table."""
    return _message(nft.NFT_MSG_GETRULE, nft.nft_rule_msg, ("NFTA_RULE_TABLE", table))


def get_sets(table: str, family: int = nft.NFPROTO_INET) -> NetlinkMessage:
    """Asks for the sets of a table, without their elements."""
    return _message(nft.NFT_MSG_GETSET, nft.nft_set_msg, ("NFTA_SET_TABLE", table), family=family)


def get_elements(table: str, name: str, family: int = nft.NFPROTO_INET) -> NetlinkMessage:
    """Asks for the elements of one set."""
    return _message(nft.NFT_MSG_GETSETELEM, nft.nft_set_elem_list_msg, *_of_set(table, name), family=family)


@cache
def get_all_tables() -> NetlinkMessage:
    """Of all families."""
    return _message(nft.NFT_MSG_GETTABLE, nft.nft_table_msg, family=socket.AF_UNSPEC)


@cache
def get_all_chains() -> NetlinkMessage:
    """Of all tables of all families."""
    return _message(nft.NFT_MSG_GETCHAIN, nft.nft_chain_msg, family=socket.AF_UNSPEC)


def get_rules_of(table: str, chain: str, family: int) -> NetlinkMessage:
    """Of one chain. Old kernels answer with all chains."""
    return _message(nft.NFT_MSG_GETRULE, nft.nft_rule_msg, *_of_chain(table, chain), family=family)


def insert_rule(opening: Opening) -> NetlinkMessage:
    """Puts a rule at the head of its chain."""
    family = _FAMILIES[opening.family]
    head = _message(
        nft.NFT_MSG_NEWRULE, nft.nft_rule_msg, *_of_chain(opening.table, opening.chain),
        ("NFTA_RULE_USERDATA", opening.comment), flags=_CREATE, family=family,
    )  # fmt: skip
    expressions = _expressions(*map(_packed, (*matching(opening.match), ACCEPT)))
    return NetlinkMessage(head.type, head.flags, head.body + expressions)


def delete_rule(opening: Opening) -> NetlinkMessage:
    """Removes a rule of ours from another program's chain, by its handle."""
    return _message(
        nft.NFT_MSG_DELRULE, nft.nft_rule_msg, *_of_chain(opening.table, opening.chain),
        ("NFTA_RULE_HANDLE", opening.handle), family=_FAMILIES[opening.family],
    )  # fmt: skip


def get_objects(table: str) -> NetlinkMessage:
    """Asks for the named objects of a table, such as counters."""
    return _message(nft.NFT_MSG_GETOBJ, nft_obj_msg, ("NFTA_OBJ_TABLE", table))


def replace_table(table: FirewallTable) -> list[NetlinkMessage]:
    """The messages that put a table in the place of what there is of that name."""
    messages = [*delete_table(table.name), _new_table(table.name)]
    for counter in table.counters:
        messages.append(
            _message(
                nft.NFT_MSG_NEWOBJ, nft_obj_msg,
                ("NFTA_OBJ_TABLE", table.name), ("NFTA_OBJ_NAME", counter),
                ("NFTA_OBJ_TYPE", formats.NFT_OBJECT_COUNTER), ("NFTA_OBJ_DATA", {"attrs": []}),
                flags=_CREATE,
            )
        )  # fmt: skip
    for number, address_set in enumerate(table.sets, 1):
        messages.append(
            _message(
                nft.NFT_MSG_NEWSET,
                nft.nft_set_msg,
                ("NFTA_SET_TABLE", table.name),
                ("NFTA_SET_NAME", address_set.name),
                ("NFTA_SET_FLAGS", frozenset()),
                ("NFTA_SET_KEY_TYPE", _KEY_TYPE[address_set.version]),
                ("NFTA_SET_KEY_LEN", _KEY_LENGTH[address_set.version]),
                ("NFTA_SET_ID", number),
                flags=_CREATE,
            )
        )
        messages += _all_elements(table.name, address_set, nft.NFT_MSG_NEWSETELEM, _CREATE)
    for chain in table.chains:
        hook = [
            ("NFTA_HOOK_HOOKNUM", formats.NF_INET_HOOKS[chain.hook]), ("NFTA_HOOK_PRIORITY", chain.priority)
        ]  # fmt: skip
        messages.append(
            _message(
                nft.NFT_MSG_NEWCHAIN, nft.nft_chain_msg,
                ("NFTA_CHAIN_TABLE", table.name), ("NFTA_CHAIN_NAME", chain.name), ("NFTA_CHAIN_HOOK", {"attrs": hook}),
                ("NFTA_CHAIN_POLICY", _as_number(ACCEPT_VERDICT)), ("NFTA_CHAIN_TYPE", chain.kind),
                flags=_CREATE,
            )
        )  # fmt: skip
    heads: dict[str, bytes] = {}
    for rule in table.rules:
        if rule.chain not in heads:
            heads[rule.chain] = encode(nft.nft_rule_msg, _FIXED, _of_chain(table.name, rule.chain))
        body = heads[rule.chain] + _expressions(*map(_packed, rule.expressions))
        messages.append(NetlinkMessage(_type(nft.NFT_MSG_NEWRULE), _CREATE | _APPEND, body))
    return messages


def change_elements(change: AddElements | DeleteElements) -> list[NetlinkMessage]:
    """The messages that have addresses come into a set, or leave it."""
    if isinstance(change, AddElements):
        return _all_elements(change.table, change.set, nft.NFT_MSG_NEWSETELEM, _CREATE)
    return _all_elements(change.table, change.set, nft.NFT_MSG_DELSETELEM, 0)


def _all_elements(table: str, address_set: AddressSet, command: int, flags: int) -> list[NetlinkMessage]:
    addresses = sorted(address_set.addresses, key=int)
    head = encode(nft.nft_set_elem_list_msg, _FIXED, _of_set(table, address_set.name))
    parts = (addresses[start : start + _ELEMENTS] for start in range(0, len(addresses), _ELEMENTS))
    return [
        NetlinkMessage(_type(command), flags, head + _elements(*[_key(address.packed) for address in part]))
        for part in parts
    ]


def delete_table(name: str) -> list[NetlinkMessage]:
    """The messages that remove a table, whether it is there or not."""
    return [_new_table(name), _message(nft.NFT_MSG_DELTABLE, nft.nft_table_msg, ("NFTA_TABLE_NAME", name))]


def _new_table(name: str) -> NetlinkMessage:
    return _message(nft.NFT_MSG_NEWTABLE, nft.nft_table_msg, ("NFTA_TABLE_NAME", name), flags=_CREATE)


def _of_set(table: str, name: str) -> tuple[tuple[str, object], ...]:
    return ("NFTA_SET_ELEM_LIST_TABLE", table), ("NFTA_SET_ELEM_LIST_SET", name)


def _of_chain(table: str, name: str) -> tuple[tuple[str, object], ...]:
    return ("NFTA_RULE_TABLE", table), ("NFTA_RULE_CHAIN", name)


def _message(
    command: int, kind: object, *attributes: tuple[str, object], flags: int = 0, family: int = nft.NFPROTO_INET
) -> NetlinkMessage:
    return NetlinkMessage(_type(command), flags, encode(kind, (family, 0, 0), attributes))


def _type(command: int) -> int:
    return int(_SUBSYSTEM << 8 | command)


def _as_number(value: bytes) -> object:
    return int.from_bytes(value, signed=True)


def _as_text(value: bytes) -> object:
    return value.rstrip(b"\0").decode()


def _as_flags(names: Sequence[str]) -> Callable[[bytes], object]:
    """`names`: pyroute2's, of each bit."""

    def convert(value: bytes) -> object:
        bits = int.from_bytes(value)
        return frozenset(name for bit, name in enumerate(names) if bits & 1 << bit)

    return convert


def _as_value(packed: bytes) -> object:
    ((name, value),) = read(_data, packed).items()
    return {"attrs": [(name, value if name == "NFTA_DATA_VALUE" else _as_code(value))]}


def _as_code(packed: bytes) -> object:
    return {"attrs": [("NFTA_VERDICT_CODE", _as_number(read(_verdict, packed)["NFTA_VERDICT_CODE"]))]}


_element = nft.nft_set_elem_list_msg.set_elem
_data = _element.data_attributes
_expr = nft.nft_rule_msg.nft_expr
_verdict = _data.verdict_attributes
_elements = Container.of(nft.nft_set_elem_list_msg, "NFTA_SET_ELEM_LIST_ELEMENTS")
_expressions = Container.of(nft.nft_rule_msg, "NFTA_RULE_EXPRESSIONS")
_pack_element = Writer(_element, {"NFTA_SET_ELEM_KEY": _as_value})
_pack_value = Writer(_data, {"NFTA_DATA_VERDICT": _as_code})
_pack_verdict = Writer(_verdict, {"NFTA_VERDICT_CODE": _as_number})
_CONVERTERS: Mapping[str, Callable[[bytes], object]] = {
    **dict.fromkeys((name for names in KNOWN.values() for name in names), _as_number),
    **dict.fromkeys(TEXTS, _as_text),
    "NFTA_LOOKUP_FLAGS": _as_flags(_expr.nft_lookup.lookup_flags.ops),
    "NFTA_FIB_RESULT": _as_flags(_expr.nft_fib.fib_result.ops),
    **dict.fromkeys(VALUES, _as_value),
}


def _key(packed: bytes) -> bytes:
    return _pack_element((), {"NFTA_SET_ELEM_KEY": _value(packed)})


def _value(data: bytes) -> bytes:
    return _pack_value((), {"NFTA_DATA_VALUE": data})


@lru_cache(256)
def _packed(expression: Expression) -> bytes:
    name, values = expression
    to_verdict = ("NFTA_IMMEDIATE_DREG", VERDICT_REGISTER) in values
    attributes = {attribute: _wrapped(attribute, value, to_verdict) for attribute, value in values}
    pack, pack_whole = _writers(name)
    return pack_whole((), {"NFTA_EXPR_NAME": name.encode() + b"\0", "NFTA_EXPR_DATA": pack((), attributes)})


@cache
def _writers(name: str) -> tuple[Writer, Writer]:
    """Of an expression: packs its attributes; packs them with its name."""
    kind = getattr(_expr, f"nft_{name}")

    def as_data(packed: bytes) -> object:
        return {
            "attrs": [(attribute, _CONVERTERS[attribute](value)) for attribute, value in read(kind, packed).items()]
        }

    return Writer(kind, _CONVERTERS), Writer(_expr, {"NFTA_EXPR_NAME": _as_text, "NFTA_EXPR_DATA": as_data})


def _wrapped(name: str, value: bytes, to_verdict: bool) -> bytes:
    if name not in VALUES:
        return value
    if to_verdict:
        return _pack_value((), {"NFTA_DATA_VERDICT": _pack_verdict((), {"NFTA_VERDICT_CODE": value})})
    return _value(value)


def transaction(messages: Sequence[NetlinkMessage]) -> list[NetlinkMessage]:
    """The messages as one, which the kernel does whole or not at all."""
    return [begin(), *messages, end()]
