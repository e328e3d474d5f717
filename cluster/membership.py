"""Who decides on a pipeline's membership: the planner and the scaler that a layout calls for.

Owns their construction from a plan. Knows nothing of how they decide.
"""

from dataclasses import dataclass

from actors.config import ScalingConfig
from cluster.autoscale import Autoscaler
from cluster.balance import Balancer
from cluster.layout import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Both live as long as the router."""

    balancer: Balancer
    autoscaler: Autoscaler

    def apply(self, scaling: ScalingConfig) -> None:
        """Other bounds, for the pipeline that runs. Safe from any thread."""
        self.balancer.rebalance_gain = scaling.rebalance_gain
        self.autoscaler.set_bounds(scaling)


def plan_membership(plan: Plan, scaling: ScalingConfig) -> Membership:
    """What `plan` says is where the pipeline starts, and where it stays without bounds in `scaling`."""
    pipeline, model = plan.pipeline, plan.footprint.model
    balancer = Balancer(
        layout=pipeline.layout,
        moe_layers=model.moe_layers,
        num_experts=model.num_experts,
        num_slots=pipeline.expert_slots,
        replicas=pipeline.expert_replicas,
        rebalance_gain=scaling.rebalance_gain,
        attention_tp=pipeline.attention_tp,
        expert_tp=pipeline.expert_tp,
    )
    autoscaler = Autoscaler(
        scaling, pipeline.attention_ranks, pipeline.expert_ranks, pipeline.layout, is_fixed=pipeline.attention_tp > 1
    )
    return Membership(balancer=balancer, autoscaler=autoscaler)
