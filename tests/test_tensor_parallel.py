"""Models over several processes give what transformers and one process give, and never hang or leave anything behind."""

from __future__ import annotations

import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed
from tiny import greedy, random_prompts, tiny_model
from tp_scripts.ends import IN_ORDER, note_ends

from nanovllm import LLM, SamplingParams
from nanovllm.models.config import check_shards
from nanovllm.parallel import TensorParallel
from nanovllm.runner import sleep
from nanovllm.runner.executor import EngineDeadError

SCRIPTS = Path(__file__).parent / "tp_scripts"
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
LENGTHS = [1, 15, 16, 17, 100, 33, 5, 70, 64, 80]
SOON = 15  # seconds, where what is tested takes one or two
MODELS: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen3-odd-vocabulary": ("Qwen3", {"vocab_size": 301}, 2),
    "llama-tied-one-kv-head": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}, 2),
    "qwen3-two-kv-heads-four-ranks": ("Qwen3", {"vocab_size": 301}, 4),
    "llama-biases-four-ranks": (
        "Llama",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
        4,
    ),
}


def make_llm(folder: str, size: int, **kwargs: Any) -> LLM:
    defaults = {
        "device": "cpu",
        "max_num_batched_tokens": 64,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": 34,
    }
    kwargs = {**defaults, **kwargs}
    return LLM(
        folder, skip_tokenizer_init=True, dtype="float32", tensor_parallel_size=size, **kwargs
    )


def tokens_of(
    llm: LLM, prompts: list[list[int]], params: SamplingParams = GREEDY
) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, params, use_tqdm=False)]


def metric(llm: LLM, name: str) -> float:
    return next(m.value for m in llm.get_metrics() if m.name.endswith(name))


def children(pid: int) -> set[int]:
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == pid:
            found.add(int(stat.parent.name))
    return found


def open_things() -> tuple[int, int, set[str]]:
    """Sockets and shared memory of this process, and what lies in /dev/shm."""
    links = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            links.append(os.readlink(fd))
        except OSError:
            continue
    sockets = sum(link.startswith("socket:") for link in links)
    shared = sum("memfd:nanovllm" in link for link in links)
    return sockets, shared, set(os.listdir("/dev/shm"))


def wait_until(is_true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SOON
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_true()


# -- the same tokens -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    family, overrides, size = MODELS[request.param]
    folder, model = tiny_model(tmp_path_factory.mktemp(request.param), family, **overrides)
    several = make_llm(folder, size)
    yield SimpleNamespace(model=model, one=make_llm(folder, 1), several=several)
    several.llm_engine.executor.close()


@pytest.fixture(params=[False, True], ids=["", "overlap"])
def overlap(request, pair):
    pair.several.llm_engine.overlap = request.param
    pair.several.reset_prefix_cache()


@pytest.mark.usefixtures("overlap")
def test_greedy_tokens_equal_transformers_with_chunks_preemption_and_prefix_hits(pair):
    prompts = random_prompts(LENGTHS)
    expected = [greedy(pair.model, prompt, 20) for prompt in prompts]
    preemptions, hits = (
        metric(pair.several, "preemptions"),
        metric(pair.several, "prefix_cache_hits"),
    )
    assert tokens_of(pair.several, prompts) == expected
    assert tokens_of(pair.several, prompts[4:5] * 2) == expected[4:5] * 2
    assert metric(pair.several, "preemptions") > preemptions
    assert metric(pair.several, "prefix_cache_hits") > hits


@pytest.mark.usefixtures("overlap")
def test_a_users_logits_processor_runs_on_rank_0(pair):
    """A function that no other process could import."""

    def no_repeat(prompt: list[int], output: list[int], logits: torch.Tensor) -> torch.Tensor:
        logits[prompt + output] = float("-inf")
        return logits

    prompts = random_prompts([3, 40, 17])
    params = SamplingParams(
        temperature=0.9, seed=5, max_tokens=12, ignore_eos=True, logits_processors=[no_repeat]
    )
    found = tokens_of(pair.several, prompts, params)
    assert found == tokens_of(pair.one, prompts, params)
    for prompt, tokens in zip(prompts, found):
        assert len({*prompt, *tokens}) == len(set(prompt)) + 12


@pytest.mark.usefixtures("overlap")
def test_drawn_tokens_and_logprobs_equal_those_of_one_rank(pair):
    prompts = random_prompts([3, 40, 90, 17])
    params = SamplingParams(
        temperature=0.9,
        top_p=0.95,
        repetition_penalty=1.1,
        seed=1,
        max_tokens=20,
        logprobs=3,
        prompt_logprobs=2,
    )
    for one, several in zip(
        *(llm.generate(prompts, params, use_tqdm=False) for llm in (pair.one, pair.several))
    ):
        assert several.outputs[0].token_ids == one.outputs[0].token_ids
        wanted = [*one.prompt_logprobs[1:], *one.outputs[0].logprobs]
        for a, b in zip(
            [*several.prompt_logprobs[1:], *several.outputs[0].logprobs], wanted, strict=True
        ):
            assert list(a) == list(b)
            for token in a:
                assert a[token].logprob == pytest.approx(b[token].logprob, abs=1e-4)
                assert a[token].rank == b[token].rank


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("qwen3"), "Qwen3", vocab_size=301)


