"""MoLE: a gate weighs frozen LoRAs, layer by layer, by what each of them would add there (arXiv 2404.13628).

multilora.gate_mole has the gate and what differs from the paper; multilora.lab.train.gates trains one.
"""

from typing import Annotated

from multilora.guided import share
from multilora.method import Opt, method
from multilora.plan import Moment, Pass


@method(
    title="A trained gate weighs the LoRAs in every layer by what they add there; without a gate, all the same",
    paper="https://arxiv.org/abs/2404.13628",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "linear"),
)
def mole(
    loras,
    *,
    gate: Annotated[str, Opt("file of a gate for these LoRAs, or the name of an embedded one; none: the mean")] = "",
    mask: Annotated[str, Opt("names of LoRAs that the gate sees and leaves out, comma-separated")] = "",
    boost: Annotated[float, Opt("as of guided_merge; 0: the LoRAs are the same in both halves", 0.0, 3.0)] = 0.0,
):
    """One pass whose row every layer asks the gate for; the users' weights multiply it.

    A gate may have more LoRAs than the set: the missing ones are masked out, as are those of weight 0. The laws are
    those of equal shares; a trained gate keeps all but "linear", since its row depends on the input. Raises ValueError
    for a gate of other LoRAs and a mask that names none of the set.
    """
    from multilora.gate_mole import MoleGate, masked
    from multilora.gates import read_gate
    from multilora.routing import Uniform

    router = MoleGate.of(read_gate(gate), loras) if gate else Uniform()
    live = masked([lora.card.name for lora in loras], mask) if mask else None

    def plan(moment: Moment) -> list[Pass]:
        return [Pass(router.asked(moment.weights, moment.t, live), negative=share(moment, boost))]

    return plan
