"""Routers, ingresses and clients around the simulated ranks, and a seeded schedule of loads and faults.

Ingresses follow the rules of `actors/ingress/router_client.py`: they look for the router when they lose it, and submit
open requests again with the tokens that came. What comes of each request is judged as it comes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from scheduler_harness import VOCAB, generate
from sim_world import Cluster, World, resubmitted

from actors.config import PipelineConfig, ScalingConfig
from actors.router.core import RouterCore
from actors.router.epochs import EpochMachine
from actors.router.fleet import FleetNews, RankDown, RankUp
from actors.router.limits import SchedulerLimits
from actors.router.membership import Goal, Proposal
from actors.router.pages import PageGeometry, RankPages
from actors.types import (
    Attach,
    Beat,
    Cancel,
    FromRouter,
    Join,
    Joined,
    RankEndpoints,
    Request,
    Role,
    RouterStatus,
    SamplingParams,
    StepPlan,
    StepResult,
    Submit,
    TokenEvent,
    ToRank,
    ToRouter,
)
from cluster.autoscale import Autoscaler
from cluster.balance import Balancer

PACKET_S = 0.0005
TURN_S = 0.2  # between turns of a router to which nothing comes
ROUTER_BACK_S = 3.0
INGRESS_BEAT_S = 1.0
PATIENCE_S = 60.0


class Link:
    """Delivers in order, a little later, unless it is to lose something."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._last_s = 0.0
        self._num_to_lose = 0

    def send(self, action: Callable[[], None]) -> None:
        arrives_s = max(self._last_s, self._world.now_s + PACKET_S * self._world.rng.uniform(0.5, 2.0))
        self._last_s = arrives_s
        self._world.after(arrives_s - self._world.now_s, lambda: self._arrive(action))

    def _arrive(self, action: Callable[[], None]) -> None:
        if not self._num_to_lose:
            action()
        self._num_to_lose = max(0, self._num_to_lose - 1)

    def lose(self, num_messages: int) -> None:
        """A connection that is reset as so many are under way, and made again: they are lost, and nobody is told."""
        self._num_to_lose = num_messages