@pytest.fixture(scope="module")
def two(qwen3):
    """Two ranks over a tiny Qwen3."""
    llm = make_llm(qwen3[0], 2)
    yield llm
    llm.llm_engine.executor.close()


# -- calls to every rank -------------------------------------------------------------------------------------------------


def shapes(model: Any) -> list[tuple[int, ...]]:
    return [tuple(parameter.shape) for parameter in model.parameters()]


def facts(worker: Any, factor: int = 1) -> tuple[int, int, int]:
    return worker.rank * factor, worker.model_runner.num_blocks, torch.get_num_threads()


def only_rank_1_raises(worker: Any) -> None:
    if worker.rank == 1:
        raise KeyError("rank one's own")


def test_calls_reach_every_rank(two):
    before = torch.get_num_threads()
    first, second = two.collective_rpc(facts, kwargs={"factor": 10})
    assert (first[:2], second[:2]) == ((0, 34), (10, 34))
    assert first[2] == second[2] == max(1, before // 2)
    assert torch.get_num_threads() == before
    mine, other = two.apply_model(shapes)
    assert mine == other
    assert (151, 64) in mine  # half of the embedding, padded to a whole row


def test_what_a_call_raises_names_the_rank_and_leaves_the_engine_alive(qwen3, two):
    with pytest.raises(
        RuntimeError, match=r"rank 1 raised[\s\S]*only_rank_1_raises[\s\S]*rank one's own"
    ):
        two.collective_rpc(only_rank_1_raises)
    with pytest.raises(ValueError, match="has no method 'nonsense'"):
        two.collective_rpc("nonsense")
    with pytest.raises(TypeError, match="cannot be sent to other ranks"):
        two.apply_model(lambda model: None)
    assert tokens_of(two, [[5, 6, 7]]) == [greedy(qwen3[1], [5, 6, 7], 20)]


def test_sleep_and_new_weights_reach_every_rank(qwen3, two, tmp_path):
    for level in (1, 2):
        two.sleep(level)
        assert two.apply_model(shapes)[1][0] == (0,)
        two.wake_up()
        assert tokens_of(two, [[5, 6, 7]]) == [greedy(qwen3[1], [5, 6, 7], 20)]
    _, other = tiny_model(tmp_path, "Qwen3", vocab_size=301, max_position_embeddings=513)
    for model in (other, qwen3[1]):
        two.apply_model(LoadWeights(dict(model.state_dict())))
        two.reset_prefix_cache()
        assert tokens_of(two, [[5, 6, 7]]) == [greedy(model, [5, 6, 7], 20)]


class LoadWeights:
    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights

    def __call__(self, model: Any) -> None:
        model.load_weights(self.weights.items())


def test_a_batch_larger_than_the_shared_memory_grows_it(qwen3):
    llm = make_llm(
        qwen3[0],
        2,
        max_num_batched_tokens=512,
        max_num_seqs=512,
        num_gpu_blocks_override=700,
        max_model_len=500,
    )
    prompt = random_prompts([490])[0]
    # Penalties send each row's whole history: 300 * 490 tokens of 4 bytes, more than half a megabyte a step.
    params = SamplingParams(
        temperature=0, repetition_penalty=1.2, max_tokens=4, ignore_eos=True, n=1
    )
    outs = tokens_of(llm, [prompt] * 600, params)
    assert outs == tokens_of(make_llm(qwen3[0], 1, max_model_len=500), [prompt], params) * 600
    llm.llm_engine.executor.close()


def memory_of_its_own(worker: Any) -> int:
    """Bytes; pages of the checkpoint's file are not a rank's own."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def peak_of_loading(worker: Any) -> int:
    """The most memory while the weights are loaded again."""
    seen, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(memory_of_its_own(worker))

    watcher = threading.Thread(target=watch)
    sleep.sleep(worker.model_runner, 2)
    watcher.start()
    sleep.wake_up(worker.model_runner, "weights")
    done.set()
    watcher.join()
    return max(seen)


def test_the_memory_of_a_rank_is_its_share(two, tmp_path):
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "vocab_size": 10000,
    }
    folder, model = tiny_model(tmp_path, "Llama", **sizes)
    whole = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert whole > 190e6
    del model
    llm = make_llm(folder, 2, max_model_len=256)
    base = two.collective_rpc(memory_of_its_own)[1]
    grown = llm.collective_rpc(memory_of_its_own)[1] - base
    peak = llm.collective_rpc(peak_of_loading)[1] - base
    llm.llm_engine.executor.close()
    assert (
        0.4 * whole < grown < 0.5 * whole + 24e6
    )  # a piece of a tensor is read before it is put in place
    assert peak < 0.5 * whole + 48e6


# -- where ranks run -----------------------------------------------------------------------------------------------------


def test_one_rank_needs_no_process_group_process_or_shared_memory(qwen3):
    before, processes = open_things(), children(os.getpid())
    threads = threading.active_count()
    llm = make_llm(qwen3[0], 1, distributed_executor_backend="mp")
    assert tokens_of(llm, [[5, 6, 7]]) == [greedy(qwen3[1], [5, 6, 7], 20)]
    assert llm.llm_engine.executor.runner.tp == TensorParallel()
    assert (open_things(), children(os.getpid())) == (before, processes)
    assert threading.active_count() == threads
    assert not torch.distributed.is_initialized()


def test_engines_live_side_by_side_and_leave_nothing_when_deleted(qwen3, two):
    before, processes = open_things(), children(os.getpid())
    other = make_llm(qwen3[0], 2)
    expected = [greedy(qwen3[1], [5, 6, 7], 20)]
    assert tokens_of(two, [[5, 6, 7]]) == tokens_of(other, [[5, 6, 7]]) == expected
    assert len(children(os.getpid())) == len(processes) + 1
    del other
    gc.collect()
    assert children(os.getpid()) == processes
    assert wait_until(lambda: open_things() == before)
    assert tokens_of(two, [[5, 6, 7]]) == expected


@pytest.mark.parametrize("by", ["close", "del"])
def test_the_group_ends_after_the_graphs_of_its_collectives(qwen3, by):
    """NCCL's group waits for them, and nothing frees them while it waits."""
    ends: list[str] = []
    llm = make_llm(qwen3[0], 1)
    runner = llm.llm_engine.executor.runner
    runner.tp = TensorParallel()
    note_ends(runner, ends.append)
    if by == "close":
        llm.llm_engine.executor.close()
        assert ends == IN_ORDER
    del llm
    gc.collect()
    assert ends == IN_ORDER
    assert runner.graphs is runner.tp.group is None


def run_script(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / name), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=script_env(),
    )


