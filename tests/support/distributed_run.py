"""Train a tiny model in several gloo processes, and count the bytes that they exchange and hold.
tests/system/test_distributed.py starts them.

As a program it is the command line of fastlm, with a rank that kills itself:
torchrun --nproc-per-node 2 tests/support/distributed_run.py RANK STEP pretrain ...
"""

import copy
import json
import math
import os
import resource
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from preference_models import WORDS, make_base, write
from tiny_run import SEQ, VOCAB, Letters
from torch.distributed import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fastlm import AdamW
from fastlm.checkpoint.config import ModelConfig
from fastlm.data.shards import BatchSampler, TokenDataset
from fastlm.errors import InputError
from fastlm.model.causal_lm import CausalLM
from fastlm.model.lora import add_lora
from fastlm.model.reward_model import RewardModel
from fastlm.train import loop
from fastlm.train.distill import DistillOptions, TeacherModelObjective
from fastlm.train.dpo_objective import DPOObjective
from fastlm.train.loop import NonFiniteError, TrainingInterrupted, train
from fastlm.train.objective import DivergedError, Example
from fastlm.train.online import OnlineObjective
from fastlm.train.online_objectives import GRPOObjective, PPOObjective, build_value_model
from fastlm.train.online_stage import GRPO
from fastlm.train.options import GRPOOptions, PPOOptions, RolloutOptions, TrainOptions
from fastlm.train.parallel import process_group
from fastlm.train.preference_stage import DPOOptions, PreferenceExample
from fastlm.train.pretrain import PretrainObjective
from fastlm.train.reward import RewardObjective
from fastlm.train.sft import SFTObjective

CONFIG = {
    "model_type": "llama", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64,
    "eos_token_id": 0, "tie_word_embeddings": True,
}  # fmt: skip
OPTIONS = TrainOptions(
    max_steps=10, lr=3e-3, gradient_accumulation_steps=4, dtype="float32", validations=2,
    val_tokens=64, sample_at=(0.0, 0.5, 1.0), sample_tokens=4, save_steps=4, save_total_limit=2,
)  # fmt: skip
# name -> what differs from OPTIONS
PRETRAININGS = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "best": {"keep": "best", "checkpoint_activations": 2},
}
FSDP = {"parallel": "fsdp"}


def model(**changes) -> CausalLM:
    return CausalLM(ModelConfig.from_dict({**CONFIG, **changes}), seed=0)


def train_pretraining(data: Path, run: Path, options: TrainOptions = OPTIONS, **kwargs):
    torch.manual_seed(1)
    sampler = BatchSampler(TokenDataset(data / "train"), 2, SEQ, seed=7)
    heldout = TokenDataset(data / "heldout")
    net = model()
    objective = PretrainObjective(net, sampler, heldout, options, Letters())
    result = train(objective, options, run, **kwargs)
    return net, result