class SimFleet:
    """Implements `actors.router.fleet.Fleet` over the cluster's processes."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._news: list[FleetNews] = []

    def find(self) -> tuple[int, ...]:
        """Those that an earlier router began to start are found too, as Ray lists actors that are pending."""
        for rank in self._cluster.ranks:
            self.came_up(rank)
        return tuple(sorted({*self._cluster.ranks, *self._cluster.starting}))

    def start(self, rank: int, roles: Sequence[Role]) -> None:
        self._cluster.start(rank)

    def came_up(self, rank: int) -> None:
        process = self._cluster.ranks.get(rank)
        if process is None:
            self._news.append(RankDown(rank=rank, cause="no room"))
        else:
            self._news.append(RankUp(rank=rank, endpoints=process.endpoints))

    def has_room(self, roles: Sequence[Role]) -> bool:
        return len(self._cluster.ranks) + len(self._cluster.starting) < self._cluster.most_ranks

    def kill(self, rank: int) -> None:
        self._cluster.kill(rank)

    def ended(self, rank: int) -> None:
        self._news.append(RankDown(rank=rank, cause="its process ended"))

    def news(self) -> list[FleetNews]:
        news, self._news = self._news, []
        return news


class SimRouter:
    """One life of the router: the real core, on links to ranks and ingresses."""

    def __init__(self, pipeline: "Pipeline") -> None:
        self.pipeline = pipeline
        self.world = pipeline.world
        self.alive = True
        self.fleet = SimFleet(pipeline.cluster)
        machine = EpochMachine(
            pipeline.planner(), Goal(attention_ranks=pipeline.num_attention, expert_ranks=pipeline.num_experts_ranks),
            {}, "store:1", pipeline.config.join_timeout_s,
        )  # fmt: skip
        self.scaler = pipeline.scaler()
        self.machine = machine
        self.core = RouterCore(pipeline.config, pipeline.limits, machine, self.scaler, self.fleet, self)
        self._to_ranks: dict[int, tuple[Link, Link]] = {}
        self._to_ingress: dict[bytes, Link] = {}
        self._term = 0
        pipeline.cluster.on_up, pipeline.cluster.on_end = self.fleet.came_up, self.fleet.ended
        self.core.begin(self.world.now_s)
        self._turn()

    def _turn(self) -> None:
        if self.alive:
            self.core.turn(self.world.now_s)
            self.world.after(TURN_S, self._turn)

    def _take(self, action: Callable[[], None]) -> None:
        if self.alive:
            action()
            self.core.turn(self.world.now_s)

    # --- Outside ---

    def connect(self, rank: int, endpoints: RankEndpoints) -> None:
        self._to_ranks[rank] = (Link(self.world), Link(self.world))

    def disconnect(self, rank: int) -> None:
        self._to_ranks.pop(rank, None)

    def reset(self, rank: int, channel: int, num_there: int, num_back: int) -> None:
        """Loses the next so many messages of one of a rank's two connections, in each direction."""
        if rank in self._to_ranks:
            self._to_ranks[rank][channel].lose(num_there)
            self._backs(rank)[channel].lose(num_back)

    def to_rank(self, rank: int, message: ToRank) -> None:
        links = self._to_ranks.get(rank)
        if links is None:
            return
        if isinstance(message, Attach):
            self._term = message.term
        term, is_step = self._term, isinstance(message, Join | StepPlan)

        def answer(reply: Any) -> None:
            back = self._backs(rank)[isinstance(reply, Joined | StepResult)]
            back.send(lambda: self._hear(rank, links, reply))

        links[is_step].send(lambda: self._deliver(rank, term, message, answer))

    def _backs(self, rank: int) -> tuple[Link, Link]:
        return self.pipeline.backs.setdefault(rank, (Link(self.world), Link(self.world)))

    def _deliver(self, rank: int, term: int, message: ToRank, answer: Callable[[Any], None]) -> None:
        process = self.pipeline.cluster.ranks.get(rank)
        if process is not None:
            process.receive(term, message, answer)

    def _hear(self, rank: int, links: tuple[Link, Link], reply: Any) -> None:
        if self._to_ranks.get(rank) is links:
            self._take(lambda: self.core.on_rank(reply, self.world.now_s))

    def think(self, work: Callable[[], Proposal | None]) -> None:
        proposal = work()  # of what is so now; it may be otherwise when it is heard
        delay_s = self.world.rng.choice((0.0, 0.05, 2.0))
        self.world.after(delay_s, lambda: self._take(lambda: self.core.on_proposal(proposal, self.world.now_s)))

    def to_ingress(self, identity: bytes, message: FromRouter) -> None:
        ingress = self.pipeline.ingresses.get(identity)
        if ingress is not None:
            link = self._to_ingress.setdefault(identity, Link(self.world))
            link.send(lambda: ingress.hear(self, message))


@dataclass
class SimClient:
    """One request as its client sees it."""

    request: Request
    expected: list[int]
    reason: str
    sent_s: float
    got: list[int] = field(default_factory=list)
    ended: str = ""
    ended_s: float = 0.0
    is_cancelled: bool = False
    was_sent: bool = False

    def take(self, event: TokenEvent, now_s: float) -> None:
        assert not self.ended, "news after the last event"
        if event.tokens:
            assert event.token_index == len(self.got), "token indices skip or repeat"
        self.got += [token.token_id for token in event.tokens]
        assert self.got == self.expected[: len(self.got)], "tokens differ from the fault-free run's"
        if event.finish_reason is not None:
            assert self.got == self.expected and event.finish_reason == self.reason
            self.ended, self.ended_s = event.finish_reason, now_s
        elif event.error is not None:
            self.ended, self.ended_s = event.error.kind, now_s


