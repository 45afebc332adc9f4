"""Trainings of several processes: the losses of one, any number of them continues, one that dies.

distributed_run.py has the trainings, tiny ones on gloo. Losses in float32 are within 1e-5 of those
of one process (sums in another order), in bfloat16 within 1 %.
"""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import distributed_run as trainings
import pytest
import tiny_run
import torch
import torch.distributed as dist
from paths import SUPPORT
from torch.distributed import TCPStore

from fastlm.checkpoint.folder import load_tensors
from fastlm.errors import InputError
from fastlm.stages import KINDS, run_recipe
from fastlm.train.checkpoints import list_checkpoints
from fastlm.train.distributed import weighted_means
from fastlm.train.parallel import ProcessGroup, agree_on_group_name, check_gpus, is_lost

NEAR = {"float32": 1e-5, "best": 1e-5, "bfloat16": 1e-2}
NEAR |= dict.fromkeys(("sft", "lora", "reward", "dpo", "distill"), 1e-5)
TIMES = {"seconds", "tokens_per_second"}
# What else a training measures
STEPS = {"step", "loss", "lr", "grad_norm", "tokens", "progress"}
PRETRAINING = {"val_loss", "bits_per_byte", "sample"}
PAIRS = {"epoch", "margin", "accuracy", "val_loss", "val_accuracy", "val_margin"}
ROUNDS = {
    "round", "beta", "score", "kl", "eos_fraction", "approx_kl", "ratio", "entropy", "val_score",
}  # fmt: skip
MEASURED = {
    "float32": PRETRAINING, "best": PRETRAINING, "bfloat16": PRETRAINING, "sft": {"epoch"},
    "lora": {"epoch"}, "reward": PAIRS, "dpo": PAIRS,
    "distill": {"epoch", "val_loss", "on_policy_fraction"}, "kto": PAIRS | {"kl"},
    "on-policy": {"epoch", "on_policy_fraction"},
    **dict.fromkeys((*trainings.ROLLING, "stage"), ROUNDS),
}  # fmt: skip
PROCESSES = multiprocessing.get_context("forkserver")  # they load torch once
PROCESSES.set_forkserver_preload(["distributed_run"])


def launch(job: str, size: int, data: Path, out: Path) -> None:
    """Run the processes of a job to their end. The store is here, as it is torchrun's."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store.set("fastlm/request/1", "of a dead process")
    started = [
        PROCESSES.Process(target=trainings.work, args=(job, rank, size, store.port, data, out))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(600)
    assert [process.exitcode for process in started] == [0] * size


def in_one_thread(run, data: Path, out: Path) -> Path:
    """Run the trainings in this process, as those of several have one thread each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(data, out)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    tiny_run.shards(folder)
    trainings.stage_files(folder)
    return folder


@pytest.fixture(scope="module")
def one_process(data, tmp_path_factory):
    """The trainings of one process."""
    return in_one_thread(trainings.train_offline, data, tmp_path_factory.mktemp("one"))


