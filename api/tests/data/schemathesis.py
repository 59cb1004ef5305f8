"""What the document's own string formats look like, and what a run must not do: take away its own key, or send one
Idempotency-Key with several requests."""

import ipaddress
import os
import uuid

import schemathesis
from hypothesis import strategies as st

PUBLIC_KEYS = [
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti alice@example.com",
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMZKtnhQXtdkgeXLDWMVLyHOuMCQKMuDHNFHTYuBKzNm",
]


def ranges(within):
    """Ranges in one of which not all is always denied: a rule for such a range is refused."""
    within = ipaddress.ip_network(within)
    networks = st.builds(
        lambda address, bits: ipaddress.ip_network((address, bits), strict=False),
        st.ip_addresses(network=within),
        st.integers(within.prefixlen, within.max_prefixlen),
    )
    return networks.map(str)


OPEN = ["1.0.0.0/8", "10.0.0.0/8", "203.0.113.0/24", "2400::/12", "fd12::/16"]
everything = st.sampled_from(["0.0.0.0/0", "::/0", "0.0.0.0/1"])
schemathesis.openapi.format("cidr", st.one_of(everything, *map(ranges, OPEN)))
schemathesis.openapi.format("ssh-public-key", st.sampled_from(PUBLIC_KEYS))
# Which version is the newest is not to be guessed; links and `*` have it right.
schemathesis.openapi.format("entity-tags", st.just("*"))
schemathesis.openapi.format("idempotency-key", st.uuids().map(str))
# A cursor is handed out, not made up; an empty one is the first page.
schemathesis.openapi.format("page-cursor", st.just(""))


@schemathesis.hook
def before_call(context, case, kwargs):
    # One made-up key goes with several requests; a client makes one for each.
    key = (case.headers or {}).get("Idempotency-Key", "")
    if len(key) == 36 and key.count("-") == 4:
        case.headers["Idempotency-Key"] = str(uuid.uuid4())
    # A variable that is not there has no version, not even `*`; whether it is there is not to be guessed.
    if case.operation.label == "PUT /v1/env/{key}" and (case.headers or {}).get("If-Match") == "*":
        del case.headers["If-Match"]
    if case.operation.label == "DELETE /v1/keys/{key_id}":
        if case.path_parameters.get("key_id") == os.environ["TAPGATE_OWN_KEY"]:
            case.path_parameters["key_id"] = "key_0000000000000000"