def examples(count: int) -> list[Example]:
    """Return examples of 4 to 12 tokens. The second half of each is learnt."""
    rng = np.random.default_rng(5)
    result = []
    for i in range(count):
        size = int(rng.integers(4, 13))
        ids = rng.integers(1, VOCAB, size).astype(np.int32)
        result.append(Example(ids, np.arange(size) >= size // 2, str(i)))
    return result


def train_sft(run: Path, options: TrainOptions = OPTIONS, rank: int = 0, net=None):
    """Fine-tune in epochs of 7 micro-batches: 4, then 3. ``rank``: of adapters; 0 trains all
    weights.
    """
    net = net or model()
    if rank:
        add_lora(net, rank, 2.0 * rank, seed=3)
    objective = SFTObjective(
        net, examples(14), [], options, batch_size=2, seed=1, base="", tokenizer=None, prompt=(),
    )  # fmt: skip
    train(objective, options, run)
    return net


def train_reward(run: Path, options: TrainOptions = OPTIONS):
    """Train a reward model in epochs of 5 micro-batches of pairs: 4, then 1."""
    net = RewardModel(ModelConfig.from_dict(CONFIG), seed=0)
    both = examples(18)
    pairs = [PreferenceExample(pair) for pair in zip(both[::2], both[1::2])]
    objective = RewardObjective(net, pairs, pairs[:3], options, batch_size=2, seed=1, base="")
    train(objective, options, run)
    scores = net.eval().score([e.ids.tolist() for e in both])  # the model is whole again
    assert torch.isfinite(scores).all()
    return net


def train_preferences(run: Path, options: TrainOptions = OPTIONS, loss: str = "sigmoid"):
    """Train on preferences in epochs of 5 micro-batches of pairs with a common prompt: 4, then 1.
    With "kto" the first answer of each pair is labelled, and the second stands for an answer to
    another prompt.
    """
    net = model()
    pairs = []
    for i, answer in enumerate(examples(9)):
        ids = answer.ids.copy()
        ids[answer.loss_mask] = 1 + (ids[answer.loss_mask] + i) % (VOCAB - 1)
        pairs.append(
            PreferenceExample(
                (answer, Example(ids, answer.loss_mask, answer.location)), desirable=i % 3 > 0
            )
        )
    objective = DPOObjective(
        net, pairs, pairs[:3], options, DPOOptions(loss), batch_size=2, seed=1, base="",
        tokenizer=None, prompt=(),
    )  # fmt: skip
    objective.measure_reference(torch.float32)
    train(objective, options, run)
    return net


def train_distillation(run: Path, options: TrainOptions = OPTIONS, on_policy_fraction: float = 0.0):
    """Distil in epochs of 7 micro-batches: 4, then 3. Every process has the full teacher."""
    net, teacher = model(), model(num_hidden_layers=1, initializer_range=0.3)
    objective = TeacherModelObjective(
        net, examples(14), examples(3), options, batch_size=2, seed=1, base="", tokenizer=None,
        prompt=(), teacher=teacher,
        distill_options=DistillOptions(
            "jsd", sft_weight=0.5, on_policy_fraction=on_policy_fraction, max_new_tokens=6
        ),
    )  # fmt: skip
    train(objective, options, run)
    return net


ROLLOUTS = RolloutOptions(
    prompts_per_round=3, num_generations=3, num_iterations=2, batch_size=2, max_new_tokens=6,
    decode_batch_size=4, beta=0.1, kl_target=0.01, kl_horizon=50.0, missing_eos_penalty=-0.5,
    val_prompts=3, max_update_kl=3e-3,
)  # fmt: skip


def train_online(
    kind: str, run: Path, options: TrainOptions, rules: RolloutOptions = ROLLOUTS
) -> OnlineObjective:
    """Train online. ``kind``: "ppo", "ppo shared", or a loss of GRPO's. A pass is 9 answers in 5
    micro-batches: 4, then 1. The second pass is left out if the update has moved too far.
    """
    scored: list[float] = []

    def score(prompt_indices, answers):
        scored[:] = [(sum(t % 5 for t in a.token_ids) / len(a.token_ids) - 0.1 * p) / 1.5
                     for p, a in zip(prompt_indices, answers, strict=True)]  # fmt: skip
        return list(scored)

    policy = model(initializer_range=0.3)
    prompts = [e.ids.tolist() for e in examples(8)]
    args = (policy, copy.deepcopy(policy), prompts[:5], prompts[5:], score)
    settings = asdict(rules)
    more = {
        "base": "", "stop_ids": frozenset(range(8)),
        "score_metrics": lambda: {"square": float(np.mean(np.square(scored)))},
    }  # fmt: skip
    if kind.startswith("ppo"):
        value = build_value_model(policy, shared=kind == "ppo shared")
        settings = PPOOptions(**settings | {"vf_coef": 0.5})
        objective = PPOObjective(*args, settings, value_model=value, **more)
    else:
        settings |= {"loss_type": kind, "entropy_coef": 0.01, "mask_truncated_completions": True}
        objective = GRPOObjective(*args, GRPOOptions(**settings), **more)
    train(objective, options, run)
    return objective


def run_grpo_stage(data: Path, out: Path, **changes) -> dict:
    """Run the stage `grpo`, with adapters, on the files of `stage_files`."""
    stage = GRPO(
        data=(str(data / "prompts.jsonl"),), reward_function=f"{data}/rewards.py:length",
        prompts_per_round=4, num_generations=2, batch_size=2, gradient_accumulation_steps=4,
        max_new_tokens=6, max_steps=2, lr=1e-2, heldout=0.2, val_prompts=3, validations=1,
        sample_at=(1.0,), sample_tokens=4, dtype="float32", save_steps=1, lora_rank=2,
    )  # fmt: skip
    return replace(stage, **changes)(out, model=data / "base")


def run_slow_saving_stage(data: Path, out: Path, **changes) -> None:
    """Run the stage with a model that takes longer to save than another process takes to end."""
    save = GRPO.save_trained

    def slow(self, *args):
        time.sleep(1)
        save(self, *args)

    with patch.object(GRPO, "save_trained", slow):
        run_grpo_stage(data, out, **changes)


def stage_files(data: Path) -> None:
    make_base(data / "base")
    rows = [{"prompt": f"what is {word}"} for word in WORDS]
    write(data / "prompts.jsonl", rows)
    (data / "rewards.py").write_text(
        "import os\n"
        "def length(answer, row):\n    return len(answer) / 10\n"
        "def bad(answer, row):\n"
        "    if os.environ['RANK'] == '1':\n        raise ValueError('no idea')\n"
        "    return 0\n"
    )
    (data / "quiz.py").write_text(
        "from fastlm.train.environments import Environment\n"
        "class Quiz(Environment):\n"
        "    stop = ('e', 'a', ' ')\n"
        "    def step(self, text):\n"
        "        return 'no' if len(text) % 3 else None\n"
    )


SHORT = replace(OPTIONS, max_steps=4, validations=1, sample_at=())


def train_offline(data: Path, out: Path) -> None:
    """Run all offline trainings, in one process or in each of several."""
    for name, changes in PRETRAININGS.items():
        train_pretraining(data, out / name, replace(OPTIONS, **changes))
    train_sft(out / "sft", SHORT)
    train_sft(out / "lora", SHORT, rank=2)
    train_reward(out / "reward", SHORT)
    train_preferences(out / "dpo", SHORT)
    train_distillation(out / "distill", SHORT)


def two(rank: int, data: Path, out: Path) -> None:
    """Run the trainings of two processes."""
    train_offline(data, out / "ddp")
    for name, changes in PRETRAININGS.items():
        with count_traffic() as traffic:
            train_pretraining(data, out / "fsdp" / name, replace(OPTIONS, **changes, **FSDP))
        if name == "float32":
            report = {"sent": traffic, "held": HeldBytes.last}
            (out / f"fsdp-{rank}.json").write_text(json.dumps(report))
    train_sft(out / "fsdp/sft", replace(SHORT, **FSDP))
    train_reward(out / "fsdp/reward", replace(SHORT, **FSDP))
    train_preferences(out / "fsdp/dpo", replace(SHORT, **FSDP))
    train_distillation(out / "fsdp/distill", replace(SHORT, **FSDP))
    with count_traffic() as traffic:
        train_pretraining(data, out / "counted", replace(SHORT, validations=0))
    (out / f"ddp-{rank}.json").write_text(json.dumps({"sent": traffic, "held": HeldBytes.last}))
    for parallel in ("ddp", "fsdp"):
        options = replace(OPTIONS, parallel=parallel)
        try:
            with terminate_at_step(6 if rank == 1 else 0):
                train_pretraining(data, out / f"cut-{parallel}", options)
        except TrainingInterrupted as stopped:
            (out / f"cut-{parallel}-{rank}.txt").write_text(str(stopped))


def four(rank: int, data: Path, out: Path) -> None:
    """Continue the trainings of two processes in four, and with another kind of parallelism."""
    for cut in ("ddp", "fsdp"):
        for parallel in ("ddp", "fsdp" if cut == "ddp" else "hsdp"):
            options = replace(OPTIONS, parallel=parallel)
            train_pretraining(data, out / f"{cut}-{parallel}", options)
    train_sft(out / "sft-ddp", SHORT)
    train_sft(out / "sft-fsdp", replace(SHORT, **FSDP))


def error_message(call, error: type[BaseException] = InputError) -> str:
    """Return the message of the call's error."""
    try:
        call()
    except error as caught:
        return str(caught)
    return "no error"


@contextmanager
def full_disk(full: bool):
    """Let no file of this process grow above 1,000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def diverging(rank: int, run: Path) -> str:
    """Train with losses of inf and -inf in step 3, one in each process. Rank 1 looks for the last
    checkpoint before it is written.
    """
    loss, looks, steps = SFTObjective.loss, loop.checkpoint_before, 0

    def spoil_loss(self, batch, num_items):
        nonlocal steps
        steps += 1
        result = loss(self, batch, num_items)
        return result if steps <= 4 else result * (math.inf if rank else -math.inf)

    SFTObjective.loss = spoil_loss
    if rank:
        loop.checkpoint_before = lambda run_dir, step: None
    options = replace(SHORT, save_steps=2, validations=0, async_checkpoints=True)
    try:
        return error_message(lambda: train_sft(run, options), NonFiniteError)
    finally:
        SFTObjective.loss, loop.checkpoint_before = loss, looks


def edges(rank: int, data: Path, out: Path) -> None:
    """Record the errors of two processes when one of them fails."""
    messages = {}
    short = replace(SHORT, max_steps=2, save_steps=2, validations=0, **FSDP)
    with full_disk(rank == 1):
        messages["full disk"] = error_message(lambda: train_sft(out / "full", short))
    net = train_sft(out / "once", short)
    messages["again"] = error_message(lambda: train_sft(out / "more", short, net=net))
    messages["lora"] = error_message(lambda: train_sft(out / "lora", short, rank=2))
    messages["inf - inf"] = diverging(rank, out / "diverged")
    (out / f"edges-{rank}.json").write_text(json.dumps(messages))


# Objectives that need the full step, or the full round, in each process. AdamW's steps amplify the
# rounding of sums in another order: a rate of 1e-3 leaves no room within the tests' 1e-5.
ROUNDS = replace(SHORT, max_steps=6, save_total_limit=3, lr=5e-4)
ROLLING = ("ppo", "ppo shared", "dapo", "rloo")


def train_rounds(data: Path, out: Path) -> None:
    """Run all trainings in rounds, in one process or in each of several."""
    for kind in ROLLING:
        train_online(kind, out / kind, ROUNDS)
    train_preferences(out / "kto", SHORT, "kto")
    train_distillation(out / "on-policy", replace(SHORT, validations=0), on_policy_fraction=0.6)
    environment = f"{data}/quiz.py:Quiz"
    run_grpo_stage(data, out / "stage", environment=environment, max_new_tokens=60)


def rounds_of_two(rank: int, data: Path, out: Path) -> None:
    """Run them in two processes. PPO stops in step 3, a score fails in the second process, and a KL
    is too large.
    """
    train_rounds(data, out)
    with terminate_at_step(3 if rank == 1 else 0):
        error_message(lambda: train_online("ppo", out / "cut", ROUNDS), TrainingInterrupted)
    reward = f"{data}/rewards.py:bad"
    far = {"max_kl": 0.1, "lr": 0.1, "schedule": "wsd", "decay_ratio": 0.0, "warmup_ratio": 0.0}
    report = {
        "reward": error_message(
            lambda: run_grpo_stage(data, out / "bad", reward_function=reward, validations=0)
        ),
        "kl": error_message(lambda: run_slow_saving_stage(data, out / "far", **far), DivergedError),
        "left": sorted(path.name for path in (out / "far").iterdir()),
        "good": sorted(path.name for path in (out / "far/last-good").glob("*")),
    }
    (out / f"said-{rank}.json").write_text(json.dumps(report))


def rounds_of_four(rank: int, data: Path, out: Path) -> None:
    train_online("ppo", out / "ppo", ROUNDS)
    train_online("dapo", out / "dapo", ROUNDS)
    train_preferences(out / "kto", SHORT, "kto")


def work(job: str, rank: int, size: int, port: int, data: Path, out: Path) -> None:
    """Run a process of ``job``."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True",
        # as where the second node joined later
        "TORCHELASTIC_RESTART_COUNT": str(3 - rank),
    }  # fmt: skip
    if job == "edges":
        cpu = torch.device("cpu")
        with process_group(cpu) as ranks:  # its own group, by torchrun's environment
            assert ranks.gather(rank) == list(range(size))
        assert not dist.is_initialized()
        # a caller's group, which is for GPUs alone. Later groups have the same names: without a
        # prefix gloo may find the addresses of this group in the store
        store = PrefixStore("caller", next(iter(rendezvous("env://")))[0])
        dist.init_process_group("cuda:gloo", store=store, rank=rank, world_size=size)
        with process_group(cpu) as ranks:
            assert ranks.gather(rank) == list(range(size))
            assert ranks.broadcast(rank) == 0 and ranks.any(rank == 1)
        dist.destroy_process_group()
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    jobs = {
        "two": two, "four": four, "edges": edges, "rounds_of_two": rounds_of_two,
        "rounds_of_four": rounds_of_four,
    }  # fmt: skip
    jobs[job](rank, data, out)
    dist.destroy_process_group()


@contextmanager
def count_traffic():
    """Count the bytes that enter and leave collectives of tensors, and the bytes that a process
    holds (`HeldBytes`).
    """
    traffic: dict[str, list[int]] = {}
    originals = {}

    def count(name: str, call):
        def counting(*args, **kwargs):
            tensors = [*args, *kwargs.values()]
            tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.numel() > 1]
            if tensors:
                traffic.setdefault(name, []).append(max(t.nbytes for t in tensors))
            return call(*args, **kwargs)

        return counting

    names = {  # of torch 2.11 and 2.13
        "all_reduce": "all_reduce", "all_gather_into_tensor": "gather",
        "all_gather_single": "gather", "reduce_scatter_tensor": "scatter",
        "reduce_scatter_single": "scatter",
    }  # fmt: skip
    for name, kind in names.items():
        if hasattr(dist, name):
            originals[name] = getattr(dist, name)
            setattr(dist, name, count(kind, originals[name]))
    step = AdamW.step
    AdamW.step = HeldBytes.step
    HeldBytes.call = step
    try:
        yield traffic
    finally:
        AdamW.step = step
        for name, call in originals.items():
            setattr(dist, name, call)