def script_env() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}


def test_a_script_needs_no_main_guard(qwen3, tmp_path):
    ends = tmp_path / "ends"
    done = run_script("no_guard.py", qwen3[0], str(ends))
    assert done.returncode == 0, done.stderr
    assert ends.read_text().splitlines() == IN_ORDER
    tokens, answer = done.stdout.splitlines()[-2:]  # torch 2.8's gloo prints too
    assert json.loads(tokens) == greedy(qwen3[1], [5, 6, 7], 8)
    # Only a function in such a script cannot reach the ranks, and the error says what to add.
    assert "if __name__ == '__main__':" in answer


@pytest.mark.parametrize(("world", "size"), [(2, 2), (2, 1)])
def test_under_torchrun_every_rank_returns_the_same(qwen3, tmp_path, world, size):
    prompts = random_prompts([5, 40])
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={world}",
    ]
    command = [
        *torchrun,
        str(SCRIPTS / "launched.py"),
        qwen3[0],
        str(tmp_path),
        str(size),
        json.dumps(prompts),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=script_env())
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world))
    assert first == second
    assert [tokens for tokens, _ in first[:2]] == [
        greedy(qwen3[1], prompt, 10) for prompt in prompts
    ]
    for rank in range(world if size > 1 else 0):
        assert (tmp_path / f"ends {rank}").read_text().splitlines() == IN_ORDER


