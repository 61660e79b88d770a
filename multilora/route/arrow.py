"""Arrow: each token takes the LoRAs whose own input direction it lies along, without training (arXiv 2405.11157)."""

from typing import Annotated

from multilora.guided import share
from multilora.method import Opt, method
from multilora.plan import Moment, Pass


@method(
    title="Every token weighs the LoRAs by the direction that each acts on most; nothing is trained",
    paper="https://arxiv.org/abs/2405.11157",
    cost="1",
    laws=("single", "zero", "gauge", "permutation"),
)
def arrow(
    loras,
    *,
    top_k: Annotated[int, Opt("LoRAs that share a token at most", minimum=1)] = 3,
    temperature: Annotated[float, Opt("of the softmax over scores: low takes the best only", minimum=1e-6)] = 1.0,
    boost: Annotated[float, Opt("as of guided_merge; 0: the LoRAs are the same in both halves", 0.0, 3.0)] = 0.0,
):
    """One pass; the shares of a token sum to 1 in every layer, the users' weights multiply them."""
    from multilora.gate_arrow import ArrowRouter
    from multilora.routing import Asked

    router = ArrowRouter(top_k, temperature)

    def plan(moment: Moment) -> list[Pass]:
        return [Pass(Asked(router, moment.weights, moment.t), negative=share(moment, boost))]

    return plan
