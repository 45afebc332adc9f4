"""Distillation: a student learns the teacher's distributions over the tokens of answers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.errors import InputError
from fastlm.pipeline.stage import (
    Facts,
    InputSpec,
    StageContext,
    at_least_one,
    not_negative,
    one_of,
    positive,
    select_options,
)
from fastlm.sources.input_digest import InputDigest
from fastlm.torchrun import check_single_process
from fastlm.train.encoding import chat_tokenizer, check_vocabulary, template_variables
from fastlm.train.objective import IGNORE, weights_digest
from fastlm.train.options import check_unsharded, expect
from fastlm.train.sft import SFT, ConversationDataset, SFTObjective

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from fastlm.data.conversations import RowCounts
    from fastlm.model.causal_lm import CausalLM
    from fastlm.tokenizer.tokenizer import Tokenizer
    from fastlm.train.objective import Example, PackedBatch
    from fastlm.train.options import TrainOptions
    from fastlm.train.teacher import TeacherLogits

DIVERGENCES = {
    "forward": "forward KL", "reverse": "reverse KL", "jsd": "Jensen-Shannon divergence",
}  # fmt: skip
LOGITS, COMPLETIONS = "teacher-logits", "teacher-completions"
# Options that training on the teacher's completions does not use
DIVERGENCE_OPTIONS = (
    "divergence", "jsd_beta", "sft_weight", "on_policy_fraction", "teacher_top_k", "teacher_logits",
    "data_weights",
)  # fmt: skip


@dataclass(frozen=True)
class DistillOptions:
    """The loss of distillation, and the student's own samples."""

    divergence: Annotated[
        str,
        "Minimize this divergence: forward KL(teacher, student), reverse KL(student, teacher), or"
        " jsd",
    ] = "forward"
    jsd_beta: Annotated[float, "Give the teacher this weight in the mixture of jsd, 0 to 1"] = 0.5
    temperature: Annotated[
        float, "Divide the logits of student and teacher by this temperature"
    ] = 1.0
    sft_weight: Annotated[
        float, "Add the cross-entropy of the data's tokens with this coefficient"
    ] = 0.0
    on_policy_fraction: Annotated[
        float, "Sample the completions of this share of micro-batches from the student"
    ] = 0.0
    max_new_tokens: Annotated[
        int, "Generate at most this many tokens per completion of the student or teacher"
    ] = 128


class DistillObjective(SFTObjective):
    """The objective of `Distill`: the divergence of student and teacher, averaged over the loss
    tokens of the whole step, plus `sft_weight` times the cross-entropy.
    """

    def __init__(self, *args: Any, distill_options: DistillOptions, **common: Any):
        self.distill_options = distill_options
        super().__init__(*args, **common)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), **asdict(self.distill_options)}

    def divergence(self, student: "Tensor", head: "Tensor", batch: Any, num_items: int) -> "Tensor":
        """Return the sum over the loss tokens, divided by ``num_items``. ``student``: hidden
        states.
        """
        raise NotImplementedError

    def loss(self, batch: Any, num_items: int) -> "Tensor":
        import torch

        from fastlm.ops import linear_cross_entropy

        ids, labels, cu_seqlens = batch[:3]
        model: Any = self.trained
        student = model.hidden(ids, cu_seqlens=cu_seqlens)[0]
        head = model.head_matrix(student.dtype)
        loss = self.divergence(student, head, batch, num_items)
        if self.distill_options.sft_weight:
            entropy = linear_cross_entropy(
                student, head, labels[0], softcap=model.config.final_logit_softcapping,
                ignore_index=IGNORE, num_items=num_items,
            )  # fmt: skip
            assert isinstance(entropy, torch.Tensor)  # a pair only with return_lse
            loss = loss + self.distill_options.sft_weight * entropy
        return loss


