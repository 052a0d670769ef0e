"""`run-batch` on a cluster of two nodes, of which one is killed in the middle of the job.

    PYTHONPATH=.:tests python tests/clients/ray_cluster.py

All rows come out once, with the tokens of a run without a cluster. Needs ray[data] and two
cores, and takes a minute.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.cluster_utils import Cluster as LocalCluster
from tiny import shared_model

from nanovllm import EngineArgs
from nanovllm.batch import job
from nanovllm.ray import Cluster, LLMPredictor, replica_resources, run_batch

NUM_ROWS = 400
LINES_A_PART = 20
NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
SAMPLING = {"temperature": 0, "max_tokens": 100, "ignore_eos": True}
ARGS = {"dtype": "float32", "device": "cpu", "num_gpu_blocks_override": 256, "max_num_seqs": 4}


def read(*paths: Path) -> dict[str, Any]:
    """The text by id. Raises for an id that is there twice."""
    found = {}
    for path in paths:
        for line in path.read_bytes().splitlines():
            record = json.loads(line)
            assert record["custom_id"] not in found
            body = record["response"]["body"]
            found[record["custom_id"]] = body and body["choices"][0]["text"]
    return found


def write_input(path: Path) -> None:
    lines = ["no json"]
    for i in range(NUM_ROWS):
        body = {"prompt": f"the {i}"}
        lines.append(json.dumps({"custom_id": f"id {i}", "url": "/v1/completions", "body": body}))
    path.write_text("\n".join(lines))


def kill_when_begun(cluster: LocalCluster, node: Any, output: Path) -> threading.Thread:
    """Kills the node after the second part. The returned thread ends then."""

    def kill() -> None:
        while len(list(output.glob("part-*.jsonl"))) < 2:
            time.sleep(0.01)
        cluster.remove_node(node, allow_graceful=False)
        print(f"a node was killed after {len(list(output.glob('part-*.jsonl')))} parts")

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    return thread


def check_job(cluster: LocalCluster, folder: Path) -> None:
    source = folder / "in.jsonl"
    write_input(source)
    args = EngineArgs(shared_model()[0], **ARGS)

    def options(output: str) -> job.Options:
        return job.Options(source, folder / output, args, sampling=SAMPLING, shows_progress=False)

    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    thread = kill_when_begun(cluster, node, folder / "parts")
    on_two = Cluster(concurrency=2, lines_a_part=LINES_A_PART)
    print(run_batch(options("parts"), on_two))
    thread.join()
    files = sorted((folder / "parts").iterdir())
    assert len(files) == NUM_ROWS // LINES_A_PART + 1
    found = read(*files)
    assert len(found) == NUM_ROWS + 1  # None is the id of the bad line
    job.run_batch(options("whole.jsonl"))
    assert found == read(folder / "whole.jsonl")
    files[3].unlink()
    summary = run_batch(options("parts"), on_two)
    assert summary.num_rows - summary.num_done_before == LINES_A_PART
    assert found == read(*files)
    print(f"{len(found)} rows are there once, with the same tokens")


def check_predictor() -> None:
    args = {"model": shared_model()[0], **ARGS}
    rows = [{"prompt": f"the {i}", "number": i} for i in range(20)]
    rows[7]["prompt"] = ""  # the tokenizer adds BOS, so this one is no error
    rows.append({"prompt": "x" * 3000, "number": 20})
    dataset = ray.data.from_items(rows).map_batches(
        LLMPredictor,
        fn_constructor_kwargs={"engine_args": args, "sampling_params": SAMPLING},
        batch_size=8,
        concurrency=1,
        **replica_resources(EngineArgs(**args)),
    )
    found = sorted(dataset.take_all(), key=lambda row: row["number"])
    assert [row["prompt"] for row in found] == [row["prompt"] for row in rows]
    assert [row["number"] for row in found if row["error"] is not None] == [20]
    assert all(row["generated_text"] for row in found[:20])
    print(f"{len(found)} rows of a dataset: {found[20]['error']}")


def main() -> None:
    cluster = LocalCluster(
        initialize_head=True, head_node_args={**NODE, "include_dashboard": False}
    )
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        with TemporaryDirectory() as name:
            check_job(cluster, Path(name))
        check_predictor()
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