# -- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 8])
def test_uneven_shards_are_refused_with_the_sizes_that_work_before_anything_starts(qwen3, size):
    processes = children(os.getpid())
    with pytest.raises(ValueError, match=rf"tensor_parallel_size={size} .* accepted are 1, 2, 4$"):
        make_llm(qwen3[0], size)
    assert children(os.getpid()) == processes


def test_the_sizes_named_are_those_that_divide_everything():
    config: Any = SimpleNamespace(
        num_heads=24, num_kv_heads=4, sharded_sizes=lambda: {"intermediate size": 96}
    )
    accepted = {1, 2, 4, 8, 12, 24}
    for size in range(1, 30):
        if size in accepted:
            check_shards(config, size)
        else:
            with pytest.raises(ValueError, match=r"accepted are 1, 2, 4, 8, 12, 24$"):
                check_shards(config, size)


def test_backends_that_do_not_fit_are_refused(qwen3, monkeypatch):
    with pytest.raises(ValueError, match="'uni' runs one rank"):
        make_llm(qwen3[0], 2, distributed_executor_backend="uni")
    with pytest.raises(ValueError, match="start the script with torchrun"):
        make_llm(qwen3[0], 2, distributed_executor_backend="external_launcher")
    for name, value in {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="must divide the number of processes"):
        make_llm(qwen3[0], 2, distributed_executor_backend="external_launcher")


# -- failures ------------------------------------------------------------------------------------------------------------


def set_a_bomb(worker: Any) -> None:
    def explode(*args: Any) -> None:
        raise ArithmeticError("the bomb went off")

    if worker.rank == 1:
        worker.model_runner.model.model.forward = explode


def test_a_rank_that_raises_fails_generate_with_its_traceback_and_ends_the_engine(qwen3):
    before, processes = open_things(), children(os.getpid())
    llm = make_llm(qwen3[0], 4)
    llm.collective_rpc(set_a_bomb)
    start = time.monotonic()
    with pytest.raises(
        EngineDeadError, match=r"rank 1 raised[\s\S]*in explode[\s\S]*the bomb went off"
    ):
        tokens_of(llm, [[5, 6, 7]])
    assert time.monotonic() - start < SOON
    assert children(os.getpid()) == processes
    with pytest.raises(
        EngineDeadError, match=r"this engine is dead and a new one is needed: rank 1 raised"
    ):
        tokens_of(llm, [[5, 6, 7]])
    with pytest.raises(EngineDeadError, match="dead"):
        llm.collective_rpc(facts)
    del llm
    gc.collect()
    assert wait_until(lambda: open_things() == before)


def test_what_rank_0_raises_in_a_step_ends_the_engine(qwen3, monkeypatch):
    processes = children(os.getpid())
    llm = make_llm(qwen3[0], 2)

    def explode(*args: Any) -> None:
        raise ArithmeticError("out of luck")

    ends: list[str] = []
    note_ends(llm.llm_engine.executor.runner, ends.append)
    monkeypatch.setattr(llm.llm_engine.executor.runner.model.model, "forward", explode)
    with pytest.raises(ArithmeticError, match="out of luck"):
        tokens_of(llm, [[5, 6, 7]])
    assert ends == IN_ORDER, "an NCCL group that waits for graphs would hide the error"
    with pytest.raises(EngineDeadError, match="rank 0 raised ArithmeticError: out of luck"):
        tokens_of(llm, [[5, 6, 7]])
    assert children(os.getpid()) == processes


def test_a_rank_that_dies_between_calls_is_noticed_at_the_next(qwen3):
    processes = children(os.getpid())
    llm = make_llm(qwen3[0], 2)
    ends: list[str] = []
    note_ends(llm.llm_engine.executor.runner, ends.append)
    os.kill(*(children(os.getpid()) - processes), signal.SIGKILL)
    assert wait_until(lambda: children(os.getpid()) == processes)
    assert not ends, "another thread ends the group, and the graphs may be in use"
    for _ in range(2):
        with pytest.raises(
            EngineDeadError, match=r"this engine is dead and a new one is needed: rank 1 .* SIGKILL"
        ):
            tokens_of(llm, [[5, 6, 7]])
        assert ends == IN_ORDER


def test_a_rank_that_hangs_is_named_after_the_time_limit_of_a_step(qwen3):
    """The rank is stopped for good, so it is behind however slow the machine is."""
    processes = children(os.getpid())
    llm = make_llm(qwen3[0], 2, step_timeout=1.0)
    (rank,) = children(os.getpid()) - processes
    os.kill(rank, signal.SIGSTOP)
    with pytest.raises(
        EngineDeadError, match=r"rank 1 did not finish a step within step_timeout=1\.0 s"
    ):
        tokens_of(llm, [[5, 6, 7]])
    assert children(os.getpid()) == processes
    with pytest.raises(EngineDeadError, match="this engine is dead"):
        tokens_of(llm, [[5, 6, 7]])