@contextmanager
def terminate_at_step(step: int):
    """Send SIGTERM to this process in that step; 0: never."""
    call, steps = AdamW.step, 0

    def counting(optimizer, closure=None):
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return call(optimizer)

    AdamW.step = counting
    try:
        yield
    finally:
        AdamW.step = call


class HeldBytes:
    """The bytes of parameters, gradients and optimizer state that this process holds."""

    last: dict[str, int] = {}
    call = None

    def step(optimizer, closure=None):
        result = HeldBytes.call(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = [v for p in params for v in optimizer.state[p].values() if v.numel() > 1]

        def size(tensors):
            return sum(getattr(t, "_local_tensor", t).nbytes for t in tensors)

        HeldBytes.last = {
            "parameters": size(params),
            "gradients": size([p.grad for p in params]),
            "state": size(state),
        }
        return result


def main() -> None:
    """Run the command line; the rank dies in that step of the job's first attempt."""
    from fastlm import cli

    rank, step = int(sys.argv[1]), int(sys.argv[2])
    sys.argv = [sys.argv[0], *sys.argv[3:]]
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
    if first and os.environ.get("RANK") == str(rank):
        backward, calls = torch.Tensor.backward, 0

        def dying(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 2 * step:  # two micro-batches per step
                os.kill(os.getpid(), signal.SIGKILL)
            return backward(self, *args, **kwargs)

        torch.Tensor.backward = dying
    cli.main()


if __name__ == "__main__":
    main()