class TeacherModelObjective(DistillObjective):
    """Distillation from a teacher in memory (`fastlm.ops.linear_distillation`).

    With probability `on_policy_fraction` a micro-batch has completions of the student, one for the
    first user message of each conversation, instead of the data's answers (Agarwal et al. 2024,
    arXiv:2306.13649).
    """

    def __init__(self, *args: Any, teacher: "CausalLM", **common: Any):
        self.teacher = teacher.requires_grad_(False).eval()
        super().__init__(*args, **common)
        self.sampled_batches = self.total_batches = 0  # micro-batches of the step

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "teacher": weights_digest(self.teacher)}

    def next_batches(self, count: int) -> "list[PackedBatch]":
        """Return ``count`` micro-batches, or the rest of the epoch."""
        import numpy as np

        rows = self.next_rows(count)
        examples = [[self.examples[i] for i in batch_rows] for batch_rows in rows]
        batches: dict[int, PackedBatch] = {}
        on_policy = []  # (index, random generator) of the micro-batches to sample
        for index, batch_rows in enumerate(rows):
            rng = np.random.Generator(np.random.PCG64([self.seed, 1, self.epoch, batch_rows[0]]))
            if rng.random() < self.distill_options.on_policy_fraction:
                on_policy.append((index, rng))
            else:
                batches[index] = self.collate(examples[index])
        self.sampled_batches, self.total_batches = len(on_policy), len(rows)
        shard, _ = self.world.split_batches(on_policy)
        if on_policy:  # each process samples its shard
            for part in self.world.gather_results(
                lambda: {index: self._sample(examples[index], rng) for index, rng in shard}
            ):
                for index, tensors in part.items():
                    ids, labels, ends = (tensor.to(self.device) for tensor in tensors)
                    batches[index] = ids, labels, ends
        return [batches[index] for index in range(len(rows))]

    def _sample(self, examples: "list[Example]", rng: "np.random.Generator") -> "PackedBatch":
        """Return a micro-batch of the student's completions, on the CPU."""
        import torch

        from fastlm.train.rollouts import pack_rollouts, sample_completions

        prompts = [e.ids[: int(e.loss_mask.argmax())].tolist() for e in examples]
        model: Any = self.trained
        model.eval()
        max_tokens = model.context_limit - max(map(len, prompts))
        completions = sample_completions(
            model, prompts, max_new_tokens=min(self.distill_options.max_new_tokens, max_tokens),
            seed=int(rng.integers(2**62)), max_num_seqs=len(prompts),
        )  # fmt: skip
        model.train()
        packed = pack_rollouts(  # without keys, which a batch of distillation lacks
            prompts, [completion.token_ids for completion in completions], torch.device("cpu"),
            share_prompts=False,
        )  # fmt: skip
        return packed.ids, packed.labels, packed.cu_seqlens

    def divergence(self, student: "Tensor", head: "Tensor", batch: Any, num_items: int) -> "Tensor":
        import torch

        from fastlm.ops import linear_distillation

        ids, labels, cu_seqlens = batch
        model: Any = self.trained
        with torch.no_grad():
            teacher = self.teacher.hidden(ids, cu_seqlens=cu_seqlens)[0]
            teacher_head = self.teacher.head_matrix(teacher.dtype)
        o = self.distill_options
        return linear_distillation(
            student, head, teacher, teacher_head, kind=o.divergence, beta=o.jsd_beta,
            temperature=o.temperature, mask=labels[0] != IGNORE, num_items=num_items,
            student_softcap=model.config.final_logit_softcapping,
            teacher_softcap=self.teacher.config.final_logit_softcapping,
        )  # fmt: skip

    def scalars(self, measurements: Sequence[Any]) -> dict[str, float]:
        return {
            **super().scalars(measurements),
            "on_policy_fraction": self.sampled_batches / max(self.total_batches, 1),
        }


class TeacherLogitsObjective(DistillObjective):
    """Distillation from a teacher's logits on disk (`fastlm.train.teacher`): the forward KL to its
    likeliest tokens and the rest. A batch has the teacher's rows after the usual three tensors.
    """

    def __init__(self, *args: Any, teacher_logits: "TeacherLogits", **common: Any):
        self.teacher_logits = teacher_logits
        super().__init__(*args, **common)
        self.teacher_identity = teacher_logits.identity([*self.examples, *self.heldout])

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "teacher_logits": self.teacher_identity}

    def collate(self, examples: "Sequence[Example]") -> Any:
        import torch

        ids, logprobs = (
            torch.from_numpy(x).to(self.device) for x in self.teacher_logits.rows(examples)
        )
        return (*super().collate(examples), ids, logprobs[:, :-1], logprobs[:, -1])

    def divergence(self, student: "Tensor", head: "Tensor", batch: Any, num_items: int) -> "Tensor":
        from fastlm.train.teacher import logprobs_at, topk_forward_kl

        _, labels, _, ids, teacher, rest = batch
        model: Any = self.trained
        logprobs = logprobs_at(
            student[labels[0] != IGNORE], head, ids, temperature=self.distill_options.temperature,
            softcap=model.config.final_logit_softcapping,
        )  # fmt: skip
        return topk_forward_kl(logprobs, teacher, rest).sum() / num_items