@pytest.fixture(scope="module")
def two_processes(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    launch("two", 2, data, out)
    return out


@pytest.fixture(scope="module")
def edges(data, tmp_path_factory):
    """The messages of each of two processes."""
    out = tmp_path_factory.mktemp("edges")
    launch("edges", 2, data, out)
    return [json.loads((out / f"edges-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def four_processes(data, two_processes, tmp_path_factory):
    out = tmp_path_factory.mktemp("four")
    for cut in ("ddp", "fsdp"):
        for parallel in ("ddp", "fsdp" if cut == "ddp" else "hsdp"):
            shutil.copytree(two_processes / f"cut-{cut}", out / f"{cut}-{parallel}")
    launch("four", 4, data, out)
    return out


@pytest.fixture(scope="module")
def round_of_one(data, tmp_path_factory):
    return in_one_thread(trainings.train_rounds, data, tmp_path_factory.mktemp("round-of-one"))


@pytest.fixture(scope="module")
def rounds_of_two(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("rounds-of-two")
    launch("rounds_of_two", 2, data, out)
    return out


@pytest.fixture(scope="module")
def rounds_of_four(data, rounds_of_two, tmp_path_factory):
    out = tmp_path_factory.mktemp("rounds-of-four")
    shutil.copytree(rounds_of_two / "cut", out / "ppo")
    launch("rounds_of_four", 4, data, out)
    return out


def lines(run: Path, key: str) -> list[float]:
    text = (run / "metrics.jsonl").read_text()
    return [line[key] for line in map(json.loads, text.splitlines()) if key in line]


def assert_near(run: Path, reference: Path, near: float, min_steps: int = 4) -> None:
    """Check for the same lines of metrics, each step once."""
    text = (reference / "metrics.jsonl").read_text()
    keys = {key for line in map(json.loads, text.splitlines()) for key in line} - TIMES
    assert keys >= STEPS | MEASURED[reference.name]
    if near > 1e-5:
        keys.remove("sample")
    for key in keys:
        expected, actual = lines(reference, key), lines(run, key)
        assert actual == (
            expected if key == "sample" else pytest.approx(expected, rel=near, abs=near)
        ), key
    assert len(lines(reference, "loss")) >= min_steps


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_of_one(one_process, two_processes, parallel, name):
    if (parallel, name) != ("fsdp", "lora"):  # refused, see below
        assert_near(two_processes / parallel / name, one_process / name, NEAR[name])


def test_the_weights_left_are_those_of_one_process(one_process, two_processes):
    """Also those of the lowest val_loss, which are loaded at the end."""
    for name in ("float32", "best", "reward", "dpo", "distill"):
        single, _ = load_tensors(list_checkpoints(one_process / name)[-1])
        ddp, _ = load_tensors(list_checkpoints(two_processes / "ddp" / name)[-1])
        assert single.keys() == ddp.keys() and len(single) > 20
        for key in single.keys() - {"rng.cpu"}:
            torch.testing.assert_close(ddp[key], single[key], rtol=1e-4, atol=1e-5)
    best = [
        load_tensors(run / "best/checkpoints/best-00000010")[0]
        for run in (two_processes / "ddp", one_process)
    ]
    shards = load_tensors(two_processes / "fsdp/best/checkpoints/best-00000010")[0]
    assert shards.keys() == best[1].keys()
    for key in shards:
        torch.testing.assert_close(shards[key], best[1][key], rtol=1e-4, atol=1e-5)


def test_an_interrupt_of_one_process_stops_all_and_others_continue(
    one_process, two_processes, four_processes
):
    for parallel in ("ddp", "fsdp"):
        messages = {(two_processes / f"cut-{parallel}-{rank}.txt").read_text() for rank in (0, 1)}
        assert messages == {
            "stopped after step 6; saved in "
            f"{two_processes}/cut-{parallel}/checkpoints/step-00000006"
        }
        # 2 processes to 4, of which two hold a model with hsdp
        for other in ("ddp", "fsdp" if parallel == "ddp" else "hsdp"):
            assert_near(four_processes / f"{parallel}-{other}", one_process / "float32", 1e-5)
    files = {
        parallel: sorted(
            p.name for p in list_checkpoints(four_processes / f"ddp-{parallel}")[-1].iterdir()
        )
        for parallel in ("ddp", "fsdp")
    }
    assert files["ddp"] == ["manifest.json", "tensors.safetensors"]
    assert [name[:11] for name in files["fsdp"]] == [
        "manifest.js",
        *(f"shard-0000{i}" for i in range(1, 5)),
    ]


def test_fewer_micro_batches_than_processes(one_process, four_processes):
    """Epochs of 7 micro-batches end with a step of 3, of which the fourth process
    has none.
    """
    for parallel in ("ddp", "fsdp"):
        assert_near(four_processes / f"sft-{parallel}", one_process / "sft", 1e-5)


@pytest.mark.parametrize("name", (*trainings.ROLLING, "kto", "on-policy", "stage"))
def test_rounds_of_two_processes_are_those_of_one(round_of_one, rounds_of_two, name):
    """Metrics and weights, also where a process has no micro-batch in a step."""
    assert_near(rounds_of_two / name, round_of_one / name, 1e-5, min_steps=2)
    left = [
        load_tensors(list_checkpoints(out / name)[-1])[0] for out in (round_of_one, rounds_of_two)
    ]
    assert left[0].keys() == left[1].keys()
    for key in left[0].keys() - {"rng.cpu"}:
        torch.testing.assert_close(left[1][key], left[0][key], rtol=1e-4, atol=1e-5)


def test_rounds_of_four_processes(round_of_one, rounds_of_two, rounds_of_four):
    """Nine answers: shares of 2, 2, 2 and 3, then steps of 4 micro-batches and of 1. PPO has begun
    on two processes, and stopped within a round.
    """
    assert lines(rounds_of_two / "cut", "step")[-1] == 3
    for name in ("ppo", "dapo", "kto"):
        assert_near(rounds_of_four / name, round_of_one / name, 1e-5)
    steps = lines(round_of_one / "ppo", "round")
    assert steps[2] == steps[3] and len(set(steps)) > 1
    assert len(set(lines(round_of_one / "ppo", "square"))) == len(set(steps))
    assert {*lines(round_of_one / "on-policy", "on_policy_fraction")} > {
        0.5,
        1,
    }  # shares of one and of two


def test_what_goes_wrong_in_a_round_is_said_in_all_processes(rounds_of_two):
    messages = [json.loads((rounds_of_two / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert messages[0]["reward"] == messages[1]["reward"]
    assert messages[0]["kl"] == messages[1]["kl"]
    assert re.search(
        r"prompts.jsonl, line \d+: the reward function failed: ValueError: no idea$",
        messages[0]["reward"],
    )
    assert re.match(
        r"step 2: round 2: the KL .* max_kl 0.1; last good checkpoint: .*/step-00000001$",
        messages[0]["kl"],
    )
    for message in messages:  # before any process exits: torchrun would end the others
        assert (
            "model.safetensors" in message["good"] or "adapter_model.safetensors" in message["good"]
        )
        assert "model" not in message["left"]
    assert (rounds_of_two / "stage/model/model.safetensors").exists()
    assert max(lines(rounds_of_two / "stage", "turns")) > 1


@pytest.mark.usefixtures("one_thread")
def test_one_process_continues_from_shards(
    data, one_process, two_processes, four_processes, tmp_path
):
    ended = load_tensors(list_checkpoints(one_process / "float32")[-1])[0]
    # groups of two, with hsdp, write the parts of each shard between them
    for cut, parts in (
        (two_processes / "cut-fsdp", 2),
        (four_processes / "fsdp-hsdp", 4),
        (two_processes / "cut-ddp", 0),
    ):
        run = shutil.copytree(cut, tmp_path / cut.name)
        assert len(list(list_checkpoints(run)[-1].glob("shard-*"))) == parts
        net, result = trainings.train_pretraining(data, run)
        assert_near(run, one_process / "float32", 1e-5)
        assert result.steps == 10
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(
                parameter.detach(), ended[f"model.{name}"], rtol=1e-4, atol=1e-5
            )
    damaged = next(list_checkpoints(two_processes / "fsdp/float32")[-1].glob("shard-00002-*"))
    run = shutil.copytree(two_processes / "fsdp/float32", tmp_path / "damaged")
    file = list_checkpoints(run)[-1] / damaged.name
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(InputError, match=r"shard-00002-.*: corrupt: its sha256"):
        trainings.train_pretraining(data, run)
    file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        trainings.train_pretraining(data, run)


def test_a_full_disk_is_one_line_in_all_processes(edges):
    """The disk of the second process is full. torch.distributed.checkpoint raises in all."""
    for messages in edges:
        assert re.search(
            r"step-00000002: cannot be written: File too large$", messages["full disk"]
        )


def test_a_loss_of_inf_minus_inf_has_diverged(edges):
    """In all processes, with the checkpoint that rank 0 knows."""
    for messages in edges:
        assert re.match(
            r"step 3: the loss is nan; batch: .*; last good checkpoint: .*/step-00000002$",
            messages["inf - inf"],
        )


def test_fsdp_refuses_adapters_and_a_model_that_it_trained_before(edges):
    for messages in edges:
        assert messages["lora"] == ("parallel: expected ddp with frozen weights, got fsdp")
        assert messages["again"].startswith(
            "parallel: expected a model that fsdp or hsdp has not trained"
        )


def test_each_process_has_a_gpu_of_its_own():
    check_gpus([("a", "1"), ("a", "2"), ("b", "1")])
    with pytest.raises(InputError, match=r"device: .* processes 1 and 2 on one GPU of a$"):
        check_gpus([("b", "1"), ("a", "1"), ("a", "1")])


def test_a_torch_without_distributed_has_what_one_process_needs(monkeypatch):
    """Such a torch.distributed is almost empty: the loop imports it only for several processes."""
    for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.distributed", ModuleType("torch.distributed"))
    monkeypatch.setattr(torch, "distributed", sys.modules["torch.distributed"])
    folder = Path(trainings.loop.__file__).parent
    modules = [runpy.run_path(str(folder / f"{name}.py")) for name in ("distributed", "parallel")]
    net, single = trainings.model(), modules[0]["SingleProcess"]()
    assert modules[1]["wrap_model"](net, trainings.OPTIONS, single).model is net
    with modules[1]["process_group"](net.device) as ranks:
        assert ranks.size == 1


def test_processes_agree_on_a_new_group_name():
    """The store outlives the processes. The name does not depend on their restart counts, nor on
    where earlier processes ended.
    """
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    clients = [TCPStore("localhost", store.port, is_master=False) for _ in range(3)]

    def names(*ranks: int) -> list[str]:
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(agree_on_group_name, clients[rank], rank, 3) for rank in ranks]
            return [future.result(60) for future in futures]

    before = names(0, 1, 2)
    store.set("fastlm/request/1", "killed before the reply")
    store.set("fastlm/reply/killed before the reply", before[0])
    after = [*names(1, 2, 0), *names(0, 2, 1)]
    assert len({*before, *after}) == 3
    assert len({*before}) == len({*after[:3]}) == len({*after[3:]}) == 1


def test_only_errors_of_the_connection_are_those_of_a_lost_process():
    lost = (
        dist.DistBackendError("NCCL error: remote process exited"),
        dist.DistNetworkError("The client socket has timed out"),
        dist.DistStoreError("wait timeout after 600000ms"),
        RuntimeError("[/a/gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:41"),
        RuntimeError("[/a/gloo/transport/tcp/pair.cc:9]\n Read error [::1]:4: Connection reset by"),
        RuntimeError("[/a/gloo/transport/tcp/buffer.cc:81] Timed out waiting 9ms for recv"),
    )
    others = (
        "The request to the dataset's host timed out", "No module named nccl_helper",
        "Invalid scalar type for gloo", "[/a/gloo/transport/tcp/pair.cc:1] op.preamble.length <= n",
    )  # fmt: skip
    assert all(map(is_lost, lost))
    assert not any(is_lost(RuntimeError(text)) for text in others)


def sizes() -> tuple[int, int]:
    """Parameters of the layers, and of the rest."""
    net = trainings.model()
    layers = sum(p.numel() for p in net.model.layers.parameters())
    return layers, sum(p.numel() for p in net.parameters()) - layers


def test_bytes_and_memory_are_those_of_docs_scaling(two_processes):
    """docs/scaling.md, for float32, 2 processes, 2 micro-batches of each."""
    layers, rest = sizes()
    total, steps, micro = 4 * (layers + rest), 10, 2
    records = [json.loads((two_processes / f"fsdp-{rank}.json").read_text()) for rank in (0, 1)]
    for record in records:
        sent = {kind: sum(counts) for kind, counts in record["sent"].items()}
        assert sent["scatter"] == total * micro * steps
        extra = 3 * 4 * (2 * layers + rest)  # validations, of two batches
        extra += 4 * total  # samples, the final model
        assert sent["gather"] == 4 * (2 * layers + rest) * micro * steps + extra
        memory = {kind: size / total for kind, size in record["held"].items()}
        assert memory == pytest.approx({"parameters": 0.5, "gradients": 0.5, "state": 1.0})
    for rank in (0, 1):
        record = json.loads((two_processes / f"ddp-{rank}.json").read_text())
        assert record["sent"].keys() == {"all_reduce"}
        assert sum(record["sent"]["all_reduce"]) == total * 4  # steps: once per step
        memory = {kind: size / total for kind, size in record["held"].items()}
        assert memory == {"parameters": 1, "gradients": 1, "state": 2}


def test_a_killed_process_ends_the_job_and_torchrun_starts_it_again(data, one_process, tmp_path):
    """By the command line: rank 1 is killed in step 7; the second attempt continues from step 4."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(trainings.CONFIG))
    o, run = trainings.OPTIONS, tmp_path / "run"
    command = [
        "pretrain", "--shards", data, "--config", config, "-o", run, "--batch-size", 2, "--seq-len",
        tiny_run.SEQ, "--seed", 7, "--gradient-accumulation-steps", o.gradient_accumulation_steps,
        "--max-steps", o.max_steps, "--lr", o.lr, "--dtype", o.dtype, "--validations", 2,
        "--val-tokens", o.val_tokens, "--save-steps", 4, "--log-every", 1,
    ]  # fmt: skip
    torchrun = [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1,
        SUPPORT / "distributed_run.py", 1, 7,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, torchrun), *map(str, command)],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("fastlm: ")]
    assert len(errors) <= 1, done.stderr  # torchrun may end rank 0 before it prints
    for line in errors:
        assert re.search(r"rank 0 of 2: another process has ended .*resumes from", line)
    progress = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    steps = [int(line.split(":")[0].split()[1]) for line in progress if "training loss" in line]
    assert steps == [*range(1, 7), *range(5, 11)]  # only rank 0 reports
    assert done.stdout.count("10 steps, loss") == 1
    assert lines(run, "step") == [0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
    assert (run / "model/model.safetensors").exists()


@pytest.fixture
def torchrun_environment(monkeypatch):
    """As if torchrun had started this process with another one."""
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)


def test_what_is_refused(torchrun_environment, tmp_path):
    refused = {
        r"gradient_accumulation_steps: expected micro-batches that 2 .* \(2 or 4\), got 3":
            {"gradient_accumulation_steps": 3},
        r"gradient_accumulation_steps: .* \(2\), got 1": {"gradient_accumulation_steps": 1},
        "optimizer: expected adamw with parallel = 'fsdp', got muon":
            {"optimizer": "muon", "parallel": "fsdp"},
        "async_checkpoints: expected False with parallel = 'fsdp', got True":
            {"async_checkpoints": True, "parallel": "fsdp"},
        "parallel: expected one of ddp, fsdp, hsdp, got 'tensor'": {"parallel": "tensor"},
    }  # fmt: skip
    for message, changes in refused.items():
        with pytest.raises(InputError, match=message):
            replace(trainings.OPTIONS, **changes).check()
    unsharded = {
        "ppo": ("ppo", {"reward_function": "exact"}),
        "grpo": ("grpo", {"reward_function": "exact"}),
        "loss_type = 'kto'": ("dpo", {"loss_type": "kto", "max_steps": 1}),
        "on_policy_fraction": ("distill", {"on_policy_fraction": 0.5, "max_steps": 1}),
    }  # fmt: skip
    for name, (kind, more) in unsharded.items():
        stage = KINDS[kind](data=("x",), gradient_accumulation_steps=2, **more)
        stage.check()
        for parallel in ("fsdp", "hsdp"):
            with pytest.raises(
                InputError, match=f"parallel: expected ddp with {name}, got {parallel}"
            ):
                replace(stage, parallel=parallel).check()
    stage = KINDS["grpo"](data=("x",), reward_function="exact", gradient_accumulation_steps=2)
    with pytest.raises(
        InputError, match="async_rollouts: expected False with 2 processes, got True"
    ):
        replace(stage, async_rollouts=True).check()
    for name, value in {"teacher_top_k": 4, "teacher_completions": "greedy"}.items():
        with pytest.raises(InputError, match=f"{name}: expected one process, got 2 from torchrun"):
            KINDS["distill"](
                data=("x",), gradient_accumulation_steps=2, max_steps=1, **{name: value}
            ).check()
    with pytest.raises(InputError, match="run: expected one process, got 2"):
        run_recipe(tmp_path / "recipe.toml")


def test_a_share_of_micro_batches():
    ranks = [ProcessGroup.__new__(ProcessGroup) for _ in range(4)]
    for rank, process in enumerate(ranks):
        process.rank, process.size = rank, 4
    assert [process.split_batches("abcdefgh") for process in ranks] == [
        ("ae", None), ("bf", None), ("cg", None), ("dh", None)
    ]  # fmt: skip
    assert [process.split_batches("abcde") for process in ranks] == [
        ("ae", None),
        ("b", "a"),
        ("c", "a"),
        ("d", "a"),
    ]
    assert weighted_means([(1, {"a": 2.0}), (3, {"a": 6.0, "b": 1.0}), (0, {})]) == {
        "a": 5.0,
        "b": 1.0,
    }
