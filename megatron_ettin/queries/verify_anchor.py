"""Compare a run's ledger with the heads that were anchored while it trained."""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from megatron_ettin.data.anchor import Anchor, AnchoredHead
from megatron_ettin.order.ledger import Head
from megatron_ettin.queries.answer import Check
from megatron_ettin.queries.branches import Branch


def check_anchor(anchor: Anchor, branches: Sequence[Branch]) -> Check:
    """Look for each anchored head in the ledger and its forks; name the first that is not there.

    Raises:
        AnchorError: the place does not answer.
    """
    check = Check(name="anchor")
    heads, others = anchor.heads()
    check.items = len(heads)
    if others:
        check.notes.append(
            f"{anchor.address}: {len(others)} files hold no whole head, the first is {others[0]}: "
            f"their writer was killed"
        )
    if not heads:
        check.fail(f"{anchor.address}: holds no head")
        return check
    missing = [head for head in heads if not any(b.ledger.holds(head.head) for b in branches)]
    if missing:
        check.fail(_describe(missing[0], anchor, branches, agreed=heads[: heads.index(missing[0])]))
        check.failures = len(missing)
        return check
    ledger = branches[0].ledger
    present = [head.head.seq for head in heads if ledger.holds(head.head)]
    if len(present) < len(heads):
        check.notes.append(f"{len(heads) - len(present)} anchored heads are in forks")
    newer = ledger.head.seq - max(present, default=-1)
    if newer:
        check.notes.append(f"the last {newer} records are newer than the last anchored head")
    return check


def _describe(
    missing: AnchoredHead,
    anchor: Anchor,
    branches: Sequence[Branch],
    *,
    agreed: Sequence[AnchoredHead],
) -> str:
    """Return where and when the ledger was other than it is."""
    what = (
        f"{anchor.address}/{missing.name}: record {missing.head.seq} had the chain hash "
        f"{missing.head.chain} on {_date(missing)}, but {_present(missing.head, branches)}"
    )
    if not agreed:
        return f"{what}; no earlier head agrees: it is another run's ledger, or was written anew"
    last = agreed[-1]
    return f"{what}; the last head that agrees is record {last.head.seq} of {_date(last)}"


def _present(head: Head, branches: Sequence[Branch]) -> str:
    if not branches:
        return "the ledger is damaged"
    records = branches[0].ledger.records
    if head.seq >= len(records):
        return f"the ledger ends with record {len(records) - 1}"
    return f"today it has {records['chain'][head.seq].tobytes().hex()}, and no fork has the other"


def _date(head: AnchoredHead) -> str:
    """Return the time of writing in UTC, to the second."""
    moment = datetime.datetime.fromtimestamp(head.unix_ns // 10**9, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M:%S UTC")
