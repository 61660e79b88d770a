"""LoRAMoE: a router in every layer shares out experts that were trained with it, token by token (arXiv 2312.09979).

multilora.gate_loramoe has the routers; multilora.lab.train.loramoe trains them with their experts.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass


@method(
    title="Every token shares out the LoRAs by routers trained with them; without a gate, all the same",
    paper="https://arxiv.org/abs/2312.09979",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "linear"),
)
def loramoe(loras, *, gate: Annotated[str, Opt("file of the routers of these LoRAs; none: the mean")] = ""):
    """One pass whose row every layer asks its router for; the users' weights multiply it.

    Experts that the set does not have are left out, the others' shares still sum to 1. The laws are those of equal
    shares; trained routers keep all but "linear", since their row depends on the input. Raises ValueError for a gate
    of other LoRAs.
    """
    from multilora.gate_loramoe import LoramoeGate
    from multilora.gates import read_gate
    from multilora.routing import Uniform

    router = LoramoeGate.of(read_gate(gate), loras) if gate else Uniform()

    def plan(moment: Moment) -> list[Pass]:
        return [Pass(router.asked(moment.weights, moment.t))]

    return plan