@dataclass(frozen=True)
class Distill(DistillOptions, SFT):
    """Train a student on a larger model's predictions: at every token of the answers it learns the
    teacher's distribution, not only the answer's token.

    Both must have the same vocabulary. The same command run again resumes from the last checkpoint.
    """

    kind = "distill"
    command = ("distill",)
    inputs = {
        "model": InputSpec(("model",), "Student to train: a run or a Hugging Face folder"),
        "teacher": InputSpec(
            ("model",), "Teacher: a run or a Hugging Face folder", default=False, optional=True
        ),
    }
    unused = ("neftune_noise_alpha",)  # the student learns what the teacher reads, without noise
    checkpoints = ("checkpoints", LOGITS, COMPLETIONS, f"{COMPLETIONS}.json")

    teacher_completions: Annotated[
        str, "Train only on completions that the teacher writes first: greedy or sampled"
    ] = ""
    teacher_top_k: Annotated[
        int | None, "Store the teacher's k likeliest tokens first, and train without the teacher"
    ] = None
    teacher_logits: Annotated[
        str,
        "Read such tokens from this folder of a run with teacher_top_k, to train without a teacher",
    ] = ""

    def check(self) -> None:
        super().check()
        self.check_data(feedback=False)
        at_least_one(self, "max_new_tokens")
        one_of(self, divergence=DIVERGENCES)
        if self.teacher_top_k is not None:
            at_least_one(self, "teacher_top_k")
            expect(not self.teacher_logits, "teacher_top_k", "none with teacher_logits", "both")
        if self.teacher_top_k or self.teacher_logits:
            name = "teacher_top_k" if self.teacher_top_k else "teacher_logits"
            expected = f"forward with {name}, which lacks the probabilities of the other tokens"
            expect(self.divergence == "forward", "divergence", expected, self.divergence)
            fraction = self.on_policy_fraction
            expected = f"0 with {name}, which lacks completions that are sampled later"
            expect(not fraction, "on_policy_fraction", expected, fraction)
        expect(0 < self.jsd_beta < 1, "jsd_beta", "a number between 0 and 1", self.jsd_beta)
        positive(self, "temperature")
        not_negative(self, "sft_weight")
        for name in ("teacher_top_k", "teacher_completions"):
            if getattr(self, name):
                check_single_process(name, "one process writes completions and logits")
        if self.on_policy_fraction:
            check_unsharded("on_policy_fraction", self.parallel)
        fraction = self.on_policy_fraction
        expect(0 <= fraction <= 1, "on_policy_fraction", "0 to 1", fraction)
        if self.teacher_completions:
            method = self.teacher_completions
            one_of(self, teacher_completions=("greedy", "sampled"))
            for name in (*DIVERGENCE_OPTIONS, *(("temperature",) if method == "greedy" else ())):
                value, default = getattr(self, name), getattr(type(self), name)
                expected = f"{default or 'none'} with teacher_completions {method}"
                expect(value == default, name, f"{expected}, which does not use it", value)

    def plan(self, inputs: Mapping[str, Any]) -> Facts:
        self.check_teacher(bool(inputs["teacher"]))
        return super().plan(inputs)

    def check_teacher(self, has_teacher: bool) -> None:
        """Raise InputError unless there is either a teacher or `teacher_logits`."""
        valid = bool(self.teacher_logits) != has_teacher
        got = "both" if has_teacher else "neither"
        expect(valid, "teacher", "a teacher or teacher_logits", got)

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        logits = input_digest.hash_tree(self.teacher_logits) if self.teacher_logits else None
        return [super().digest_inputs(input_digest), logits]

    def read_data(
        self, tokenizer: "Tokenizer", context: int, ctx: StageContext
    ) -> ConversationDataset:
        self.check_teacher(bool(ctx.inputs.get("teacher")))
        if not self.teacher_completions:
            return super().read_data(tokenizer, context, ctx)
        rows = self.write_teacher_completions(ctx)
        stage = replace(self, data=(str(ctx.out / COMPLETIONS),), data_weights=())
        length = self.example_length(context)
        dataset = ConversationDataset(stage, tokenizer, length, context, ctx)
        rows.by_reason.update(dataset.rows.by_reason)
        dataset.rows = rows
        return dataset

    def write_teacher_completions(self, ctx: StageContext) -> "RowCounts":
        """Write the teacher's completions of the data's prompts."""
        from fastlm.data.conversations import RowCounts
        from fastlm.data.prompts import read_prompts
        from fastlm.train.teacher import write_completions

        teacher, tokenizer = self.load_teacher(ctx)
        try:
            # not with `chat_template`: it is the student's, which may be of another family
            chat_tokenizer(tokenizer, "")
        except InputError as error:
            reason = str(error).removeprefix("chat_template: ")
            raise InputError(f"teacher: expected a chat template of its own; {reason}") from None
        rows = RowCounts()
        max_tokens = teacher.context_limit - self.max_new_tokens
        prompts = []
        for prompt in read_prompts(
            self.data, cache=ctx.cache_dir, skip_bad=self.skip_bad, rows=rows, on_skip=ctx.skipped
        ):
            variables = template_variables(prompt.tools)
            ids = tokenizer.encode_chat(prompt.messages, date=self.date, **variables)
            if len(ids) <= max_tokens:
                prompts.append((ids, prompt))
            else:
                rows.by_reason["too long for the teacher"] += 1
        count = write_completions(
            ctx.out / COMPLETIONS, teacher, tokenizer, prompts,
            temperature=0.0 if self.teacher_completions == "greedy" else self.temperature,
            max_new_tokens=self.max_new_tokens, seed=self.seed, track=ctx.track,
        )  # fmt: skip
        if count < len(prompts):
            rows.by_reason["without a complete answer"] += len(prompts) - count
        return rows

    def objective(
        self, ctx: StageContext, model: Any, data: Any, options: "TrainOptions", **common: Any
    ) -> SFTObjective:
        if self.teacher_completions:
            return super().objective(ctx, model, data, options, **common)
        args, tokenizer = (model, data.training, data.heldout, options), common["tokenizer"]
        common["distill_options"] = select_options(self, DistillOptions)
        if self.teacher_logits or self.teacher_top_k:
            examples = [*data.training, *data.heldout]
            logits = self.load_teacher_logits(ctx, model, examples, tokenizer)
            return TeacherLogitsObjective(*args, teacher_logits=logits, **common)
        return TeacherModelObjective(
            *args, teacher=self.load_matching_teacher(ctx, model, tokenizer), **common
        )

    def load_teacher_logits(
        self,
        ctx: StageContext,
        student: "CausalLM",
        examples: "list[Example]",
        tokenizer: "Tokenizer",
    ) -> "TeacherLogits":
        """Return the teacher's logits of the examples: read from disk, or computed now."""
        from fastlm.train.teacher import TeacherHeader, TeacherLogits, write_logits

        if self.teacher_logits:
            logits = TeacherLogits(Path(self.teacher_logits))
            assert logits.header is not None
            expected = {"vocab_size": student.config.vocab_size, "temperature": self.temperature}
            for name, value in expected.items():
                got = getattr(logits.header, name)
                expect(got == value, "teacher_logits", f"{name} {value} of the training", got)
            return logits
        top_k, vocab_size = self.teacher_top_k, student.config.vocab_size
        assert top_k is not None
        expected = f"at most the vocabulary of {vocab_size}"
        expect(top_k <= vocab_size, "teacher_top_k", expected, top_k)
        teacher = self.load_matching_teacher(ctx, student, tokenizer)
        header = TeacherHeader(weights_digest(teacher), vocab_size, top_k, self.temperature)
        return write_logits(ctx.out / LOGITS, teacher, examples, header, track=ctx.track)

    def load_teacher(self, ctx: StageContext) -> "tuple[CausalLM, Tokenizer]":
        """Load the teacher and its tokenizer, in the training's dtype."""
        import torch

        from fastlm.model.load import load_model

        path = ctx.path("teacher")
        teacher, tokenizer = load_model(path, keep_quantized=False, dtype=torch.float32)
        return teacher.to(getattr(torch, self.dtype)).eval(), tokenizer

    def load_matching_teacher(
        self, ctx: StageContext, student: "CausalLM", tokenizer: "Tokenizer"
    ) -> "CausalLM":
        """Load the teacher. InputError: its vocabulary is not the student's."""
        teacher, teacher_tokenizer = self.load_teacher(ctx)
        check_vocabulary("teacher", teacher_tokenizer, tokenizer)
        size, got = student.config.vocab_size, teacher.config.vocab_size
        expect(got == size, "teacher", f"a head of the student's {size} tokens", got)
        return teacher

    def headline(self) -> tuple[str, str]:
        if self.teacher_completions:
            method = self.teacher_completions
            return "Distillation", f"The student trains on {method} completions of the teacher."
        return (
            "Distillation",
            f"The loss is the {DIVERGENCES[self.divergence]} to the teacher, per token.",
        )
