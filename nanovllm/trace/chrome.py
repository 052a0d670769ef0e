"""Records -> Chrome's trace event format, for chrome://tracing and Perfetto.

Format: "Trace Event Format", Google, 2016. An event has a phase `ph`: "X" is a span with a
start and a duration in microseconds, "i" an instant, "C" a counter, "M" a name. Events with
the same `pid` and `tid` are one row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nanovllm.trace.records import EndRecord, Record, RequestRecord, StepRecord

HOST = 1
DEVICE = 2
SEQUENCES = 3
PROCESSES = {HOST: "host", DEVICE: "device", SEQUENCES: "sequences"}

Event = dict[str, object]


def write_chrome_trace(records: list[Record], path: Path) -> None:
    text = json.dumps({"traceEvents": list(events(records)), "displayTimeUnit": "ms"})
    path.write_text(text, encoding="utf-8")


def events(records: Iterable[Record]) -> Iterator[Event]:
    for pid, name in PROCESSES.items():
        yield named("process_name", pid, 0, name)
    for record in records:
        if record["kind"] == "request":
            yield from request_events(record)
        elif record["kind"] == "step":
            yield from step_events(record)
        elif record["kind"] == "end":
            yield from change_events(record)


def request_events(record: RequestRecord) -> Iterator[Event]:
    for seq in record["seqs"]:
        yield named("thread_name", SEQUENCES, seq, f"sequence {seq}, request {record['request']}")
        yield instant("added", seq, record["time"])


def step_events(record: StepRecord) -> Iterator[Event]:
    yield from change_events(record)
    yield from host_events(record)
    yield from device_events(record)


def host_events(record: StepRecord) -> Iterator[Event]:
    number = record["number"]
    us = record["us"]
    start = record["time"]
    yield span(f"schedule {number}", HOST, 0, start, us["schedule"])
    if us["build"] is not None and us["launch"] is not None:
        start += us["schedule"] / 1e6
        yield span(f"build {number}", HOST, 0, start, us["build"])
        start += us["build"] / 1e6
        yield span(f"launch {number}", HOST, 0, start, us["launch"])
    if record["collect_time"] is not None and us["collect"] is not None:
        start = record["collect_time"]
        yield span(f"collect {number}", HOST, 0, start, us["collect"])
        start += us["collect"] / 1e6
        yield span(f"output {number}", HOST, 0, start, us["output"] or 0)


def device_events(record: StepRecord) -> Iterator[Event]:
    """The step in the device's row, and its share in the row of each sequence."""
    start = record["device_time"]
    duration = record["us"]["device"]
    if start is None or duration is None:
        return
    number = record["number"]
    yield span(f"step {number}", DEVICE, 0, start, duration, dict(record["budget"]))
    texts = {token["seq"]: token["text"] for token in record["tokens"]}
    for run in record["seqs"]:
        seq = run["seq"]
        name: str = run["kind"]
        if run["count"] > 1:
            name = f"{name} {run['count']}"
        about: Event = {"step": number, "start": run["start"], "text": texts.get(seq)}
        yield span(name, SEQUENCES, seq, start, duration, about)


def change_events(record: StepRecord | EndRecord) -> Iterator[Event]:
    for seq in record["preempted"]:
        yield instant("preempted", seq, record["time"])
    for finish in record["finished"]:
        yield instant(f"finished: {finish['reason']}", finish["seq"], record["time"])
    requests = {"running": len(record["running"]), "waiting": len(record["waiting"])}
    yield counter("sequences", record["time"], requests)
    blocks = {"free": record["free"], "cached": record["cached"]}
    yield counter("blocks", record["time"], blocks)


# -- events ----------------------------------------------------------------------------------------


def named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def span(
    name: str, pid: int, tid: int, start: float, duration: int, about: Event | None = None
) -> Event:
    """start: seconds. duration: microseconds."""
    return {
        "ph": "X",
        "name": name,
        "pid": pid,
        "tid": tid,
        "ts": start * 1e6,
        "dur": duration,
        "args": about or {},
    }


def instant(name: str, seq: int, time: float) -> Event:
    """time: seconds. "s": "t" draws the instant in the row of the sequence only."""
    return {"ph": "i", "name": name, "pid": SEQUENCES, "tid": seq, "ts": time * 1e6, "s": "t"}


def counter(name: str, time: float, values: dict[str, int]) -> Event:
    """time: seconds."""
    return {"ph": "C", "name": name, "pid": HOST, "ts": time * 1e6, "args": values}
