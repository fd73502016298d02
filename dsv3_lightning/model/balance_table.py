"""The table of balance losses: what each is called, which tokens it is about, and where it is from. Imports no torch.

A new loss is a line here and a function in `balance.py`; the configuration's names and checks come from this table.
"""

from typing import NamedTuple


class BalanceLoss(NamedTuple):
    """name: as in `loss.balance`. source: where the equations are.

    whole_batch: its frequencies are those of the whole optimizer step, so that a layer reports sums per expert, which
        `balance.batch_loss` completes; else a layer reports the loss itself, a mean over sequences.
    needs_groups: it is about the `n_group` groups of experts.
    """

    name: str
    source: str
    whole_batch: bool = False
    needs_groups: bool = False


BALANCE_LOSSES = {
    loss.name: loss
    for loss in (
        BalanceLoss("sequence", "V3 eq. 17-20"),
        BalanceLoss("batch", "V3 §4.5.3", whole_batch=True),
        BalanceLoss("expert", "V2 eq. 23-25"),
        BalanceLoss("device", "V2 eq. 26-28", needs_groups=True),
        BalanceLoss("communication", "V2 eq. 29-31", needs_groups=True),
        BalanceLoss("switch", "arXiv 2101.03961 eq. 4-6", whole_batch=True),
        BalanceLoss("z", "arXiv 2202.08906 eq. 5"),
    )
}
