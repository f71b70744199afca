"""An edge or cloud node: receive → batch → cascade → answer, or features up the next link.

A node with an uplink is an edge node, one without is the cloud; there is no other difference. Every request ends in a
reply, in a refusal that says why, or in a counter with a reason.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec

from runtime import cascade, manifest, packet, reply, requests, topics
from runtime.batcher import Batcher
from runtime.coding import Decoder, ReferenceMissingError
from runtime.config import NodeConfig
from runtime.counters import Counters
from runtime.datatypes import ExitOutput, Features
from runtime.errors import BundleError, ConfigError, PacketError
from runtime.link import Lane, Link, open_link
from runtime.packet import Kind, Packet
from runtime.policy import ExitPolicy
from runtime.presence import Presence
from runtime.reply import Reply
from runtime.requests import Escalated, Pace, Request
from runtime.segment import load_segments
from runtime.topics import Subtree
from runtime.uplink import Sent, Uplink
from runtime.variant import with_each_variant
from runtime.watchdog import of_node

log = logging.getLogger(__name__)

IDLE_S = 0.25
DRAIN_S = 2.0
# Kept back from the budget of what goes further up, so that this node's own answer still arrives in time.
KEPT_BACK_RATIO = 0.1


class Node:
    """One node with its share of the bundle, the link it serves on, and its uplink if it has one.

    Raises:
        BundleError, ConfigError: the bundle or a setting cannot be used.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self.counters = Counters()
        self.bundle = bundle = manifest.load(Path(config.bundle))
        segments = len(bundle.manifest.segments)
        last = segments - 1 if config.uplink is None else bundle.manifest.tiers[-2:][0].last_segment
        last = last if config.last_segment is None else config.last_segment
        if last >= segments or (config.uplink is None and last != segments - 1):
            raise ConfigError(
                f"last_segment: {last} does not fit: the bundle has segments 0 to {segments - 1}, "
                "and a node without an uplink runs them to the end"
            )
        self.tier_name = config.tier or ("cloud" if config.uplink is None else "edge")
        self._tier = cascade.Tier(bundle, *load_segments(bundle, 0, last, threads=config.threads))
        batch = min(spec.max_batch_size for spec in bundle.manifest.segments[: last + 1])
        batch = min(batch, config.max_batch_size, config.max_queue_frames)
        below = bundle.manifest.tiers[0 if config.serves == "devices" else -2 :][0]
        cascade.warm_up(self._tier, min(below.last_segment + 1, last), batch)
        # What runs is the same for all; how sure an exit must be depends on what made the features.
        rule = functools.partial(ExitPolicy.of, early=config.early_exits, agreement=config.agreement)
        self._variants = [(replace(self._tier, bundle=seen), rule(seen)) for seen in with_each_variant(bundle)]
        self._decoder = Decoder(bundle, max_reference_bytes=config.max_reference_bytes)
        self._batcher: Batcher[Request] = Batcher(
            max_batch_size=batch,
            max_queue_delay_ms=config.max_queue_delay_ms,
            max_queue_frames=config.max_queue_frames,
            max_queue_bytes=config.max_queue_bytes,
        )
        self._topics = Subtree(config.site, "n", config.id)
        self._link = open_link(
            config.broker,
            client_id=f"kinflow-n-{config.id}",
            will=(self._topics.availability, b"offline"),
            counters=self.counters,
            beat=self._topics.beat,
        )
        clients: Literal["d", "n"] = "d" if config.serves == "devices" else "n"
        self._link.subscribe(topics.requests(config.site, clients, config.pool), self._received)
        told = {
            "bundle": bundle.id,
            "tier": self.tier_name,
            "last_segment": last,
            "serves": config.serves,
        }
        self._presence = Presence(
            self._link, self._topics, self.counters, stats_interval_s=config.stats_interval_s, told=told
        )
        self._stopping = False
        self._pace = Pace()
        self._up_site = None if config.uplink is None else config.uplink.site or config.site
        self._upper_link = self._link
        self._uplink: Uplink[Escalated] | None = None
        if config.uplink is not None and last + 1 < segments:
            if config.uplink.broker is not None:
                self._upper_link = open_link(
                    config.uplink.broker,
                    client_id=f"kinflow-u-{config.id}",
                    counters=self.counters,
                    beat=Subtree(config.uplink.site or config.site, "n", config.id).beat,
                )
            self._uplink = Uplink(
                self._upper_link,
                Subtree(config.uplink.site or config.site, "n", config.id),
                bundle,
                codec=config.uplink.codec,
                cut=last + 1,
                max_in_flight=config.uplink.max_in_flight,
                counters=self.counters,
                on_reply=self._replied,
                between_frames=config.uplink.between_frames,
            )

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set, then answer what was taken in."""
        links = [self._link] if self._upper_link is self._link else [self._link, self._upper_link]
        for link in links:
            link.start()
        watchdog = of_node(self.counters, self._link, lambda: len(self._batcher))
        watchdog.ready()
        while not stop.is_set():
            watchdog.tend()
            self._serve(self._batcher.take(IDLE_S if self._uplink is None else self._uplink.patience_s(IDLE_S)))
            self._expire()
            self._presence.tell()
        watchdog.stopping()
        self._close(links)

    def _received(self, topic: str, data: bytes) -> None:
        """Take a request in, on the link's thread: everything that can be refused by its header is refused here."""
        arrived_ns = time.monotonic_ns()
        client = topics.sender(topic)
        if client is not None and (client.role, client.name, client.site) == ("n", self._config.id, self._up_site):
            return  # our own request to the tier above, heard on the broker that both sides share
        if client is None:
            self._count_refused("topic", f"{topic[:200]} is no topic of a device or a node")
            return
        try:
            request = requests.read(client, data, arrived_ns)
        except PacketError as error:
            self._count_refused("damaged", str(error))
            return
        unfit = requests.unfit(request.packet, self.bundle, last=self._tier.last)
        if unfit is not None:
            self._refuse(request, *unfit)
        elif self._stopping:
            self._refuse(request, "stopping", "this node is stopping")
        elif not self._queued(request, len(data)):
            self._refuse(request, "queue", "this node is busy")

    def _queued(self, request: Request, size_bytes: int) -> bool:
        """Queue a request, newest first: one of the same camera that would be late gives way, when full any such."""
        now_ns = request.arrived_ns
        for _ in self._batcher.remove(lambda old: old.same_camera(request) and self._in_vain(old, now_ns)):
            self._drop(requests.REPLACED)
        if self._batcher.put(request, size_bytes):
            return True
        for _ in self._batcher.remove(lambda old: self._in_vain(old, now_ns)):
            self._drop(requests.LATE_QUEUED)
        return self._batcher.put(request, size_bytes)

    def _in_vain(self, request: Request, now_ns: int) -> bool:
        return self._pace.in_vain(f"cut{request.packet.cut}", request.deadline_ns, now_ns)

    def _drop(self, reason: str) -> None:
        self.counters.add("requests_dropped_total", reason=reason)

    def _serve(self, taken: Sequence[Request]) -> None:
        """Run a batch and send what became of each of its frames."""
        ready: list[Request] = []
        batch: list[Features] = []
        for request in taken:
            start_ns = time.monotonic_ns()
            if self._in_vain(request, start_ns):
                self._drop(requests.LATE_QUEUED)
                continue
            message = request.packet
            try:
                tensor = self._decoder.decode(str(request.client), message)
            except ReferenceMissingError as error:
                self._refuse(request, "reference", str(error), packet.REFERENCE_MISSING)
                continue
            except PacketError as error:
                self._refuse(request, "payload", str(error))
                continue
            except BundleError as error:
                log.error("a frame of %s cannot be decoded: %s", request.client, error)
                self._refuse(request, "bundle", str(error))
                continue
            request.timings["queue"] = (start_ns - request.arrived_ns) / 1e6
            request.timings["decode"] = (time.monotonic_ns() - start_ns) / 1e6
            ready.append(request)
            batch.append(Features(message.cut, tensor))
        if not batch:
            return
        for variant in sorted({request.packet.variant for request in ready}):
            rows = [row for row, request in enumerate(ready) if request.packet.variant == variant]
            now_ns = time.monotonic_ns()  # decoding, and running those of other variants, takes its time
            late = [row for row in rows if self._in_vain(ready[row], now_ns)]
            for row in late:
                rows.remove(row)
                self._drop(requests.LATE_DECODED)
            if not rows:
                continue
            self.counters.add("batches_total", size=len(rows))
            self._run([ready[row] for row in rows], [batch[row] for row in rows])

    def _run(self, ready: Sequence[Request], batch: Sequence[Features]) -> None:
        """Run frames whose features one variant has made."""
        start_ns = time.monotonic_ns()
        try:
            outcomes = cascade.run(batch, *self._variants[ready[0].packet.variant])
        except BundleError as error:
            if len(batch) > 1:  # one device's broken features are no reason to refuse the others'
                for request, features in zip(ready, batch, strict=True):
                    self._run([request], [features])
            else:
                log.error("a frame of %s cannot be run: %s", ready[0].client, error)
                self._refuse(ready[0], "bundle", str(error))
            return
        end_ns = time.monotonic_ns()
        for request, outcome in zip(ready, outcomes, strict=True):
            self._pace.took(f"cut{request.packet.cut}", (end_ns - start_ns) / 1e6, end_ns)
            request.timings.update(outcome.timings)
            for cut in outcome.withheld:
                self.counters.add("answers_withheld_total", exit=cut, reason="unlike")
            if outcome.answer is not None:
                self._answer(request, outcome.answer)
            elif outcome.features is not None:
                self._escalate(Escalated(request, outcome, outcome.features))

    def _escalate(self, escalated: Escalated) -> None:
        request, now_ns = escalated.request, time.monotonic_ns()
        left_ns = request.deadline_ns - now_ns
        if left_ns <= 0:
            self._drop(requests.LATE_RUN)
            return
        sent: Sent[Escalated] | str = "no uplink"
        if self._uplink is not None and self._pace.in_vain("above", request.deadline_ns, now_ns):
            sent = "late"
        elif self._uplink is not None:
            sent = self._uplink.send(
                escalated.features,
                escalated,
                born_ns=request.arrived_ns - request.packet.age_us * 1000,
                deadline_ns=request.deadline_ns - int(left_ns * KEPT_BACK_RATIO),
                camera=request.packet.camera,
                origin=str(request.client),
                variant=request.packet.variant,
            )
        if isinstance(sent, str):
            self._answer_myself(escalated, sent)

    def _replied(self, sent: Sent[Escalated], said: Reply | str) -> None:
        """Hand an answer from above down, on the link's thread."""
        if isinstance(said, str):
            self._answer_myself(sent.context, f"refused: {said}")
            return
        request, now_ns = sent.context.request, time.monotonic_ns()
        above_ms = (now_ns - sent.sent_ns) / 1e6
        self._pace.took("above", above_ms, now_ns)
        timings = {
            **self._named(request.timings),
            f"{self.tier_name}.encode": sent.encode_ms,
            **said.timings,
            f"{self.tier_name}.network": above_ms - sum(said.timings.values()),
        }
        self._reply(request, msgspec.structs.replace(said, timings=timings))

    def _answer_myself(self, escalated: Escalated, reason: str) -> None:
        """Answer from this tier's best exit, because nothing above does."""
        tier, _ = self._variants[escalated.request.packet.variant]
        best = cascade.last_word(escalated.outcome, tier)
        if best is None:
            self._refuse(escalated.request, "no exit", f"nothing above answers ({reason}) and no exit here can")
        else:
            degraded = f"{self.tier_name} uplink: {reason}"
            self._answer(escalated.request, best, degraded=degraded[: reply.MAX_DEGRADED])

    def _answer(self, request: Request, said: ExitOutput, degraded: str | None = None) -> None:
        timings = self._named(request.timings)
        self._reply(request, reply.of(said, self.tier_name, timings, degraded))

    def _named(self, timings: dict[str, float]) -> dict[str, float]:
        return {f"{self.tier_name}.{stage}": took_ms for stage, took_ms in timings.items()}

    def _reply(self, request: Request, said: Reply) -> None:
        if time.monotonic_ns() >= request.deadline_ns:
            self._drop(requests.LATE_ANSWER)
            return
        self.counters.add("replies_total", tier=said.tier, exit=said.exit)
        if said.degraded is not None:
            self.counters.add("replies_degraded_total")
        self._send_down(request, Kind.RESULT, reply.encode(said))

    def _refuse(self, request: Request, reason: str, sentence: str, flags: int = 0) -> None:
        self._count_refused(reason, sentence)
        self._send_down(request, Kind.REFUSAL, sentence.encode(), flags)

    def _count_refused(self, reason: str, sentence: str) -> None:
        self.counters.add("packets_refused_total", reason=reason)
        log.debug("refused a packet: %s", sentence)

    def _send_down(self, request: Request, kind: Kind, payload: bytes, flags: int = 0) -> None:
        message = request.packet
        answer = Packet(
            kind=kind,
            bundle=message.bundle,
            session=message.session,
            sequence=message.sequence,
            payload=payload,
            cut=message.cut,
            camera=message.camera,
            flags=flags,
        )
        data, ends_ns = packet.pack(answer), request.deadline_ns
        if not self._link.publish(request.client.replies, data, lane=Lane.FEATURES, expires_ns=ends_ns):
            self.counters.add("replies_dropped_total", reason="link")

    def _expire(self) -> None:
        if self._uplink is not None:
            for sent in self._uplink.expire(time.monotonic_ns()):
                self._answer_myself(sent.context, "deadline")

    def _close(self, links: Sequence[Link]) -> None:
        self._stopping = True
        end_s = time.monotonic() + DRAIN_S
        while (len(self._batcher) or self._uplink) and time.monotonic() < end_s:
            self._serve(self._batcher.take(0.02))
            self._expire()
        for request in self._batcher.drain():
            self._refuse(request, "stopping", "this node is stopping")
        for sent in self._uplink.drain() if self._uplink is not None else []:
            self._answer_myself(sent.context, "stopping")
        self._presence.leave()
        for link in links:
            link.close()