class SimIngress:
    """An ingress replica: its open requests and its connection."""

    def __init__(self, pipeline: "Pipeline", name: str) -> None:
        self.pipeline = pipeline
        self.world = pipeline.world
        self.name = name
        self.alive = True
        self.open: dict[str, SimClient] = {}
        self.takes_requests = False
        self.router: SimRouter | None = None
        self.identity = b""
        self._connections = 0
        self._lost_s: float | None = None
        self._beat()

    def _beat(self) -> None:
        if not self.alive:
            return
        self._connect()
        self._send(Beat())
        if self._lost_s is not None and not self.takes_requests and self.world.now_s - self._lost_s > PATIENCE_S:
            for client in self.open.values():
                client.ended, client.ended_s = "UnavailableError", self.world.now_s
            self.open.clear()
        self.world.after(INGRESS_BEAT_S, self._beat)

    def _connect(self) -> None:
        """A dead router's connection breaks; the next one is found."""
        current = self.pipeline.router
        if self.router is not None and self.router is not current:
            self.router, self.takes_requests, self._lost_s = None, False, self.world.now_s
            self.pipeline.ingresses.pop(self.identity, None)
        if self.router is None and current is not None:
            self._connections += 1
            self.identity = f"{self.name}.{self._connections}".encode()
            self.pipeline.ingresses[self.identity] = self
            self.router, self._link = current, Link(self.world)

    def _send(self, message: ToRouter) -> None:
        router, identity = self.router, self.identity
        if router is not None:
            self._link.send(lambda: router._take(lambda: router.core.on_ingress(identity, message, self.world.now_s)))

    def ask(self, client: SimClient) -> None:
        self.open[client.request.request_id] = client
        self._submit(client)

    def _submit(self, client: SimClient) -> None:
        if not self.takes_requests:
            return
        request = resubmitted(client.request, client.got) if client.was_sent else client.request
        self._send(Submit(request=request, again=client.was_sent))
        client.was_sent = True

    def cancel(self, client: SimClient) -> None:
        if self.open.pop(client.request.request_id, None) is not None:
            client.is_cancelled, client.ended = True, "cancelled"
            self._send(Cancel(request_id=client.request.request_id))

    def hear(self, router: SimRouter, message: FromRouter) -> None:
        if not self.alive or router is not self.router:
            return
        if isinstance(message, RouterStatus):
            if message.serving and not self.takes_requests:
                self.takes_requests = True
                for client in list(self.open.values()):
                    self._submit(client)
            return
        for event in message.events:
            client = self.open.get(event.request_id)
            if client is not None:
                client.take(event, self.world.now_s)
                if client.ended:
                    del self.open[event.request_id]

    def lose_connection(self) -> None:
        """The channel breaks, and both ends live: the router has news under way that nobody will read."""
        self.pipeline.ingresses.pop(self.identity, None)
        self.router, self.takes_requests, self._lost_s = None, False, self.world.now_s

    def die(self) -> None:
        self.alive = False
        for client in self.open.values():
            client.ended = "ingress died"
        self.open.clear()
        self.pipeline.ingresses.pop(self.identity, None)


