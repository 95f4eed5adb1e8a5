"""nftables' tables as nfnetlink tells of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from ipaddress import ip_address
from typing import Any

from kilo_etcd.kernel.firewall.nftables import ACCEPT_VERDICT, KNOWN, VALUES
from kilo_etcd.kernel.firewall.table import AddressSet, Chain, Expression, Rule
from kilo_etcd.kernel.netlink import formats
from kilo_etcd.kernel.netlink.codec import Reader, elements
from kilo_etcd.kernel.netlink.formats import nfnetlink, nft, nft_obj_msg
from kilo_etcd.model import IPAddress

PROTOCOL = formats.core.NETLINK_NETFILTER
GROUP = nfnetlink.NFNLGRP_NFTABLES

_HOOKS = {number: name for name, number in formats.NF_INET_HOOKS.items()}
_ANONYMOUS = 1 << nft.nft_set_msg.set_flags.ops.index("NFT_SET_ANONYMOUS")

_expr = nft.nft_rule_msg.nft_expr
_generations = Reader(nft.nft_gen_msg, "NFTA_GEN_ID")
_chains = Reader(
    nft.nft_chain_msg, "nfgen_family",
    "NFTA_CHAIN_TABLE", "NFTA_CHAIN_NAME", "NFTA_CHAIN_HOOK", "NFTA_CHAIN_POLICY", "NFTA_CHAIN_TYPE",
)  # fmt: skip
_hooks = Reader(nft.nft_chain_msg.hook, "NFTA_HOOK_HOOKNUM", "NFTA_HOOK_PRIORITY", "NFTA_HOOK_DEV", "NFTA_HOOK_DEVS")
_rules = Reader(nft.nft_rule_msg, "NFTA_RULE_TABLE", "NFTA_RULE_CHAIN", "NFTA_RULE_EXPRESSIONS")
_sets = Reader(nft.nft_set_msg, "NFTA_SET_TABLE", "NFTA_SET_NAME", "NFTA_SET_FLAGS", "NFTA_SET_KEY_LEN")
_lists = Reader(nft.nft_set_elem_list_msg, "NFTA_SET_ELEM_LIST_TABLE", "NFTA_SET_ELEM_LIST_ELEMENTS")
_elements = Reader(nft.nft_set_elem_list_msg.set_elem, "NFTA_SET_ELEM_KEY")
values = Reader(nft.nft_set_elem_list_msg.set_elem.data_attributes, "NFTA_DATA_VALUE", "NFTA_DATA_VERDICT")
verdicts = Reader(_expr.nft_immediate.nfta_data.verdict, "NFTA_VERDICT_CODE", "NFTA_VERDICT_CHAIN")
_objects = Reader(nft_obj_msg, "NFTA_OBJ_TABLE", "NFTA_OBJ_NAME")
_tables = Reader(nft.nft_table_msg, "NFTA_TABLE_NAME")
expressions = Reader(_expr, "NFTA_EXPR_NAME", "NFTA_EXPR_DATA")


def subsystem(kind: int) -> bool:
    """Whether a message of this type is one of nftables."""
    return bool(kind >> 8 == nfnetlink.NFNL_SUBSYS_NFTABLES)


def read_generation(body: bytes) -> int:
    """The number that changes with every change of nftables."""
    return int.from_bytes(_generations(body)["NFTA_GEN_ID"])


def read_chain(body: bytes, table: str) -> Chain | None:
    """None: it is another table's."""
    result, hook = read_chain_items(body)
    if text(result, "NFTA_CHAIN_TABLE") != table:
        return None
    number = int.from_bytes(hook["NFTA_HOOK_HOOKNUM"]) if "NFTA_HOOK_HOOKNUM" in hook else -1
    accepts = result.get("NFTA_CHAIN_POLICY") == ACCEPT_VERDICT
    return Chain(
        name=text(result, "NFTA_CHAIN_NAME"),
        # A chain that drops by default is none of ours, whatever its name.
        kind=text(result, "NFTA_CHAIN_TYPE") if accepts else "",
        hook=_HOOKS.get(number, ""),
        priority=int.from_bytes(hook.get("NFTA_HOOK_PRIORITY", b""), signed=True),
    )