def kill_one(processes: set[int], delay: float, choose: random.Random) -> None:
    while not (ranks := children(os.getpid()) - processes):
        time.sleep(0.001)
    time.sleep(delay)
    os.kill(choose.choice(sorted(ranks)), signal.SIGKILL)


def generate_long_after(killer: threading.Thread, llm: LLM) -> None:
    died = float("inf")
    while time.monotonic() < died + SOON:
        tokens_of(llm, [[5, 6, 7]] * 4)
        if not killer.is_alive():
            died = min(died, time.monotonic())


def start_and_generate(folder: str, size: int, killer: threading.Thread) -> None:
    generate_long_after(killer, make_llm(folder, size))


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (2, 1), (2, 2), (4, 3)])
def test_killing_a_rank_at_a_random_moment_fails_soon_and_leaves_nothing(qwen3, size, seed):
    before, processes = open_things(), children(os.getpid())
    choose = random.Random(seed)
    killer = threading.Thread(target=kill_one, args=(processes, choose.uniform(0.0, 4.0), choose))
    killer.start()
    with pytest.raises(
        EngineDeadError, match=r"rank \d \(process \d+\) was killed by SIGKILL"
    ) as caught:
        start_and_generate(qwen3[0], size, killer)
    killer.join()
    del caught  # its frames hold the engine
    gc.collect()
    assert children(os.getpid()) == processes
    assert wait_until(lambda: open_things() == before)


def test_a_rank_that_dies_while_the_ranks_meet_is_noticed(qwen3, monkeypatch):
    processes = children(os.getpid())
    join = TensorParallel.join

    def kill_and_join(*args: Any) -> TensorParallel:
        for pid in children(os.getpid()) - processes:
            os.kill(pid, signal.SIGKILL)
        return join(*args)

    monkeypatch.setattr(TensorParallel, "join", kill_and_join)
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        make_llm(qwen3[0], 2)
    assert time.monotonic() - start < SOON
    assert children(os.getpid()) == processes


@pytest.fixture
def endless(qwen3):
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "endless.py"), qwen3[0]],
        stdout=subprocess.PIPE,
        text=True,
        env=script_env(),
        start_new_session=True,
    )
    try:
        # A function of a guarded script reaches the ranks.
        assert "[2, 2]\n" in itertools.islice(process.stdout, 20)  # torch 2.8's gloo prints too
        ranks = children(process.pid)
        assert len(ranks) == 1
        time.sleep(0.2)
        yield process, ranks
    finally:
        process.kill()
        process.communicate()


def test_ranks_end_when_the_users_process_is_killed(endless):
    process, ranks = endless
    process.kill()
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))


def test_ctrl_c_interrupts_generate_and_nothing_else(qwen3, endless):
    process, ranks = endless
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the ranks too
    out, _ = process.communicate(timeout=60)
    assert json.loads(out) == greedy(qwen3[1], [5, 6, 7], 8)
    assert process.returncode == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


# -- NCCL ----------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_nccl_group_of_our_own_works_in_a_cuda_graph():
    device = torch.device("cuda", 0)
    tp = TensorParallel.join(torch.distributed.HashStore(), 0, 1, device)
    several = TensorParallel(0, 2, tp.group)  # takes the collectives' way, over a group of one
    x = torch.arange(8.0, device=device).view(2, 4)
    expected = x.clone()
    assert several.minimum(7, device) == 7
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        several.all_reduce(x)
        several.broadcast(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(x, expected)
    graph.reset()  # or the end of the group waits for it
    several.close()
    assert several.is_aborted


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("eager", [False, True])
def test_two_gpus_give_transformers_tokens_and_a_killed_rank_is_no_hang(qwen3, eager):
    processes = children(os.getpid())
    llm = make_llm(qwen3[0], 2, device="cuda", enforce_eager=eager)
    prompts = random_prompts(LENGTHS)
    assert tokens_of(llm, prompts) == [greedy(qwen3[1], prompt, 20) for prompt in prompts]
    killer = threading.Thread(target=kill_one, args=(processes, 0.5, random.Random(0)))
    killer.start()
    with pytest.raises(EngineDeadError, match="SIGKILL"):
        generate_long_after(killer, llm)
    assert children(os.getpid()) == processes