class Pipeline:
    """Everything together, from one seed."""

    def __init__(self, seed: int) -> None:
        self.world = World(seed)
        rng = self.rng = self.world.rng
        self.num_attention = rng.choice((1, 1, 2, 3))
        self.num_experts_ranks = rng.choice((1, 2, 3))
        self.colocated = rng.random() < 0.2
        if seed % 8 == 7:  # tensor-parallel attention: one unit of several ranks
            self.colocated, self.num_experts_ranks = True, rng.choice((2, 3))
        if self.colocated:
            self.num_attention = self.num_experts_ranks
        self.attention_tp = self.num_attention if seed % 8 == 7 else 1
        num_experts = rng.choice((4, 6))
        self.num_slots = -(-num_experts // self.num_experts_ranks) + rng.choice((0, 1, 2))
        self.replicas = rng.choice((1, 2)) if self.num_slots * self.num_experts_ranks >= 2 * num_experts else 1
        self.replicas = min(self.replicas, self.num_experts_ranks)
        self.expert_tp = self.attention_tp if seed % 16 == 15 else 1
        if self.expert_tp > 1:  # experts in slices, of which every rank has one
            self.num_slots, self.replicas = num_experts, 1
        self.moe_layers, self.num_experts = (1, 3), num_experts
        page_tokens, chunk = rng.choice(((4, 8), (2, 0), (4, 6)))
        geometry = PageGeometry(page_tokens=page_tokens, chunk_tokens=chunk, has_global=True)
        self.limits = SchedulerLimits(
            max_model_len=48, max_num_batched_tokens=rng.choice((6, 16, 64)), max_num_seqs=rng.choice((2, 4, 8)),
            max_queued_requests=100, page_tokens=page_tokens, chunk_tokens=chunk,
        )  # fmt: skip
        pages = RankPages(rng.choice((24, 40)), rng.choice((8, 16)))
        self.room = geometry.max_request_tokens(pages, self.limits.max_model_len)
        self.config = PipelineConfig(join_timeout_s=4.0, step_timeout_s=10.0)
        self.bounds = ScalingConfig(
            upscale_delay_s=2.0, downscale_delay_s=5.0, rebalance_interval_s=3.0, slow_rank_s=2.0
        )
        self.cluster = Cluster(
            self.world, pages, geometry, self.limits.max_num_seqs, self.moe_layers, num_experts,
            most_ranks=2 * (self.num_attention + self.num_experts_ranks) + 4,
        )  # fmt: skip
        self.geometry = geometry
        self.backs: dict[int, tuple[Link, Link]] = {}
        self.ingresses: dict[bytes, SimIngress] = {}
        self.router: SimRouter | None = None
        self.fronts = [SimIngress(self, f"ingress{i}") for i in range(rng.choice((1, 2)))]
        self.clients: list[SimClient] = []
        self.deadly: list[SimClient] = []  # whose requests end ranks
        self.start_router()

    def planner(self) -> Balancer:
        return Balancer(
            layout="colocated" if self.colocated else "disaggregated", moe_layers=self.moe_layers,
            num_experts=self.num_experts, num_slots=self.num_slots, replicas=self.replicas,
            attention_tp=self.attention_tp, expert_tp=self.expert_tp,
        )  # fmt: skip

    def scaler(self) -> Autoscaler:
        layout = "colocated" if self.colocated else "disaggregated"
        return Autoscaler(self.bounds, self.num_attention, self.num_experts_ranks, layout, self.attention_tp > 1)

    def start_router(self) -> None:
        self.router = SimRouter(self)

    def kill_router(self) -> None:
        if self.router is not None:
            self.router.alive = False
            self.router = None
            self.cluster.on_up = self.cluster.on_end = lambda rank: None
            self.world.after(ROUTER_BACK_S * self.rng.uniform(0.5, 2.0), self.start_router)

    # --- load ---

    def ask(self, deadline: bool = False) -> None:
        rng, number = self.rng, len(self.clients)
        num_prompt = rng.randint(1, self.room - 2)
        request = Request(
            request_id=f"r{number}",
            prompt_ids=tuple((7 * number + 3 * i) % VOCAB for i in range(num_prompt)),
            sampling=SamplingParams(max_tokens=rng.choice((1, 3, 10, 25)), stop_token_ids=(rng.randrange(VOCAB),)),
            deadline_s=self.world.now_s + rng.uniform(0.5, 20.0) if deadline else None,
        )
        expected, reason = generate(request, self.geometry, self.room)
        client = SimClient(request, expected, reason, self.world.now_s)
        self.clients.append(client)
        rng.choice([front for front in self.fronts if front.alive]).ask(client)

    def run_until(self, ends_s: float, done: Callable[[], bool] = lambda: False) -> None:
        while self.world.now_s < ends_s and not done():
            assert self.world.step()

    def set_bounds(self, **keys: int) -> None:
        """What `serve deploy` with other bounds does, now and for routers to come."""
        self.bounds = replace(self.bounds, **keys)
        if self.router is not None:
            self.router.scaler.set_bounds(self.bounds)
