"""LoRA-Switch for language models: a token picks its LoRAs once, for all layers (arXiv 2405.17741).

multilora.gate_token_switch has the router, multilora.token_route how it decodes; multilora.lab.train.token_switch
trains one. Not the LoRA Switch of pictures (arXiv 2402.16843), which is multilora.route.switch.
"""

from typing import Annotated

from multilora.method import Opt, method
from multilora.plan import Moment, Pass


@method(
    title="A trained router picks LoRAs for each token, the same in every layer; without a gate, all the same",
    paper="https://arxiv.org/abs/2405.17741",
    cost="1",
    laws=("single", "zero", "gauge", "permutation", "linear"),
)
def token_switch(
    loras,
    *,
    gate: Annotated[str, Opt("file of a gate for these LoRAs, or the name of an embedded one; none: the mean")] = "",
    mask: Annotated[str, Opt("names of LoRAs that the gate never picks, comma-separated")] = "",
):
    """One pass; the shares of a token sum to 1, the users' weights multiply them. Trained gates are for texts.

    A language model decodes with form="side" beside its weights, with form="rebuilt" by merging for each token (the
    paper's way, one text at a time). The laws are those of equal shares; a trained gate keeps all but "linear". Raises
    ValueError for a gate of other LoRAs and a mask that names none of the set.
    """
    from multilora.gate_mole import masked
    from multilora.gate_token_switch import TokenSwitchGate
    from multilora.gates import read_gate
    from multilora.routing import Uniform

    router = TokenSwitchGate.of(read_gate(gate), loras) if gate else Uniform()
    live = masked([lora.card.name for lora in loras], mask) if mask else None

    def plan(moment: Moment) -> list[Pass]:
        return [Pass(router.asked(moment.weights, moment.t, live))]

    return plan