def read_chain_items(body: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The attributes of a chain, and those of its hook."""
    attributes = _chains(body)
    return attributes, _hooks(attributes["NFTA_CHAIN_HOOK"]) if "NFTA_CHAIN_HOOK" in attributes else {}


def chain_of(body: bytes) -> str:
    """The chain that an event about a rule is about."""
    return text(_rules(body), "NFTA_RULE_CHAIN")


def read_set(body: bytes, table: str) -> AddressSet | None:
    """A set without its elements. None: it is another table's, or anonymous."""
    attributes = _sets(body)
    if (
        text(attributes, "NFTA_SET_TABLE") != table
        or int.from_bytes(attributes.get("NFTA_SET_FLAGS", b"")) & _ANONYMOUS
    ):
        return None
    version = 4 if int.from_bytes(attributes.get("NFTA_SET_KEY_LEN", b"")) == 4 else 6
    return AddressSet(name=text(attributes, "NFTA_SET_NAME"), version=version, addresses=frozenset())


def read_addresses(body: bytes, table: str) -> list[IPAddress]:
    """The elements of a set of addresses that one message holds."""
    attributes = _lists(body)
    if text(attributes, "NFTA_SET_ELEM_LIST_TABLE") != table:
        return []
    keys = [
        values(_elements(element).get("NFTA_SET_ELEM_KEY", b"")).get("NFTA_DATA_VALUE", b"")
        for element in elements(attributes.get("NFTA_SET_ELEM_LIST_ELEMENTS", b""))
    ]
    return [ip_address(key) for key in keys if len(key) in (4, 16)]


def read_object(body: bytes, table: str) -> str | None:
    """The name of a counter. None: it is another table's."""
    attributes = _objects(body)
    return text(attributes, "NFTA_OBJ_NAME") if text(attributes, "NFTA_OBJ_TABLE") == table else None


def read_rule(body: bytes, table: str) -> Rule | None:
    """None: it is another table's."""
    attributes = _rules(body)
    if text(attributes, "NFTA_RULE_TABLE") != table:
        return None
    expressions = tuple(map(_expression, elements(attributes.get("NFTA_RULE_EXPRESSIONS", b""))))
    return Rule(chain=text(attributes, "NFTA_RULE_CHAIN"), expressions=expressions)


def _expression(body: bytes) -> Expression:
    attributes = expressions(body)
    name = text(attributes, "NFTA_EXPR_NAME")
    if name not in KNOWN or "NFTA_EXPR_DATA" not in attributes:
        return name, ()
    values = _known(name)(attributes["NFTA_EXPR_DATA"])
    return name, tuple(
        [(attribute, _value(attribute, values[attribute])) for attribute in KNOWN[name] if attribute in values]
    )


@cache
def _known(name: str) -> Reader:
    return Reader(getattr(_expr, f"nft_{name}"), *KNOWN[name])


def _value(name: str, data: bytes | int) -> bytes:
    if isinstance(data, int):
        # Of one byte: all other numbers of nftables are big-endian.
        return bytes([data])
    if name in VALUES:
        attributes = values(data)
        if "NFTA_DATA_VERDICT" in attributes:
            attributes = verdicts(attributes["NFTA_DATA_VERDICT"])
        value: bytes = attributes.get("NFTA_DATA_VALUE", attributes.get("NFTA_VERDICT_CODE", b""))
        return value
    return data


_TABLES = {
    nft.NFT_MSG_NEWTABLE: (_tables, "NFTA_TABLE_NAME"), nft.NFT_MSG_DELTABLE: (_tables, "NFTA_TABLE_NAME"),
    nft.NFT_MSG_NEWCHAIN: (_chains, "NFTA_CHAIN_TABLE"), nft.NFT_MSG_DELCHAIN: (_chains, "NFTA_CHAIN_TABLE"),
    nft.NFT_MSG_NEWRULE: (_rules, "NFTA_RULE_TABLE"), nft.NFT_MSG_DELRULE: (_rules, "NFTA_RULE_TABLE"),
    nft.NFT_MSG_NEWSET: (_sets, "NFTA_SET_TABLE"), nft.NFT_MSG_DELSET: (_sets, "NFTA_SET_TABLE"),
    nft.NFT_MSG_NEWSETELEM: (_lists, "NFTA_SET_ELEM_LIST_TABLE"),
    nft.NFT_MSG_DELSETELEM: (_lists, "NFTA_SET_ELEM_LIST_TABLE"),
    nft.NFT_MSG_NEWOBJ: (_objects, "NFTA_OBJ_TABLE"), nft.NFT_MSG_DELOBJ: (_objects, "NFTA_OBJ_TABLE"),
}  # fmt: skip
"""Command of an event -> how its table is read."""


def table_of(kind: int, body: bytes) -> str:
    """The table that an event is about, in its own family; empty: about none."""
    reader, name = _TABLES.get(kind & 0xFF, (None, ""))
    return "" if reader is None else text(reader(body), name)


def family_of(body: bytes) -> int:
    """The family of a table, of any message about it."""
    return body[0] if body else 0


def text(attributes: Mapping[str, Any], name: str) -> str:
    """The text of an attribute, without its NUL; empty if the attribute is missing."""
    data: bytes = attributes.get(name, b"")
    return data.rstrip(b"\0").decode(errors="replace")
